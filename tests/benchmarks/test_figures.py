"""Figures, and the heads of the study, on data whose answers are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.benchmarks import figures, head_study
from tests.benchmarks.head_study import Gram, RidgeHead, Statistics, TaskFeatures


def one_hot(answers: list[int], classes: int) -> np.ndarray:
    return np.eye(classes)[answers]


TRUTH = np.array([0, 0, 1, 1, 2, 2])
SIZES = [1, 1, 1]
STAGES = [
    one_hot([0] * 6, 1),
    one_hot([0, 1, 1, 1, 0, 0], 2),
    one_hot([0, 2, 2, 2, 2, 0], 3),
]


def test_the_figures_of_a_stream() -> None:
    found = figures.summarise(STAGES, TRUTH, SIZES)
    assert found["matrix"] == [[1.0], [0.5, 1.0], [0.5, 0.0, 0.5]]
    assert found["seen"] == [1.0, 0.75, pytest.approx(1 / 3)]
    assert found["final"] == pytest.approx(1 / 3)
    assert found["average"] == pytest.approx((1 + 0.75 + 1 / 3) / 3)
    # The first task was at 1 and ends at 0.5, the second at 1 and ends at 0.
    assert found["forgetting"] == pytest.approx(0.75)
    assert found["task_known"] == 1.0, "one class a task"


def test_nothing_is_forgotten_by_a_single_task() -> None:
    assert figures.forgetting([[0.4]]) == 0


def test_a_task_that_gets_better_was_not_forgotten() -> None:
    assert figures.forgetting([[0.5], [0.7, 0.9]]) == pytest.approx(-0.0)


def test_with_the_task_known_other_tasks_do_not_compete() -> None:
    scores = np.array([[0.1, 0.2, 9.0], [0.3, 0.2, 9.0], [9.0, 9.0, 0.1]])
    truth = np.array([1, 1, 2])
    assert figures.accuracy_task_known(scores, truth, [2, 1]) == pytest.approx(2 / 3)
    assert figures.accuracy(scores, truth) == 0


def test_calibration_error_of_known_cases() -> None:
    sure = one_hot([0, 1, 1, 1], 2)
    assert figures.calibration_error(sure, np.array([0, 1, 1, 1])) == 0
    assert figures.calibration_error(sure, np.array([1, 0, 0, 0])) == 1
    even = np.full((4, 2), 0.5)
    assert figures.calibration_error(even, np.array([0, 0, 1, 1])) == 0
    # Images of classes that are not learned yet are left out.
    assert figures.calibration_error(sure, np.array([0, 7, 7, 7])) == 0


@given(st.lists(st.integers(0, 5), min_size=1), st.lists(st.integers(0, 5), min_size=1))
def test_auroc_counts_pairs(known: list[int], new: list[int]) -> None:
    pairs = [(a > b) + 0.5 * (a == b) for a in new for b in known]
    scores = np.array(known + new, float)
    is_new = np.arange(len(scores)) >= len(known)
    assert figures.auroc(scores, is_new) == pytest.approx(np.mean(pairs))


def test_auroc_needs_both_kinds() -> None:
    assert figures.auroc(np.ones(3), np.zeros(3, bool)) is None


def test_a_mean_lacks_when_a_value_lacks() -> None:
    assert figures.mean([1.0, 2.0]) == 1.5
    assert figures.mean([1.0, None]) is None
    assert figures.mean([]) is None


# -- heads ----------------------------------------------------------------------------------------

SIZE, EACH, CLASSES = 12, 40, 6
TASKS = [2, 2, 2]


def generated(moved: np.ndarray | None = None, seed: int = 0) -> tuple[list[TaskFeatures], tuple]:
    """Three tasks of two Gaussian classes, correlated features; ``moved`` after each task."""
    generator = np.random.default_rng(seed)
    means = 2.2 * generator.standard_normal((CLASSES, SIZE))
    mix = generator.standard_normal((SIZE, SIZE)) / np.sqrt(SIZE) + np.eye(SIZE)
    moved = np.zeros(SIZE) if moved is None else moved

    def draw(labels: np.ndarray) -> np.ndarray:
        return means[labels] + generator.standard_normal((len(labels), SIZE)) @ mix

    tasks = []
    for number in range(3):
        labels = np.repeat([2 * number, 2 * number + 1], EACH)
        before = draw(labels) + moved * number
        after = before + moved
        tasks.append(TaskFeatures(before.astype("f4"), after.astype("f4"), labels))
    labels = np.repeat(np.arange(CLASSES), EACH)
    return tasks, ((draw(labels) + 3 * moved).astype("f4"), labels)


def fresh_of(tasks: list[TaskFeatures], moved: np.ndarray) -> list[np.ndarray]:
    return [task.after + moved * (2 - number) for number, task in enumerate(tasks)]


def test_statistics_add_up_over_tasks() -> None:
    tasks, _ = generated()
    whole = Statistics.empty(CLASSES, SIZE).plus(
        np.concatenate([task.after for task in tasks]),
        np.concatenate([task.labels for task in tasks]),
    )
    parts = head_study.stored(tasks, CLASSES)
    assert np.allclose(parts.means, whole.means)
    assert np.allclose(parts.scatter, whole.scatter)
    assert parts.counts.tolist() == [EACH] * CLASSES
    assert np.trace(parts.covariance) > 0


def test_lda_is_the_shared_gaussians_posterior() -> None:
    tasks, (features, _) = generated()
    statistics = head_study.stored(tasks, CLASSES)
    size = len(statistics.covariance)
    covariance = statistics.covariance + 0.1 * statistics.covariance.trace() / size * np.eye(size)
    inverse = np.linalg.inv(covariance)
    deviations = features[:, None] - statistics.means
    log_density = -0.5 * np.einsum("nce,ef,ncf->nc", deviations, inverse, deviations)
    expected = figures.softmax(log_density)
    found = figures.softmax(head_study.lda(statistics, features, 0.1))
    assert np.allclose(found, expected, atol=1e-6)


def test_regression_is_that_on_indicators() -> None:
    """With as many images of every class, on the images themselves."""
    tasks, (queries, _) = generated()
    features = np.concatenate([task.after for task in tasks]).astype(np.float64)
    labels = np.concatenate([task.labels for task in tasks])
    made = head_study.stored(tasks, CLASSES)
    free = len(labels) - CLASSES
    # The covariance is over degrees of freedom, what lies between the classes over classes.
    made = replace(made, scatter=made.scatter * free / len(labels))
    centre = features.mean(0)
    rows = features - centre
    gram = rows.T @ rows / len(rows)
    penalty = 0.1 * np.trace(gram) / SIZE * np.eye(SIZE)
    targets = rows.T @ np.eye(CLASSES)[labels] / len(rows) * CLASSES
    expected = (queries - centre) @ np.linalg.solve(gram + penalty, targets)
    assert np.allclose(head_study.regression(made, queries, 0.1), expected, atol=1e-5)


def test_heads_over_the_stream() -> None:
    moved = np.linspace(-1, 1, SIZE)
    tasks, (features, labels) = generated(moved)
    # Test images are drawn under the last backbone; the drift is the same for all images.
    tests = [features - moved * (2 - number) for number in range(3)]
    found = head_study.over_the_stream(tasks, tests, labels, TASKS)
    for name, figure in found.items():
        assert figure["final"] > 0.85, name
        assert figure["average"] >= figure["final"] - 0.02, name
        assert figure["forgetting"] < 0.15, name


def test_gram_matrices_add_up_over_tasks() -> None:
    generator = np.random.default_rng(0)
    rows, labels = generator.standard_normal((30, 8)), generator.integers(0, 3, 30)
    whole = Gram.empty(8, 3).plus(rows, labels)
    parts = Gram.empty(8, 3).plus(rows[:11], labels[:11]).plus(rows[11:], labels[11:])
    assert np.allclose(parts.solve(0.1), whole.solve(0.1))
    penalty = 0.1 * np.trace(rows.T @ rows) / 8
    expected = np.linalg.solve(rows.T @ rows + penalty * np.eye(8), rows.T @ np.eye(3)[labels])
    assert np.allclose(whole.solve(0.1), expected)


def test_the_ridge_is_chosen_without_the_test_images() -> None:
    tasks, (features, labels) = generated()
    head = RidgeHead.empty(SIZE, CLASSES, 200)
    for number, task in enumerate(tasks):
        head = head.learn(task.after, task.labels, seed=number)
    assert len(head.held_out[1]) == len(tasks[-1].labels) // 5
    assert set(head.held_out[1]) == {4, 5}
    assert head.ridge in head_study.RIDGES
    assert figures.accuracy(head.scores(features, CLASSES), labels) > 0.9
    assert head.scores(features, 4).shape == (len(features), 4)


def test_few_images_are_not_held_out() -> None:
    assert not head_study.held_out(np.repeat([0, 1], 4), 0).any()
    assert head_study.held_out(np.repeat([0, 1], 5), 0).sum() == 2


@pytest.mark.parametrize("logit_norm", [None, 0.1])
def test_the_gradient_of_the_aligned_loss(logit_norm: float | None) -> None:
    generator = np.random.default_rng(0)
    logits = generator.standard_normal((4, CLASSES))
    targets = np.eye(CLASSES)[generator.integers(0, CLASSES, 4)]

    def loss(values: np.ndarray) -> float:
        if logit_norm is not None:
            norms = [np.linalg.norm(values[:, i : i + 2], axis=1) + 1e-7 for i in (0, 2, 4)]
            values = values / np.mean(norms, axis=0)[:, None] / logit_norm
        return float(-(np.log(figures.softmax(values)) * targets).sum())

    found = head_study._loss_gradient(logits, targets, TASKS, logit_norm)
    for index in np.ndindex(logits.shape):
        step = np.zeros_like(logits)
        step[index] = 1e-5
        slope = (loss(logits + step) - loss(logits - step)) / 2e-5
        assert found[index] == pytest.approx(slope, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("logit_norm", [None, 0.1])
def test_aligned_heads_come_near_to_lda(logit_norm: float | None) -> None:
    tasks, (features, labels) = generated()
    statistics = head_study.stored(tasks, CLASSES)
    lda = figures.accuracy(head_study.lda(statistics, features, 0.1), labels)
    scores = head_study.aligned(statistics, features, TASKS, logit_norm)
    assert figures.accuracy(scores, labels) > lda - 0.03 > 0.85


def test_a_common_drift_is_compensated() -> None:
    moved = np.linspace(-2, 2, SIZE)
    tasks, _ = generated(moved)
    fresh = [TaskFeatures(x, x, t.labels) for x, t in zip(fresh_of(tasks, moved), tasks)]  # noqa: B905
    true = head_study.stored(fresh, CLASSES)
    lost = head_study.drift(head_study.stored(tasks, CLASSES), true)
    assert lost["means"] > 0.5
    left = head_study.drift(head_study.compensated(tasks, CLASSES, head_study.semantic_shift), true)
    assert left["means"] < 1e-5
    assert left["covariance"] < 1e-5


def test_a_drift_that_is_a_linear_map_is_followed() -> None:
    """Also where the new images do not lie: there the nearest ones say nothing."""
    generator = np.random.default_rng(0)
    before = generator.standard_normal((4000, SIZE))
    task = TaskFeatures(before, 1.1 * before, np.zeros(len(before), int))
    old = 3 * generator.standard_normal((5, SIZE))
    moved = head_study.linear_shift(old, task)
    # The ridge is as large as the images' mean square over all of them, so half is followed.
    assert np.allclose(moved, 0.05 * old, atol=0.02)


def test_the_study_has_every_head_on_every_statistics() -> None:
    moved = np.linspace(-1, 1, SIZE)
    tasks, test = generated(moved)
    found = head_study.study(tasks, fresh_of(tasks, moved), test, TASKS, random_features=100)
    for name, kinds in found["heads"].items():
        expected = {"stored", "fresh"} if "ridge on" in name or "mean of" in name else None
        assert kinds.keys() == (expected or {"stored", "fresh", "sdc", "linear"}), name
        for figure in kinds.values():
            assert 0 <= figure["ece"] <= 1
        assert kinds["fresh"]["accuracy"] > 0.85, name
        # Without drift in the statistics, compensation has nothing left to do.
        if expected is None:
            assert kinds["sdc"]["accuracy"] == pytest.approx(kinds["fresh"]["accuracy"], abs=0.03)
    assert found["drift"]["stored"]["means"] > found["drift"]["sdc"]["means"]


def test_new_classes_look_new() -> None:
    tasks, test = generated()
    found = head_study.novelty_study(tasks[:2], test, TASKS[:2], random_features=100)
    assert found["Mahalanobis"] > 0.9
    assert all(value is not None and 0 <= value <= 1 for value in found.values())
