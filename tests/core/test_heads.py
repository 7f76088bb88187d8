"""Class statistics and the head that is made of them."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor

from inflora_core.heads import LARGEST_LOGIT, RIDGE, ClassStatistics, lda_head, random_head
from inflora_core.model import ContinualModel


def untaught(size: int) -> ClassStatistics:
    return ClassStatistics.of(ContinualModel.untaught({}, size))


def clusters(seed: int, counts: list[int], size: int) -> tuple[Tensor, Tensor]:
    """Gaussian features (n, size) with one covariance, and their classes."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator)
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    means = 3 * torch.randn(len(counts), size, generator=generator)
    noise = torch.randn(len(labels), size, generator=generator) @ mixing
    return (means[labels] + noise).float(), labels


@given(st.integers(0, 2**31), st.lists(st.integers(1, 9), min_size=2, max_size=6), st.data())
def test_statistics_of_tasks_add_up(seed: int, counts: list[int], data: st.DataObject) -> None:
    features, labels = clusters(seed, counts, 5)
    whole = untaught(5).with_classes(features, labels, len(counts))
    cut = data.draw(st.integers(1, len(counts) - 1))
    first = labels < cut
    parts = untaught(5).with_classes(features[first], labels[first], cut)
    parts = parts.with_classes(features[~first], labels[~first] - cut, len(counts) - cut)
    np.testing.assert_allclose(parts.means, whole.means, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(parts.counts, counts)
    np.testing.assert_allclose(parts.scatter, whole.scatter, rtol=1e-4, atol=1e-3)


def test_the_head_is_linear_discriminant_analysis() -> None:
    features, labels = clusters(0, [400, 400, 400, 400], 6)
    statistics = untaught(6).with_classes(features, labels, 4)
    weight, bias = lda_head(statistics)
    ours = (features.numpy() @ weight.T + bias).argmax(1)
    # A ridge of `RIDGE` times the mean variance is, up to scale, this shrinkage.
    shrinkage = RIDGE / (1 + RIDGE)
    reference = LinearDiscriminantAnalysis("lsqr", shrinkage=shrinkage, priors=[0.25] * 4)
    theirs = reference.fit(features.numpy(), labels.numpy()).predict(features.numpy())
    assert (ours == theirs).mean() > 0.999


@given(st.integers(0, 2**31), st.integers(2, 6))
def test_with_one_image_a_class_the_nearest_mean_wins(seed: int, classes: int) -> None:
    features, labels = clusters(seed, [1] * classes, 4)
    weight, bias = lda_head(untaught(4).with_classes(features, labels, classes))
    assert np.isfinite(weight).all()
    queries = torch.randn(20, 4, generator=torch.Generator().manual_seed(seed)) * 4
    distances = torch.cdist(queries, features)
    two = distances.sort(1).values[:, :2]
    clear = (two[:, 1] - two[:, 0]) > 1e-2
    answers = torch.from_numpy(queries.numpy() @ weight.T + bias).argmax(1)
    assert torch.equal(answers[clear], distances.argmin(1)[clear])


def test_logits_stay_small_however_easy_the_classes_are() -> None:
    features, labels = clusters(0, [50, 50, 50], 6)
    means = torch.stack([features[labels == c].mean(0) for c in range(3)])
    easy = means[labels] + 1e-3 * (features - means[labels])
    weight, bias = lda_head(untaught(6).with_classes(easy, labels, 3))
    logits = easy.numpy() @ weight.T + bias
    assert np.abs(logits).max() < 1.1 * LARGEST_LOGIT
    assert (logits.argmax(1) == labels.numpy()).all()


def test_a_single_class_has_a_head_of_zeros() -> None:
    features, labels = clusters(0, [5], 4)
    weight, bias = lda_head(untaught(4).with_classes(features, labels, 1))
    assert not weight.any()
    assert not bias.any()


def test_a_random_head_depends_on_its_seed_alone() -> None:
    torch.manual_seed(1)
    first = random_head(4, 3, seed=7).weight
    torch.manual_seed(2)
    assert torch.equal(first, random_head(4, 3, seed=7).weight)
    assert not torch.equal(first, random_head(4, 3, seed=8).weight)
    state = torch.random.get_rng_state()
    random_head(4, 3, seed=9)
    assert torch.equal(state, torch.random.get_rng_state())
