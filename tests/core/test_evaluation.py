"""Figures of an evaluation: laws of AUROC and calibration, and a tally counted by hand."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inflora_core.evaluation import (
    NOVELTY_THRESHOLDS,
    Evaluation,
    NoveltyFigures,
    Tally,
    auroc,
    best_columns,
    calibration_bins,
    expected_calibration_error,
)
from inflora_core.graph import ModelCard
from inflora_core.model import ClassEntry, Preprocessing, positions_by_label
from inflora_core.predictor import Answers, softmax, top_classes

PREPROCESSING = Preprocessing(8, 8, 8, 8, "bilinear", "squash", (0.0,) * 3, (1.0,) * 3)

SCORES = st.lists(st.integers(-5, 5), min_size=1, max_size=20)
"""Few values, so that there are many equal ones."""

ANSWERS = st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60)
"""Confidences, and whether they were right."""


def unzip(answers: Sequence[tuple[float, bool]]) -> tuple[list[float], list[bool]]:
    return [c for c, _ in answers], [r for _, r in answers]


# -- AUROC --------------------------------------------------------------------------------------


@given(SCORES, SCORES)
def test_auroc_is_the_share_of_pairs_in_the_right_order(low: list[int], high: list[int]) -> None:
    pairs = [(b > a) + (b == a) / 2 for a in low for b in high]
    assert auroc(low, high) == pytest.approx(np.mean(pairs), abs=1e-12)


@given(SCORES, SCORES, st.data())
def test_auroc_knows_only_ranks(low: list[int], high: list[int], data: st.DataObject) -> None:
    values = st.floats(-1e300, 1e300)
    heights = sorted(data.draw(st.lists(values, min_size=11, max_size=11, unique=True)))
    rising = dict(zip(range(-5, 6), heights, strict=True))
    assert auroc([rising[a] for a in low], [rising[b] for b in high]) == auroc(low, high)
    assert auroc(data.draw(st.permutations(low)), high) == auroc(low, high)


@given(SCORES, SCORES)
def test_auroc_turns_over_with_the_sign_and_with_the_sides(low: list[int], high: list[int]) -> None:
    found = auroc(low, high)
    assert found is not None
    assert auroc([-a for a in low], [-b for b in high]) == pytest.approx(1 - found, abs=1e-12)
    assert auroc(high, low) == pytest.approx(1 - found, abs=1e-12)
    assert auroc(low, low) == 0.5


def test_auroc_of_one_side_is_none() -> None:
    assert auroc([], [1.0]) is None
    assert auroc([1.0], []) is None


# -- calibration --------------------------------------------------------------------------------


@given(ANSWERS, st.integers(1, 30))
def test_bins_share_out_all_answers(answers: list[tuple[float, bool]], bins: int) -> None:
    confidences, right = unzip(answers)
    found = calibration_bins(confidences, right, bins)
    assert sum(part.images for part in found) == len(answers)
    assert sum(part.images * part.accuracy for part in found) == pytest.approx(sum(right))
    for part in found:
        inside = [
            (c, r)
            for c, r in answers
            if part.lower < c <= part.upper or (c == 0 and part.lower == 0)
        ]
        assert part.images == len(inside)
        assert part.mean_confidence == pytest.approx(np.mean([c for c, _ in inside]))
        assert part.accuracy == pytest.approx(np.mean([r for _, r in inside]))
        assert part.upper - part.lower == pytest.approx(1 / bins)


@given(ANSWERS, st.integers(1, 30), st.integers(1, 5))
def test_the_calibration_error_is_a_mean_distance(
    answers: list[tuple[float, bool]], bins: int, times: int
) -> None:
    confidences, right = unzip(answers)
    found = expected_calibration_error(confidences, right, bins)
    assert 0 <= found <= 1 + 1e-12
    # Whoever looks closer does not see less: finer bins cut every bin into whole parts.
    assert expected_calibration_error(confidences, right, bins * times) >= found - 1e-12
    assert expected_calibration_error(confidences * times, right * times, bins) == pytest.approx(
        found, abs=1e-12
    )
    assert expected_calibration_error(confidences, right, 1) == pytest.approx(
        abs(np.mean(confidences) - np.mean(right)), abs=1e-12
    )


@given(st.lists(st.integers(1, 12).flatmap(lambda m: st.tuples(st.integers(0, m), st.just(m)))))
def test_whoever_is_right_as_often_as_believed_is_calibrated(groups: list[tuple[int, int]]) -> None:
    groups = [*groups, (1, 1)]
    confidences = [k / m for k, m in groups for _ in range(m)]
    right = [i < k for k, m in groups for i in range(m)]
    assert expected_calibration_error(confidences, right) == pytest.approx(0, abs=1e-12)


def test_the_calibration_error_by_hand() -> None:
    # Bins of 1/15: three answers of 0.95 (one right), one of 0.5 (right).
    found = expected_calibration_error([0.95, 0.95, 0.95, 0.5], [True, False, False, True])
    assert found == pytest.approx((3 * abs(1 / 3 - 0.95) + abs(1 - 0.5)) / 4)
    assert expected_calibration_error([1.0, 1.0], [False, False]) == 1
    assert expected_calibration_error([1.0, 0.0], [True, False]) == 0


# -- the tally ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A class table, and a model's answers about labelled images."""

    classes: list[ClassEntry]
    labels: list[str]
    logits: np.ndarray[Any, Any]
    novelty: np.ndarray[Any, Any]

    @property
    def probabilities(self) -> np.ndarray[Any, Any]:
        return softmax(self.logits)

    def evaluation(self, batches: Sequence[int], confusions: int = 100) -> Evaluation:
        """Count the images batch by batch; ``batches`` says where each begins."""
        tally = Tally(self.classes)
        for rows in np.split(np.arange(len(self.labels)), batches):
            labels = [self.labels[i] for i in rows]
            parts = (self.logits[rows], self.probabilities[rows], self.novelty[rows])
            tally.add(labels, *parts)
        return tally.evaluation(confusions)

    def answers(self, task: str | None = None) -> list[str]:
        """What Predict would answer about each image."""
        if not self.labels:
            return []
        labels, tasks = zip(*((c.label, c.task) for c in self.classes), strict=True)
        card = ModelCard(labels, tasks, 1, PREPROCESSING, (), {})
        embedding = np.zeros((len(self.labels), 1), np.float32)
        answers = Answers(self.logits, self.probabilities, embedding, self.novelty)
        return [scores[0][0] for scores in top_classes(answers, card, 1, task)]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    tasks = draw(st.lists(st.sampled_from(["t1", "t2", "t3"]), min_size=1, max_size=7))
    classes = [ClassEntry(f"class {i}", task, f"key {i}") for i, task in enumerate(tasks)]
    names = [entry.label for entry in classes] + ["stranger", "another"]
    labels = draw(st.lists(st.sampled_from(names), max_size=30))
    # Few values, and some that vanish in a softmax: many equal logits and probabilities.
    logit = st.sampled_from([-300.0, -200.0, -1.0, 0.0, 0.5, 2.0])
    shape = (len(labels), len(classes))
    count = shape[0] * shape[1]
    logits = np.array(draw(st.lists(logit, min_size=count, max_size=count)), np.float32)
    levels = st.sampled_from([0.0, 0.25, 0.5, 0.9, 0.96, 1.0])
    novelty = draw(st.lists(levels, min_size=len(labels), max_size=len(labels)))
    return Case(classes, labels, logits.reshape(shape), np.array(novelty, np.float32))


def mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


@given(cases())
def test_accuracies_are_those_of_counting_answers(case: Case) -> None:
    found = case.evaluation([])
    task_of = {entry.label: entry.task for entry in case.classes}
    known = [
        (truth, answer, case.answers(task_of[truth])[i])
        for i, (truth, answer) in enumerate(zip(case.labels, case.answers(), strict=True))
        if truth in task_of
    ]
    assert found.images == len(known)
    assert found.unknown_images == len(case.labels) - len(known)
    assert found.accuracy == mean([t == a for t, a, _ in known])
    assert found.accuracy_task_known == mean([t == b for t, _, b in known])
    by_class = {
        entry.label: [t == a for t, a, _ in known if t == entry.label] for entry in case.classes
    }
    seen = {label: np.mean(hits) for label, hits in by_class.items() if hits}
    assert [(c.label, c.accuracy) for c in found.classes] == list(seen.items())
    assert [c.images for c in found.classes] == [len(by_class[label]) for label in seen]
    assert [c.task for c in found.classes] == [task_of[label] for label in seen]
    assert found.mean_class_accuracy == (pytest.approx(np.mean([*seen.values()])) if seen else None)
    tasks = [
        t for t in dict.fromkeys(task_of.values()) if any(task_of[x] == t for x, _, _ in known)
    ]
    assert [part.task for part in found.tasks] == tasks
    for part in found.tasks:
        own = [row for row in known if task_of[row[0]] == part.task]
        assert part.images == len(own)
        assert part.accuracy == mean([t == a for t, a, _ in own])
        assert part.accuracy_task_known == mean([t == b for t, _, b in own])
        assert part.accuracy_task_known >= part.accuracy


@given(cases(), st.integers(0, 5))
def test_confusions_are_counted(case: Case, most: int) -> None:
    labels = {entry.label for entry in case.classes}
    pairs = zip(case.labels, case.answers(), strict=True)
    errors = Counter((t, a) for t, a in pairs if t in labels and t != a)
    found = case.evaluation([])
    assert {(e.truth, e.answer): e.images for e in found.confusions} == errors
    counts = [e.images for e in found.confusions]
    assert counts == sorted(counts, reverse=True)
    assert case.evaluation([], most).confusions == found.confusions[:most]
    for error in found.confusions:
        assert error.share == error.images / case.labels.count(error.truth)
    for figures in found.classes:
        own = {answer: n for (truth, answer), n in errors.items() if truth == figures.label}
        assert figures.confused_images == max(own.values(), default=0)
        assert own.get(figures.confused_with or "", 0) == figures.confused_images
        assert (figures.confused_with is None) == (figures.accuracy == 1)


@given(cases())
def test_probabilities_are_measured(case: Case) -> None:
    found = case.evaluation([])
    position = positions_by_label(case.classes)
    rows = [i for i, label in enumerate(case.labels) if label in position]
    for figures in found.classes:
        own = [case.probabilities[i, position[figures.label]] for i in rows]
        own = [p for i, p in zip(rows, own, strict=True) if case.labels[i] == figures.label]
        assert figures.mean_probability == pytest.approx(np.mean(own, dtype=np.float64))
    if not rows:
        assert found.calibration is None
        return
    assert found.calibration is not None
    likelihoods, scores, confidences, right = [], [], [], []
    for i in rows:
        truth = position[case.labels[i]]
        row = case.probabilities[i].astype(float)
        likelihoods.append(-math.log(max(row[truth], 2.0**-126)))
        scores.append(sum((p - (j == truth)) ** 2 for j, p in enumerate(row)))
        confidences.append(row.max())
        right.append(case.answers()[i] == case.labels[i])
    assert found.calibration.negative_log_likelihood == pytest.approx(np.mean(likelihoods))
    assert found.calibration.brier == pytest.approx(np.mean(scores), abs=1e-6)
    assert 0 <= found.calibration.brier <= 2
    assert found.calibration.bins == calibration_bins(confidences, right)
    assert found.calibration.expected_error == expected_calibration_error(confidences, right)


@given(cases())
def test_what_is_unknown_is_counted_apart(case: Case) -> None:
    found = case.evaluation([])
    labels = {entry.label for entry in case.classes}
    strangers = [label for label in case.labels if label not in labels]
    assert [(u.label, u.images) for u in found.unknown_labels] == list(Counter(strangers).items())
    is_known = np.array([label in labels for label in case.labels], bool)
    old, new = case.novelty[is_known].astype(float), case.novelty[~is_known].astype(float)
    assert found.novelty.auroc == auroc(old, new)
    assert [share.threshold for share in found.novelty.shares] == list(NOVELTY_THRESHOLDS)
    for share in found.novelty.shares:
        assert share.known == mean([x > share.threshold for x in old])
        assert share.unknown == mean([x > share.threshold for x in new])
    # Whatever is said of known images is the same without the others.
    kept = [i for i, label in enumerate(case.labels) if label in labels]
    alone = Case(
        case.classes, [case.labels[i] for i in kept], case.logits[kept], case.novelty[kept]
    )
    figures = alone.evaluation([])
    assert figures.classes == found.classes
    assert figures.tasks == found.tasks
    assert figures.confusions == found.confusions
    assert figures.calibration == found.calibration


@given(cases(), st.data())
def test_it_does_not_matter_how_images_are_batched(case: Case, data: st.DataObject) -> None:
    cut = st.integers(0, len(case.labels))
    assert case.evaluation(sorted(data.draw(st.lists(cut, max_size=5)))) == case.evaluation([])


def test_an_alias_means_its_class() -> None:
    tally = Tally(
        [ClassEntry("cat", "t", "t.0", ("Felis", "feline")), ClassEntry("dog", "t", "t.1")]
    )
    assert [tally.knows(name) for name in ("cat", "Felis", "feline", "dog", "eel")] == [
        True, True, True, True, False,
    ]  # fmt: skip


def test_no_image_no_figure() -> None:
    found = Tally([ClassEntry("a", "t", "t.0", ("b",))]).evaluation(20)
    shares = found.novelty.shares
    assert found == Evaluation(
        0, 0, None, None, None, (), (), (), None, NoveltyFigures(None, shares), ()
    )
    assert {(share.known, share.unknown) for share in shares} == {(None, None)}


def test_what_is_kept_of_an_image_does_not_grow_with_the_classes() -> None:
    def kept(classes: int) -> int:
        tally = Tally([ClassEntry(str(i), "t", str(i)) for i in range(classes)])
        logits = np.zeros((64, classes), np.float32)
        tally.add(["0"] * 64, logits, softmax(logits), np.zeros(64, np.float32))
        arrays = [*tally._known, *tally._unknown_novelty]
        assert all(array.base is None for array in arrays)  # a view would keep the whole batch
        return sum(array.nbytes for array in arrays)

    assert kept(1000) == kept(2) < 64 * 32


@given(cases())
def test_the_best_column_is_what_predict_answers_first(case: Case) -> None:
    if case.labels:
        best = best_columns(case.logits, case.probabilities)
        assert [case.classes[i].label for i in best] == case.answers()
