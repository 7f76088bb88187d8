"""How good a version is on labelled images. Pure numpy: neither torch nor onnxruntime.

A ``Tally`` takes the model's answers batch by batch and keeps seven numbers of each image, never a
row of probabilities: 50,000 images of 10,000 classes are two megabytes, not two gigabytes.
``auroc`` and ``calibration_bins`` stand alone as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from inflora_core.model import ClassEntry, positions_by_label

BINS = 15
"""Bins of the calibration error, as in most publications since Guo et al."""

NOVELTY_THRESHOLDS = (0.5, 0.9, 0.95, 0.99)

_OUTCOME = np.dtype(
    [
        ("truth", np.int32),
        ("answer", np.int32),
        ("right_in_task", np.bool_),
        ("confidence", np.float32),
        ("truth_probability", np.float32),
        ("brier", np.float32),
        ("novelty", np.float32),
    ]
)

_LEAST = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class ClassFigures:
    """How one class fared.

    Attributes:
        label: The class.
        task: The task that taught it.
        images: Images of it, at least 1.
        accuracy: Share of them that were answered with it.
        mean_probability: Mean probability that they were given of being of this class.
        confused_with: What wrong answers were most often; None if there was none.
        confused_images: How often that was.
    """

    label: str
    task: str
    images: int
    accuracy: float
    mean_probability: float
    confused_with: str | None
    confused_images: int


@dataclass(frozen=True)
class TaskFigures:
    """How the classes of one task fared.

    Attributes:
        task: The task.
        images: Images of its classes, at least 1.
        accuracy: Share of right answers, all classes competing.
        accuracy_task_known: Share of right answers when only the task's own classes compete.
    """

    task: str
    images: int
    accuracy: float
    accuracy_task_known: float


@dataclass(frozen=True)
class Confusion:
    """One kind of error.

    Attributes:
        truth: The class of the images.
        answer: The class that was answered.
        images: How often.
        share: Of the images of ``truth``.
    """

    truth: str
    answer: str
    images: int
    share: float


@dataclass(frozen=True)
class CalibrationBin:
    """The answers of similar confidence.

    Attributes:
        lower: Lower bound of the confidence; itself in the bin only if it is 0.
        upper: Upper bound, itself in the bin.
        images: How many answers, at least 1.
        mean_confidence: Their mean confidence.
        accuracy: Share of them that were right.
    """

    lower: float
    upper: float
    images: int
    mean_confidence: float
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    """How far probabilities can be believed.

    Attributes:
        expected_error: Expected calibration error, 0 to 1; see ``expected_calibration_error``.
        bins: What it was computed from; empty bins are left out.
        negative_log_likelihood: Mean of -ln(probability of the truth). A probability of zero counts
            as the smallest normal float32, so that one image adds at most 87.4.
        brier: Mean over images of the sum over classes of (probability - truth)^2, 0 to 2.
    """

    expected_error: float
    bins: tuple[CalibrationBin, ...]
    negative_log_likelihood: float
    brier: float


@dataclass(frozen=True)
class NoveltyShare:
    """How many images are newer than a threshold.

    Attributes:
        threshold: Novelty.
        known: Share of the images of known classes above it; None if there are no such images.
        unknown: Share of the images of unknown classes above it; None likewise.
    """

    threshold: float
    known: float | None
    unknown: float | None


@dataclass(frozen=True)
class NoveltyFigures:
    """How well novelty tells images of unknown classes from those of known ones.

    Attributes:
        auroc: See ``auroc``; None unless there are images of both kinds.
        shares: One for each of ``NOVELTY_THRESHOLDS``.
    """

    auroc: float | None
    shares: tuple[NoveltyShare, ...]


@dataclass(frozen=True)
class UnknownLabel:
    """A label that the version does not know, and its images."""

    label: str
    images: int


@dataclass(frozen=True)
class Evaluation:
    """How good a version is. All but ``novelty`` is about images of classes that it knows.

    Attributes:
        images: Images of known classes.
        unknown_images: Images of other classes.
        accuracy: Share of right answers, all classes competing; None without images.
        accuracy_task_known: The same with only the classes of the image's task competing.
        mean_class_accuracy: Mean of the accuracies of the classes; None without images.
        classes: The classes that have images, in the order of the class table.
        tasks: Their tasks, in the order of their first class in the table.
        confusions: The most frequent errors, most frequent first.
        calibration: How far probabilities can be believed; None without images.
        novelty: How well unknown images are told from known ones.
        unknown_labels: The labels that the version does not know, in the order of their arrival.
    """

    images: int
    unknown_images: int
    accuracy: float | None
    accuracy_task_known: float | None
    mean_class_accuracy: float | None
    classes: tuple[ClassFigures, ...]
    tasks: tuple[TaskFigures, ...]
    confusions: tuple[Confusion, ...]
    calibration: Calibration | None
    novelty: NoveltyFigures
    unknown_labels: tuple[UnknownLabel, ...]


def best_columns(logits: NDArray[Any], probabilities: NDArray[Any]) -> NDArray[np.intp]:
    """Return the winning column of each row, as ``predictor.top_classes`` ranks them.

    That is by probability, by logit where probabilities are equal, then by position.
    """
    best = probabilities == probabilities.max(axis=1, keepdims=True)
    return np.asarray(np.where(best, logits, -np.inf).argmax(axis=1), np.intp)


def auroc(negatives: ArrayLike, positives: ArrayLike) -> float | None:
    """Return the area under the ROC curve of a score that should be higher for ``positives``.

    It is the probability that a random positive scores higher than a random negative, where equal
    scores count half: 1 tells them apart without error, 0.5 is chance. Only ranks matter.

    Args:
        negatives: (n,) scores.
        positives: (m,) scores.

    Returns:
        0 to 1, or None if either is empty.
    """
    low, high = np.sort(np.asarray(negatives)), np.asarray(positives)
    if not len(low) or not len(high):
        return None
    # Those strictly below count twice, equal ones once: integers, so that nothing is rounded.
    twice = np.searchsorted(low, high, "left") + np.searchsorted(low, high, "right")
    return int(twice.sum()) / (2 * len(low) * len(high))


def calibration_bins(
    confidences: ArrayLike, right: ArrayLike, bins: int = BINS
) -> tuple[CalibrationBin, ...]:
    """Sort answers into bins of equal width, ((m - 1) / M, m / M], and leave out empty ones.

    Args:
        confidences: (n,) probability of each answer, 0 to 1.
        right: (n,) whether it was right.
        bins: M, at least 1.
    """
    confidence = np.asarray(confidences, np.float64)
    edges = np.arange(1, bins + 1) / bins
    index = np.searchsorted(edges[:-1], confidence, "left")
    images = np.bincount(index, minlength=bins)
    sums = np.bincount(index, confidence, bins)
    hits = np.bincount(index, np.asarray(right, np.float64), bins)
    return tuple(
        CalibrationBin(
            lower=float(edges[i - 1]) if i else 0.0,
            upper=float(edges[i]),
            images=int(images[i]),
            mean_confidence=float(sums[i] / images[i]),
            accuracy=float(hits[i] / images[i]),
        )
        for i in np.flatnonzero(images)
    )


def expected_calibration_error(confidences: ArrayLike, right: ArrayLike, bins: int = BINS) -> float:
    """Return the mean distance between confidence and accuracy, over bins of confidence.

    Guo, Pleiss, Sun, Weinberger: On Calibration of Modern Neural Networks, ICML 2017, equations 2
    to 5: sum over bins B of |B| / n * |accuracy(B) - confidence(B)|.

    Args:
        confidences: (n,) probability of each answer, 0 to 1; n at least 1.
        right: (n,) whether it was right.
        bins: Bins of equal width, at least 1.

    Returns:
        0 (calibrated) to 1.
    """
    return _calibration_error(calibration_bins(confidences, right, bins))


def _calibration_error(bins: Sequence[CalibrationBin]) -> float:
    distances = sum(part.images * abs(part.accuracy - part.mean_confidence) for part in bins)
    return distances / sum(part.images for part in bins)


class Tally:
    """Counts the answers of one version, batch by batch. Not safe to use from several threads.

    Args:
        classes: The version's class table; position i is logit i.
    """

    def __init__(self, classes: Sequence[ClassEntry]) -> None:
        self._classes = tuple(classes)
        self._positions = positions_by_label(classes)
        tasks: dict[str, list[int]] = {}
        for position, entry in enumerate(self._classes):
            tasks.setdefault(entry.task, []).append(position)
        self._columns = [np.array(columns) for columns in tasks.values()]
        self._task_names = list(tasks)
        self._task_of = np.zeros(len(self._classes), np.intp)
        for task, columns in enumerate(self._columns):
            self._task_of[columns] = task
        self._known = [np.empty(0, _OUTCOME)]
        self._unknown: dict[str, int] = {}
        self._unknown_novelty = [np.empty(0, np.float32)]

    def knows(self, label: str) -> bool:
        """Whether the version knows the class."""
        return label in self._positions

    def add(
        self,
        labels: Sequence[str],
        logits: NDArray[Any],
        probabilities: NDArray[Any],
        novelty: NDArray[Any],
    ) -> None:
        """Count a batch; nothing of the arrays is kept.

        Args:
            labels: The truth about each of the n images.
            logits: (n, classes).
            probabilities: (n, classes), over all classes.
            novelty: (n,).
        """
        rows = [i for i, label in enumerate(labels) if label in self._positions]
        others = [i for i, label in enumerate(labels) if label not in self._positions]
        for i in others:
            self._unknown[labels[i]] = self._unknown.get(labels[i], 0) + 1
        self._unknown_novelty.append(novelty[others].astype(np.float32))
        if rows:
            truth = np.array([self._positions[labels[i]] for i in rows])
            self._known.append(
                self._outcomes(truth, logits[rows], probabilities[rows], novelty[rows])
            )

    def _outcomes(
        self,
        truth: NDArray[np.intp],
        logits: NDArray[Any],
        probabilities: NDArray[Any],
        novelty: NDArray[Any],
    ) -> NDArray[np.void]:
        each = np.arange(len(truth))
        outcomes = np.zeros(len(truth), _OUTCOME)
        answer = best_columns(logits, probabilities)
        outcomes["truth"] = truth
        outcomes["answer"] = answer
        outcomes["confidence"] = probabilities[each, answer]
        of_truth = probabilities[each, truth].astype(np.float64)
        outcomes["truth_probability"] = of_truth
        squares = np.einsum("ij,ij->i", probabilities, probabilities, dtype=np.float64)
        # What rounding leaves of a difference may be negative, and a score is not.
        outcomes["brier"] = np.maximum(squares - of_truth**2, 0) + (1 - of_truth) ** 2
        outcomes["novelty"] = novelty
        for task in np.unique(self._task_of[truth]):
            of_task = np.flatnonzero(self._task_of[truth] == task)
            columns = self._columns[task]
            winners = columns[logits[np.ix_(of_task, columns)].argmax(axis=1)]
            outcomes["right_in_task"][of_task] = winners == truth[of_task]
        return outcomes

    def evaluation(self, confusions: int) -> Evaluation:
        """Return the figures of all that was counted.

        Args:
            confusions: How many kinds of errors to return at most.
        """
        known = np.concatenate(self._known)
        right = known["truth"] == known["answer"]
        errors = self._errors(known)
        classes = self._class_figures(known, right, errors)
        return Evaluation(
            images=len(known),
            unknown_images=sum(self._unknown.values()),
            accuracy=_share(right),
            accuracy_task_known=_share(known["right_in_task"]),
            mean_class_accuracy=_share([figures.accuracy for figures in classes]),
            classes=classes,
            tasks=self._task_figures(known, right),
            confusions=tuple(errors[:confusions]),
            calibration=_calibration(known, right) if len(known) else None,
            novelty=_novelty_figures(known["novelty"], np.concatenate(self._unknown_novelty)),
            unknown_labels=tuple(UnknownLabel(*item) for item in self._unknown.items()),
        )

    def _errors(self, known: NDArray[np.void]) -> list[Confusion]:
        """Return all kinds of errors, most frequent first, then by position in the class table."""
        size = len(self._classes)
        images = np.bincount(known["truth"], minlength=size)
        wrong = known[known["truth"] != known["answer"]]
        pairs, counts = np.unique(
            wrong["truth"].astype(np.int64) * size + wrong["answer"], return_counts=True
        )
        order = np.argsort(-counts, kind="stable")
        return [
            Confusion(
                truth=self._classes[pair // size].label,
                answer=self._classes[pair % size].label,
                images=count,
                share=count / int(images[pair // size]),
            )
            for pair, count in zip(pairs[order].tolist(), counts[order].tolist(), strict=True)
        ]

    def _class_figures(
        self, known: NDArray[np.void], right: NDArray[np.bool_], errors: Sequence[Confusion]
    ) -> tuple[ClassFigures, ...]:
        size = len(self._classes)
        images = np.bincount(known["truth"], minlength=size)
        hits = np.bincount(known["truth"], right, size)
        probability = np.bincount(known["truth"], known["truth_probability"], size)
        worst: dict[str, Confusion] = {}
        for error in errors:
            worst.setdefault(error.truth, error)
        result = []
        for i in np.flatnonzero(images):
            entry, count = self._classes[i], int(images[i])
            error_of_class = worst.get(entry.label)
            result.append(
                ClassFigures(
                    label=entry.label,
                    task=entry.task,
                    images=count,
                    accuracy=float(hits[i] / count),
                    mean_probability=float(probability[i] / count),
                    confused_with=error_of_class.answer if error_of_class else None,
                    confused_images=error_of_class.images if error_of_class else 0,
                )
            )
        return tuple(result)

    def _task_figures(
        self, known: NDArray[np.void], right: NDArray[np.bool_]
    ) -> tuple[TaskFigures, ...]:
        size = len(self._task_names)
        task = self._task_of[known["truth"]]
        images = np.bincount(task, minlength=size)
        hits = np.bincount(task, right, size)
        hits_in_task = np.bincount(task, known["right_in_task"], size)
        return tuple(
            TaskFigures(
                task=self._task_names[i],
                images=int(images[i]),
                accuracy=float(hits[i] / images[i]),
                accuracy_task_known=float(hits_in_task[i] / images[i]),
            )
            for i in np.flatnonzero(images)
        )


def _calibration(known: NDArray[np.void], right: NDArray[np.bool_]) -> Calibration:
    bins = calibration_bins(known["confidence"], right)
    probability = known["truth_probability"].astype(np.float64)
    return Calibration(
        expected_error=_calibration_error(bins),
        bins=bins,
        negative_log_likelihood=float(-np.log(np.maximum(probability, _LEAST)).mean()),
        brier=float(known["brier"].mean(dtype=np.float64)),
    )


def _novelty_figures(known: NDArray[np.float32], unknown: NDArray[np.float32]) -> NoveltyFigures:
    # In float64, as whoever reads a novelty and compares it with 0.9 does.
    old, new = known.astype(np.float64), unknown.astype(np.float64)
    shares = tuple(
        NoveltyShare(threshold, _share(old > threshold), _share(new > threshold))
        for threshold in NOVELTY_THRESHOLDS
    )
    return NoveltyFigures(auroc(old, new), shares)


def _share(values: ArrayLike) -> float | None:
    """Return the mean, None of nothing."""
    array = np.asarray(values, np.float64)
    return float(array.mean()) if len(array) else None
