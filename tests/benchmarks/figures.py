"""Figures of a stream from raw answers: pure functions, no model, no file.

``truth`` (n,) holds classes by their position in the order of the stream; ``scores`` of a stage
(n, classes known by then) rank the classes learned so far, first to last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inflora_core import evaluation

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]

BINS = 15
"""Of the expected calibration error."""


def summarise(stages: Sequence[Floats], truth: Ints, sizes: Sequence[int]) -> dict[str, Any]:
    """Return the figures of a stream.

    Args:
        stages: Scores of all test images after every task.
        truth: Classes of the test images.
        sizes: Classes of each task.
    """
    matrix = accuracy_matrix(stages, truth, sizes)
    seen = [accuracy(scores, truth) for scores in stages]
    final = stages[-1]
    return {
        "final": seen[-1],
        "average": float(np.mean(seen)),
        "forgetting": forgetting(matrix),
        "task_known": accuracy_task_known(final, truth, sizes),
        "seen": seen,
        "matrix": matrix,
    }


def accuracy(scores: Floats, truth: Ints) -> float:
    """Return the share of images of known classes whose best class is theirs."""
    known = truth < scores.shape[1]
    return float((scores[known].argmax(1) == truth[known]).mean())


def accuracy_matrix(
    stages: Sequence[Floats], truth: Ints, sizes: Sequence[int]
) -> list[list[float]]:
    """Return, after every task, the accuracy on the images of each task so far."""
    ends = np.cumsum(sizes)
    starts = ends - sizes
    rows = []
    for number, scores in enumerate(stages):
        best = scores.argmax(1)
        rows.append(
            [
                float((best[mine] == truth[mine]).mean())
                for start, end in zip(starts[: number + 1], ends, strict=False)
                for mine in [(truth >= start) & (truth < end)]
            ]
        )
    return rows


def accuracy_task_known(scores: Floats, truth: Ints, sizes: Sequence[int]) -> float:
    """Return the accuracy among the classes of the image's own task."""
    ends = np.cumsum(sizes)
    task = np.searchsorted(ends, np.arange(scores.shape[1]), side="right")
    of_image = np.searchsorted(ends, truth, side="right")
    known = truth < scores.shape[1]
    allowed = np.where(task[None] == of_image[known, None], scores[known], -np.inf)
    return float((allowed.argmax(1) == truth[known]).mean())


def forgetting(matrix: Sequence[Sequence[float]]) -> float:
    """Return the mean over older tasks of the best accuracy ever less the final one."""
    losses = [max(row[j] for row in matrix[j:]) - matrix[-1][j] for j in range(len(matrix) - 1)]
    return float(np.mean(losses)) if losses else 0.0


def softmax(scores: Floats) -> Floats:
    """Return probabilities (n, classes)."""
    powers = np.exp(scores.astype(np.float64) - scores.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def calibration_error(probabilities: Floats, truth: Ints, bins: int = BINS) -> float:
    """Return the expected calibration error of the best class, over images of known classes.

    Images are put into ``bins`` of equal width by the probability of their best class; the error
    is the mean over images of their bin's distance between accuracy and mean probability.
    """
    known = truth < probabilities.shape[1]
    right = probabilities[known].argmax(1) == truth[known]
    confidence = probabilities[known].max(1)
    return evaluation.expected_calibration_error(confidence, right, bins) if known.any() else 0.0


def auroc(novelty: Floats, new: NDArray[np.bool_]) -> float | None:
    """Return the chance that a new image scores above a known one; None where one kind lacks."""
    return evaluation.auroc(novelty[~new], novelty[new])


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean, or None if there is nothing or a value lacks."""
    return None if not values or None in values else float(np.mean(values))  # type: ignore[arg-type]
