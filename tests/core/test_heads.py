"""Class statistics, the head that is made of them, and what it says of itself."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.covariance import oas
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge

from inflora_core.heads import (
    EXAMINED_IMAGES,
    LARGEST_LOGIT,
    LEAST_VARIANCE,
    ClassStatistics,
    Discriminant,
    Examined,
    accuracy,
    answering,
    cross_entropy,
    examine,
    fit_temperature,
    leave_one_out,
    novelty_knots,
    novelty_of,
    novelty_scores,
    novelty_shares,
    pooled,
    spread,
    teaching_temperature,
    temperature_of,
)
from inflora_core.model import Array, Calibration, ClassEntry, ContinualModel, HeldOut
from inflora_core.training import random_head

SEEDS = st.integers(0, 2**31)


def untaught(size: int) -> ClassStatistics:
    return ClassStatistics.of(ContinualModel.untaught({}, size))


def clusters(seed: int, counts: list[int], size: int, apart: float = 3.0) -> tuple[Array, Array]:
    """Gaussian features (n, size) with one covariance, and their classes."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(size, size))
    labels = np.repeat(np.arange(len(counts)), counts)
    means = apart * rng.normal(size=(len(counts), size))
    return means[labels] + rng.normal(size=(len(labels), size)) @ mixing, labels


def statistics(seed: int, counts: list[int], size: int) -> ClassStatistics:
    features, labels = clusters(seed, counts, size)
    return untaught(size).with_images(features, labels, len(counts))


# -- what is kept -------------------------------------------------------------------------------


@given(SEEDS, st.lists(st.integers(2, 9), min_size=2, max_size=6), st.data())
def test_statistics_of_images_add_up(seed: int, counts: list[int], data: st.DataObject) -> None:
    """However they are cut into tasks: by classes, or through the middle of a class."""
    features, labels = clusters(seed, counts, 5)
    whole = untaught(5).with_images(features, labels, len(counts))
    for column, count in enumerate(counts):
        rows = features[labels == column]
        np.testing.assert_allclose(whole.means[column], rows.mean(0), rtol=1e-5, atol=1e-5)
        assert whole.counts[column] == count
    cut = data.draw(st.lists(st.booleans(), min_size=len(labels), max_size=len(labels)))
    first = np.array(cut)
    parts = untaught(5)
    for part in (first, ~first):
        known = max(len(parts.means), *(labels[part] + 1), 0) if part.any() else len(parts.means)
        parts = parts.with_images(features[part], labels[part], int(known))
    np.testing.assert_allclose(parts.means, whole.means, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(parts.counts, counts)
    np.testing.assert_allclose(parts.scatter, whole.scatter, rtol=1e-3, atol=1e-2)
    assert parts.freedom == sum(counts) - len(counts)


@given(SEEDS, st.integers(2, 400), st.integers(3, 8))
def test_shrinkage_needs_no_tuning(seed: int, images: int, size: int) -> None:
    """Between nothing and everything, and near scikit-learn's, which leaves terms of 1/size out."""
    features, labels = clusters(seed, [images], size)
    made = untaught(size).with_images(features, labels, 1)
    covariance, shrinkage = made.covariance()
    assert 0 <= shrinkage <= 1
    assert np.linalg.eigvalsh(covariance).min() > 0
    # The floor under every variance, which two images that are nearly alike do notice.
    floor = size * LEAST_VARIANCE * float(np.mean(made.means**2))
    trace = np.trace(made.scatter) / made.freedom + floor
    assert np.trace(covariance) == pytest.approx(trace, rel=1e-5)
    if images > 200 and size >= 6:
        _, theirs = oas(features - features.mean(0), assume_centered=True)
        assert shrinkage == pytest.approx(theirs, abs=0.03)


def test_shrinkage_falls_with_the_images() -> None:
    shares = [statistics(0, [n] * 4, 16).covariance()[1] for n in (2, 10, 100, 10_000)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.2
    assert shares[-1] < 0.001


@given(SEEDS)
def test_means_follow_a_drift_that_is_linear(seed: int) -> None:
    """The task's images say where the features went; classes that are not among them follow."""
    rng = np.random.default_rng(seed)
    old, _ = clusters(seed, [50] * 4, 6)
    known = statistics(seed + 1, [30] * 5, 6)
    movement = 0.3 * rng.normal(size=(6, 6))
    moved = known.drifted(old, old + old @ movement)
    true = known.means + known.means @ movement
    before = np.linalg.norm(known.means - true)
    # The ridge pulls towards staying, so not all of the way.
    assert np.linalg.norm(moved.means - true) < before
    np.testing.assert_array_equal(moved.counts, known.counts)


def test_features_that_stay_move_no_means() -> None:
    features, _ = clusters(0, [20] * 3, 6)
    known = statistics(1, [10] * 4, 6)
    assert known.drifted(features, features).means.tobytes() == known.means.tobytes()
    assert untaught(6).drifted(features, features + 1).means.shape == (0, 6)


# -- the head -----------------------------------------------------------------------------------


def test_the_head_is_a_mean_of_analysis_and_regression() -> None:
    """Each as scikit-learn has it, the second brought to the size of the first within a class."""
    counts = [400, 400, 400, 400]
    features, labels = clusters(0, counts, 6)
    made = untaught(6).with_images(features, labels, 4)
    covariance, shrinkage = made.covariance()
    analysis = LinearDiscriminantAnalysis("lsqr", shrinkage=shrinkage, priors=[0.25] * 4)
    first = analysis.fit(features, labels).decision_function(features)
    sphere = shrinkage * np.trace(covariance) / 6 * len(features)
    regression = Ridge(sphere).fit(features, np.eye(4)[labels])
    second = regression.predict(features)
    within = [
        array - np.stack([array[labels == c].mean(0) for c in range(4)])[labels]
        for array in (first, second)
    ]
    second *= (within[0] * within[1]).sum() / (within[1] ** 2).sum()
    expected = 0.6 * first + 0.4 * second
    logits = Discriminant.of(made).logits(features)
    # An equal amount for all classes is nobody's business.
    difference = logits - expected
    difference -= difference.mean(1, keepdims=True)
    assert np.abs(difference).max() < 0.03 * np.abs(logits).max()
    assert (logits.argmax(1) == expected.argmax(1)).mean() > 0.995


@given(SEEDS, st.integers(2, 6))
def test_one_image_a_class_is_enough_to_know_it_again(seed: int, classes: int) -> None:
    features, labels = clusters(seed, [1] * classes, 8)
    discriminant = Discriminant.of(untaught(8).with_images(features, labels, classes))
    assert (discriminant.logits(features).argmax(1) == labels).all()


@given(SEEDS, st.lists(st.integers(2, 40), min_size=3, max_size=5))
def test_the_number_of_images_is_no_prior(seed: int, counts: list[int]) -> None:
    """The same statistics, with other counts of images behind the means."""
    made = statistics(seed, counts, 5)
    other = replace(made, counts=made.counts[::-1])
    assert np.array_equal(Discriminant.of(made).weight, Discriminant.of(other).weight)
    assert np.array_equal(Discriminant.of(made).bias, Discriminant.of(other).bias)


def test_logits_stay_small_however_easy_the_classes_are() -> None:
    features, labels = clusters(0, [50, 50, 50], 6)
    means = np.stack([features[labels == c].mean(0) for c in range(3)])
    easy = means[labels] + 1e-3 * (features - means[labels])
    made = untaught(6).with_images(easy, labels, 3)
    weight, bias = Discriminant.of(made).divided(made.means, 1.0)
    logits = easy @ weight.T + bias
    assert np.abs(logits).max() < 1.1 * LARGEST_LOGIT
    assert (logits.argmax(1) == labels).all()


def test_a_single_class_has_a_head_of_zeros() -> None:
    discriminant = Discriminant.of(statistics(0, [5], 4))
    assert not discriminant.weight.any()
    assert not discriminant.bias.any()


def test_a_random_head_depends_on_its_seed_alone() -> None:
    torch.manual_seed(1)
    first = random_head(4, 3, seed=7).weight
    torch.manual_seed(2)
    assert torch.equal(first, random_head(4, 3, seed=7).weight)
    assert not torch.equal(first, random_head(4, 3, seed=8).weight)
    state = torch.random.get_rng_state()
    random_head(4, 3, seed=9)
    assert torch.equal(state, torch.random.get_rng_state())


# -- leaving out --------------------------------------------------------------------------------


@given(SEEDS, st.lists(st.integers(1, 6), min_size=2, max_size=4))
def test_leaving_out_is_as_if_the_image_had_never_been(seed: int, counts: list[int]) -> None:
    """Against statistics made without it, at the same shrinkage, centre and freedom."""
    features, labels = clusters(seed, counts, 3)
    made = untaught(3).with_images(features, labels, len(counts))
    logits, scores, kept = leave_one_out(made, features, labels)
    assert kept.tolist() == [i for i, c in enumerate(labels) if counts[c] > 1]
    assert len(logits) == len(scores) == len(kept)
    covariance, shrinkage = made.covariance()
    discriminant = Discriminant.of(made)
    centre, scale = discriminant.centre, discriminant.scale
    for row, index in enumerate(kept):
        others = np.arange(len(labels)) != index
        rest = untaught(3).with_images(features[others], labels[others], len(counts))
        lost = (made.scatter - rest.scatter).astype(np.float64) / max(made.freedom, 1)
        without = covariance - (1 - shrinkage) * lost
        if np.linalg.eigvalsh(without).min() < 1e-2 * np.linalg.eigvalsh(covariance).min():
            continue  # the image alone spans a direction: a gain is held back there
        means = rest.means - centre
        analysis = np.linalg.solve(without, means.T)
        # The centre is that of all images: what B' is made around.
        total = without + means.T @ means / len(counts)
        regression = np.linalg.solve(total, means.T)
        expected = (features[index] - centre) @ (0.6 * analysis + 0.4 * scale * regression)
        expected -= 0.3 * (analysis * means.T).sum(0)
        np.testing.assert_allclose(logits[row], expected, rtol=2e-2, atol=2e-2)


def test_leaving_out_tells_what_training_images_hide() -> None:
    """30 images in 24 dimensions: each is right about itself, and knows nothing of the others."""
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(30, 24)), np.arange(30) % 3
    made = untaught(24).with_images(features, labels, 3)
    fooled = accuracy(Discriminant.of(made).logits(features), labels)
    logits, _, kept = leave_one_out(made, features, labels)
    honest = accuracy(logits, labels[kept])
    assert fooled is not None
    assert honest is not None
    assert fooled > 0.8
    assert honest < 0.6


# -- probabilities ------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(SEEDS, st.floats(0.7, 30))
def test_the_temperature_of_calibrated_logits_is_found(seed: int, temperature: float) -> None:
    rng = np.random.default_rng(seed)
    logits = 2 * rng.normal(size=(4000, 5))
    odds = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = (odds.cumsum(1) > rng.random((4000, 1))).argmax(1)
    found = fit_temperature(temperature * logits, labels)
    assert found == pytest.approx(temperature, rel=0.15)


@given(SEEDS, st.floats(0.05, 0.9), st.floats(1, 1e4))
def test_a_teaching_head_is_as_unsure_as_it_is_asked_to_be(
    seed: int, share: float, sharpness: float
) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 6, 200)
    logits = sharpness * (np.eye(6)[labels] + 0.3 * rng.normal(size=(200, 6)))
    temperature = teaching_temperature(logits, labels, share)
    loss = cross_entropy(logits, labels, temperature)
    if temperature > fit_temperature(logits, labels):
        assert loss == pytest.approx(share * math.log(6), rel=1e-3)
    else:
        assert loss >= share * math.log(6)


# -- novelty ------------------------------------------------------------------------------------


def model_of(made: ClassStatistics, calibration: Calibration | None = None) -> ContinualModel:
    blank = ContinualModel.untaught({}, len(made.scatter))
    classes = tuple(ClassEntry(f"class {i}", "task", f"task.{i}") for i in range(len(made.means)))
    return answering(replace(blank, classes=classes), made, calibration or blank.calibration)


@given(SEEDS, st.integers(1, 6))
def test_novelty_is_the_angle_to_the_nearest_class(seed: int, classes: int) -> None:
    made = statistics(seed, [20] * classes, 5)
    discriminant = Discriminant.of(made)
    queries = np.random.default_rng(seed).normal(size=(9, 5)) * 5
    scores = novelty_scores(novelty_of(made, discriminant), queries)
    around, means = queries - discriminant.centre, made.means - discriminant.centre
    products = around @ discriminant.precision @ means.T
    sizes = np.sqrt(((around @ discriminant.precision) * around).sum(1))
    lengths = np.sqrt(np.maximum(((means @ discriminant.precision) * means).sum(1), 1e-30))
    if classes > 1:
        expected = 1 - (products / sizes[:, None] / lengths).max(1)
        np.testing.assert_allclose(scores, expected, atol=1e-3)
    else:
        np.testing.assert_allclose(scores, 1, atol=1e-3)


def test_a_novelty_threshold_is_a_share_of_known_images() -> None:
    rng = np.random.default_rng(0)
    features, labels = clusters(0, [300] * 8, 10)
    train = rng.random(len(labels)) < 0.7
    made = untaught(10).with_images(features[train], labels[train], 8)
    model = model_of(made)
    examined = examine(
        model,
        made,
        (features[train], labels[train]),
        (features[~train][::2], labels[~train][::2]),
        from_statistics=True,
    )
    assert examined.method is HeldOut.HELD_OUT
    ready = answering(model, made, pooled(model.calibration, examined))
    known = novelty_shares(ready, features[~train][1::2])
    for threshold in (0.5, 0.8, 0.95):
        assert (known > threshold).mean() == pytest.approx(1 - threshold, abs=0.06)
    strangers = novelty_shares(ready, 6 * rng.normal(size=(200, 10)))
    assert strangers.mean() > known.mean() + 0.25
    assert ((known >= 0) & (known <= 1)).all()


def test_however_small_the_tasks_their_calibration_is_that_of_all_images() -> None:
    """The likeliest temperature of four images is 0.5 as a rule; a mean of such says nothing."""
    rng = np.random.default_rng(0)
    logits = 6 * rng.normal(size=(240, 4))
    odds = np.exp(logits / 3)
    odds /= odds.sum(1, keepdims=True)
    labels = (odds.cumsum(1) > rng.random((240, 1))).argmax(1)
    scores = rng.random(240)
    whole = Examined(HeldOut.HELD_OUT, logits, labels, scores)
    at_once, bit_by_bit = pooled(Calibration.untaught(), whole), Calibration.untaught()
    for start in range(0, 240, 4):
        part = slice(start, start + 4)
        bit_by_bit = pooled(
            bit_by_bit, Examined(HeldOut.HELD_OUT, logits[part], labels[part], scores[part])
        )
    assert bit_by_bit.images == at_once.images == 240
    np.testing.assert_allclose(bit_by_bit.losses, at_once.losses)
    np.testing.assert_array_equal(bit_by_bit.scores, at_once.scores)
    assert temperature_of(bit_by_bit, 4) == temperature_of(at_once, 4)
    assert temperature_of(at_once, 4) == pytest.approx(fit_temperature(logits, labels), rel=0.06)
    assert temperature_of(at_once, 4) == pytest.approx(3, rel=0.3)
    # More classes, of which nothing was measured yet, ask for larger logits.
    assert temperature_of(at_once, 16) == pytest.approx(temperature_of(at_once, 4) / 2)
    knots = novelty_knots(bit_by_bit)
    np.testing.assert_allclose(knots[1:-1], np.quantile(scores, np.arange(1, 100) / 100), atol=0.02)
    assert (np.diff(knots) >= 0).all()


def test_what_says_nothing_is_not_counted() -> None:
    blank = Calibration.untaught()
    nothing = Examined(HeldOut.NONE, np.zeros((0, 4)), np.zeros(0, int), np.zeros(0))
    assert pooled(blank, nothing) is blank
    one_class = Examined(HeldOut.HELD_OUT, np.zeros((9, 1)), np.zeros(9, int), np.ones(9))
    assert pooled(blank, one_class) is blank
    two = Examined(HeldOut.HELD_OUT, np.eye(2)[[0, 1, 1]], np.array([0, 1, 0]), np.zeros(3))
    assert pooled(blank, two).images == 3
    assert not pooled(blank, two).scores.any(), "cosines of two classes are -1 and 1"


def test_forgetting_leaves_the_shared_covariance_as_it_is() -> None:
    """A forgotten class takes its count along and leaves its share of the scatter."""
    made = statistics(0, [20] * 6, 12)
    left = replace(made, means=made.means[:1], counts=made.counts[:1])
    np.testing.assert_allclose(left.covariance()[0], made.covariance()[0], rtol=1e-3, atol=1e-3)
    assert left.covariance()[1] == pytest.approx(made.covariance()[1], abs=1e-3)
    features, labels = clusters(1, [5, 5], 12)
    again = left.with_images(features, labels + 1, 3)
    assert again.freedom == made.freedom + 8


def test_images_that_repeat_each_other_are_not_infinitely_sure() -> None:
    features = np.repeat(np.random.default_rng(0).normal(size=(3, 5)), 8, axis=0)
    made = untaught(5).with_images(features, np.repeat(np.arange(3), 8), 3)
    discriminant = Discriminant.of(made)
    assert np.abs(discriminant.weight).max() < 1e8
    assert np.isfinite(novelty_of(made, discriminant).whitening).all()
    assert (discriminant.logits(features).argmax(1) == np.repeat(np.arange(3), 8)).all()


def test_every_class_is_examined_whatever_order_images_come_in() -> None:
    alternating = np.arange(4 * EXAMINED_IMAGES) % 2
    counts = np.bincount(alternating[spread(alternating)])
    assert counts.tolist() == [EXAMINED_IMAGES // 2] * 2
    assert sorted(spread(np.arange(7))) == list(range(7))


# -- what held-out figures are of ---------------------------------------------------------------


def test_a_class_too_small_to_hold_out_is_left_out_instead() -> None:
    features, labels = clusters(0, [30, 30, 3], 6)
    held = np.zeros(len(labels), bool)
    held[[0, 1, 31, 32]] = True
    made = untaught(6).with_images(features[~held], labels[~held], 3)
    parts = (features[~held], labels[~held]), (features[held], labels[held])
    assert (
        examine(model_of(made), made, *parts, from_statistics=True).method is HeldOut.LEAVE_ONE_OUT
    )
    assert examine(model_of(made), made, *parts, from_statistics=False).method is HeldOut.HELD_OUT
    with_all = held | (np.arange(len(labels)) == 60)
    parts = (features[~with_all], labels[~with_all]), (features[with_all], labels[with_all])
    examined = examine(model_of(made), made, *parts, from_statistics=True)
    assert examined.method is HeldOut.HELD_OUT
    assert sorted(examined.positions.tolist()) == [0, 0, 1, 1, 2]


def test_no_more_is_examined_than_it_takes() -> None:
    features, labels = clusters(0, [3 * EXAMINED_IMAGES // 2] * 2, 3)
    made = untaught(3).with_images(features, labels, 2)
    empty = np.zeros((0, 3)), np.zeros(0, int)
    examined = examine(model_of(made), made, (features, labels), empty, from_statistics=True)
    assert examined.method is HeldOut.LEAVE_ONE_OUT
    assert len(examined.positions) <= EXAMINED_IMAGES
    assert examined.accuracy() == pytest.approx(1, abs=0.1)
    assert set(examined.positions.tolist()) == {0, 1}


def test_accuracy_among_some_classes() -> None:
    logits = np.array([[3.0, 2.0, 1.0], [0.0, 1.0, 2.0], [5.0, 0.0, 1.0]])
    labels = np.array([1, 2, 2])
    assert accuracy(logits, labels) == pytest.approx(1 / 3)
    assert accuracy(logits, labels, np.array([1, 2])) == 1
    assert accuracy(np.zeros((0, 3)), np.zeros(0, int)) is None
