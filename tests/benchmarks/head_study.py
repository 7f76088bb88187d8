"""Heads that could answer, computed from saved features: pure functions on numpy arrays.

One trained run serves them all. ``features`` are (n, e) float32, ``labels`` (n,) positions among
all classes, scores (n, classes): the larger, the more likely.

Every head is made from statistics that a server may keep: they add up over the tasks, and no
feature of a single image is needed again. They differ in what the statistics were measured on:

* ``stored``: each task's images, right after it was learned. What a server has.
* ``fresh``: all images, with the last backbone. What no server can have; the difference is drift.
* ``sdc``, ``linear``: stored, with the means moved by an estimate of the drift.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve

from inflora_core.heads import ClassStatistics, Discriminant
from tests.benchmarks.figures import (
    accuracy,
    auroc,
    calibration_error,
    softmax,
    summarise,
)

Floats = NDArray[Any]
Ints = NDArray[np.integer[Any]]

RANDOM_FEATURES = 2000
RIDGES = tuple(10.0**power for power in range(-6, 2))
"""Of RanPAC, as shares of the mean diagonal entry of the Gram matrix."""
LDA_RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0)
"""As shares of the mean variance of a feature."""
TEMPERATURES = tuple(10.0**power for power in np.linspace(-3, 2, 41))
HELD_OUT = 0.2


@dataclass(frozen=True)
class TaskFeatures:
    """Features of one task's training images.

    Attributes:
        before: (n, e) under the backbone as it was before the task.
        after: (n, e) under the backbone as the task left it.
        labels: (n,)
    """

    before: Floats
    after: Floats
    labels: Ints


@dataclass(frozen=True)
class Statistics:
    """What is kept of the images.

    Attributes:
        means: (classes, e)
        counts: (classes,)
        scatter: (e, e) of all images about their classes' means.
        variances: (classes, e) of each class's features; only Gaussian alignment uses them.
    """

    means: Floats
    counts: Ints
    scatter: Floats
    variances: Floats

    @classmethod
    def empty(cls, classes: int, size: int) -> Statistics:
        """Return the statistics of no image."""
        each = np.zeros((classes, size))
        return cls(each, np.zeros(classes, int), np.zeros((size, size)), each)

    def plus(self, features: Floats, labels: Ints) -> Statistics:
        """Return the statistics with images of classes that had none."""
        rows = features.astype(np.float64)
        means, counts, scatter = self.means.copy(), self.counts.copy(), self.scatter.copy()
        variances = self.variances.copy()
        for label in np.unique(labels):
            mine = rows[labels == label]
            means[label], counts[label] = mine.mean(0), len(mine)
            deviations = mine - means[label]
            scatter += deviations.T @ deviations
            variances[label] = (deviations**2).mean(0)
        return Statistics(means, counts, scatter, variances)

    @property
    def covariance(self) -> Floats:
        """Shared covariance (e, e)."""
        return self.scatter / max(int(self.counts.sum() - (self.counts > 0).sum()), 1)

    def first(self, classes: int) -> Statistics:
        """Return the statistics with the first ``classes`` alone."""
        parts = (self.means[:classes], self.counts[:classes], self.variances[:classes])
        return Statistics(parts[0], parts[1], self.scatter, parts[2])


def nearest_mean(statistics: Statistics, features: Floats) -> Floats:
    """Score by the negative squared distance to each class's mean."""
    return -squared_distances(features, statistics.means)


def squared_distances(rows: Floats, centres: Floats) -> Floats:
    """Return the squared distance (n, m) of each of ``rows`` (n, e) to each of ``centres``."""
    rows, centres = rows.astype(np.float64), centres.astype(np.float64)
    squares = (rows**2).sum(1)[:, None] + (centres**2).sum(1)[None]
    return np.maximum(squares - 2 * rows @ centres.T, 0)


def lda(statistics: Statistics, features: Floats, ridge: float) -> Floats:
    """Score by linear discriminant analysis with equal priors and a shared covariance."""
    covariance = statistics.covariance
    size = len(covariance)
    covariance = covariance + ridge * (covariance.trace() / size or 1.0) * np.eye(size)
    centre = statistics.means.mean(0)
    weight = cho_solve(cho_factor(covariance), (statistics.means - centre).T)
    bias = -0.5 * (weight * (statistics.means + centre).T).sum(0)
    return features @ weight + bias


def regression(statistics: Statistics, features: Floats, ridge: float) -> Floats:
    """Score by ridge regression on which class it is, as if all had as many images."""
    means, size = statistics.means, statistics.means.shape[1]
    centre = means.mean(0)
    between = (means - centre).T @ (means - centre) / len(means)
    total = statistics.covariance + between
    total = total + ridge * (total.trace() / size or 1.0) * np.eye(size)
    return (features - centre) @ cho_solve(cho_factor(total), (means - centre).T)


def ours(statistics: Statistics, features: Floats) -> Floats:
    """Score by what answers by default: a mean of the two, the second brought to size."""
    kept = ClassStatistics(
        statistics.means,
        statistics.counts.astype(np.int64),
        statistics.scatter,
        int(statistics.counts.sum() - (statistics.counts > 0).sum()),
    )
    return Discriminant.of(kept).logits(features)


def random_weights(size: int, seed: int = 0, count: int = RANDOM_FEATURES) -> Floats:
    """Return the fixed projection (e, count) of the random features, float32."""
    generator = np.random.default_rng(seed)
    return generator.standard_normal((size, count), np.float32)


def expand(features: Floats, weights: Floats) -> Floats:
    """Return the random features (n, count) after a ReLU, float64."""
    return np.maximum(features @ weights, 0).astype(np.float64)


@dataclass(frozen=True)
class Gram:
    """What a ridge head keeps of random features: their Gram matrix and their sums by class."""

    gram: Floats
    sums: Floats

    @classmethod
    def empty(cls, count: int, classes: int) -> Gram:
        """Return the sums over no image."""
        return cls(np.zeros((count, count)), np.zeros((count, classes)))

    def plus(self, expanded: Floats, labels: Ints) -> Gram:
        """Return the sums with more images, ``expanded`` (n, count)."""
        one_hot = np.eye(self.sums.shape[1])[labels]
        return Gram(self.gram + expanded.T @ expanded, self.sums + expanded.T @ one_hot)

    def solve(self, ridge: float) -> Floats:
        """Return the weights (count, classes)."""
        size = len(self.gram)
        penalty = ridge * self.gram.trace() / size
        return cho_solve(cho_factor(self.gram + penalty * np.eye(size)), self.sums)


@dataclass(frozen=True)
class RidgeHead:
    """RanPAC: ridge regression on random features, task by task.

    The ridge is chosen anew after every task on a fifth of that task's own training features, which
    the other four fifths and the sums of older tasks have not seen. Never on test images.

    Attributes:
        weights: The random projection (e, count).
        kept: Sums over all images.
        without: Sums over all images but those held out of the last task.
        held_out: Features and labels of those.
    """

    weights: Floats
    kept: Gram
    without: Gram
    held_out: tuple[Floats, Ints]

    @classmethod
    def empty(cls, size: int, classes: int, count: int = RANDOM_FEATURES) -> RidgeHead:
        """Return the head of no image, for features of width ``size``."""
        nothing = Gram.empty(count, classes)
        none = np.zeros((0, size), np.float32), np.zeros(0, int)
        return cls(random_weights(size, count=count), nothing, nothing, none)

    def learn(self, features: Floats, labels: Ints, seed: int = 0) -> RidgeHead:
        """Return the head with one more task."""
        expanded = expand(features, self.weights)
        aside = held_out(labels, seed)
        without = self.kept.plus(expanded[~aside], labels[~aside])
        kept = without.plus(expanded[aside], labels[aside])
        return RidgeHead(self.weights, kept, without, (features[aside], labels[aside]))

    @cached_property
    def ridge(self) -> float:
        """The ridge with the least squared error on what was held out."""
        features, labels = self.held_out
        if not len(labels):
            return RIDGES[len(RIDGES) // 2]
        expanded = expand(features, self.weights)
        one_hot = np.eye(self.kept.sums.shape[1])[labels]
        errors = []
        for ridge in RIDGES:
            try:
                answers = expanded @ self.without.solve(ridge)
                errors.append(float(((answers - one_hot) ** 2).mean()))
            except np.linalg.LinAlgError:  # too small a ridge for this precision
                errors.append(np.inf)
        return RIDGES[int(np.argmin(errors))]

    def scores(self, features: Floats, classes: int) -> Floats:
        """Score the first ``classes`` classes."""
        return expand(features, self.weights) @ self.kept.solve(self.ridge)[:, :classes]

    def temperature(self, classes: int) -> float:
        """Return what to divide scores by before a softmax, chosen on what was held out."""
        features, labels = self.held_out
        if not len(labels):
            return 1.0
        weights = self.without.solve(self.ridge)[:, :classes]
        return best_temperature(expand(features, self.weights) @ weights, labels)


def held_out(labels: Ints, seed: int) -> NDArray[np.bool_]:
    """Return which images to set aside: a fifth of every class with five and more."""
    generator = np.random.default_rng(seed)
    aside = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        aside[members[: int(HELD_OUT * len(members))]] = True
    return aside


def best_temperature(scores: Floats, labels: Ints) -> float:
    """Return the temperature at which the softmax of ``scores`` fits ``labels`` best."""
    rows = np.arange(len(labels))
    losses = [
        -np.log(softmax(scores / temperature)[rows, labels] + 1e-12).mean()
        for temperature in TEMPERATURES
    ]
    return float(TEMPERATURES[int(np.argmin(losses))])


def aligned(
    statistics: Statistics,
    features: Floats,
    tasks: Sequence[int],
    logit_norm: float | None,
    *,
    samples: int = 64,
    epochs: int = 30,
    rate: float = 0.5,
    seed: int = 0,
) -> Floats:
    """Score by a linear head trained on Gaussian pseudo-features of every class (SLCA).

    A class's pseudo-features have the correlations of all classes, and variances half-way between
    its own and those of all: with one covariance for all, the best linear head is LDA's. Features
    are whitened first, so that one rate suits every backbone; a linear head absorbs that. Training
    starts from the nearest mean among whitened features, which is LDA with the least ridge.

    Args:
        statistics: What the pseudo-features are drawn from.
        features: What to score.
        tasks: Classes of each task.
        logit_norm: None, or SLCA's temperature: the loss sees logits divided by the mean over the
            tasks of the norm of their part.
        samples: Pseudo-features of each class in every epoch.
        epochs: Passes; new pseudo-features for each.
        rate: Learning rate at the start of a cosine.
        seed: Decides the pseudo-features.
    """
    generator = np.random.default_rng(seed)
    classes, size = statistics.means.shape
    covariance = statistics.covariance
    variance = covariance.trace() / size or 1.0
    ridge = LDA_RIDGES[0] * variance
    values, vectors = np.linalg.eigh(covariance + ridge * np.eye(size))
    whiten = vectors / np.sqrt(values)
    centre = statistics.means.mean(0)
    means = (statistics.means - centre) @ whiten
    # What is drawn has the covariance without the ridge.
    root = vectors * np.sqrt(np.maximum(values - ridge, 0))
    shared = np.maximum(covariance.diagonal(), 1e-12 * variance)
    own = np.sqrt((1 + np.minimum(statistics.variances / shared, 4)) / 2)
    # From the nearest mean among whitened features: a logit norm of 0 cannot be divided by.
    weight, bias = means.T.copy(), -0.5 * (means**2).sum(1)
    speed_weight, speed_bias = np.zeros_like(weight), np.zeros_like(bias)
    labels = np.repeat(np.arange(classes), samples)
    batch = 256
    steps = epochs * -(-len(labels) // batch)
    step = 0
    for _ in range(epochs):
        noise = own[labels] * (generator.standard_normal((len(labels), size)) @ root.T)
        drawn = means[labels] + noise @ whiten
        order = generator.permutation(len(labels))
        for start in range(0, len(order), batch):
            index = order[start : start + batch]
            rows, one_hot = drawn[index], np.eye(classes)[labels[index]]
            logits = rows @ weight + bias
            gradient = _loss_gradient(logits, one_hot, tasks, logit_norm) / len(index)
            now = rate * 0.5 * (1 + np.cos(np.pi * step / steps)) / np.sqrt(size)
            speed_weight = 0.9 * speed_weight + rows.T @ gradient + 5e-4 * weight
            speed_bias = 0.9 * speed_bias + gradient.sum(0)
            weight, bias = weight - now * speed_weight, bias - now * speed_bias
            step += 1
    return (features - centre) @ whiten @ weight + bias


def _loss_gradient(
    logits: Floats, one_hot: Floats, tasks: Sequence[int], logit_norm: float | None
) -> Floats:
    """Return the gradient (n, classes) of the cross-entropy by the logits."""
    if logit_norm is None:
        return softmax(logits) - one_hot
    starts = np.cumsum(tasks) - np.array(tasks)
    norms = np.sqrt(np.add.reduceat(logits**2, starts, axis=1)) + 1e-7
    norm = norms.mean(1, keepdims=True)
    inner = (softmax(logits / norm / logit_norm) - one_hot) / logit_norm
    # d(logits / norm): the norm depends on every logit, too.
    slope = logits / np.repeat(norms, tasks, axis=1) / len(tasks)
    along = (inner * logits).sum(1, keepdims=True) / norm**2
    return inner / norm - along * slope


def stored(tasks: Sequence[TaskFeatures], classes: int) -> Statistics:
    """Return the statistics as each task left them."""
    statistics = Statistics.empty(classes, tasks[0].after.shape[1])
    for task in tasks:
        statistics = statistics.plus(task.after, task.labels)
    return statistics


def compensated(
    tasks: Sequence[TaskFeatures], classes: int, shift: Callable[[Floats, TaskFeatures], Floats]
) -> Statistics:
    """Return the stored statistics with old means moved at every task.

    Args:
        tasks: First to last.
        classes: Number of classes.
        shift: From means (m, e) before a task, and the task, to how far they move.
    """
    statistics = Statistics.empty(classes, tasks[0].after.shape[1])
    for task in tasks:
        old = statistics.counts > 0
        means = statistics.means.copy()
        if old.any():
            means[old] += shift(means[old], task)
        statistics = replace(statistics, means=means).plus(task.after, task.labels)
    return statistics


def semantic_shift(means: Floats, task: TaskFeatures) -> Floats:
    """Semantic drift compensation: the drift of new images, the nearest ones counting most.

    The kernel's width is half of the distance from a mean to the median new image.
    """
    moved = (task.after - task.before).astype(np.float64)
    distances = squared_distances(means, task.before)
    width = np.median(distances, axis=1, keepdims=True) / 4 + 1e-12
    powers = np.exp(-(distances - distances.min(1, keepdims=True)) / (2 * width))
    return (powers / powers.sum(1, keepdims=True)) @ moved


def linear_shift(means: Floats, task: TaskFeatures) -> Floats:
    """The drift as a linear function of the features, as the learner follows it."""
    size = means.shape[1]
    known = ClassStatistics(means, np.zeros(len(means), np.int64), np.zeros((size, size)), 0)
    return known.drifted(task.before, task.after).means.astype(np.float64) - means


def drift(kept: Statistics, fresh: Statistics) -> dict[str, float]:
    """Return how far the kept statistics are from what would be measured now.

    Distances of means are in within-class deviations: root mean squared distance over the root of
    the trace of the covariance.
    """
    spread = float(np.sqrt(fresh.covariance.trace())) or 1.0
    distance = np.linalg.norm(kept.means - fresh.means, axis=1) / spread
    size = np.linalg.norm(fresh.covariance) or 1.0
    return {
        "means": float(np.sqrt((distance**2).mean())),
        "largest_mean": float(distance.max()),
        "covariance": float(np.linalg.norm(kept.covariance - fresh.covariance) / size),
    }


def study(
    tasks: Sequence[TaskFeatures],
    fresh: Sequence[Floats],
    test: tuple[Floats, Ints],
    sizes: Sequence[int],
    *,
    random_features: int = RANDOM_FEATURES,
) -> dict[str, Any]:
    """Return accuracy and calibration error of every head on every kind of statistics.

    Probabilities are softmaxes of scores divided by a temperature that fits best a fifth of the
    last task's training features; for that, the head is made once more without them.

    Args:
        tasks: Each task's training features.
        fresh: The same images' features with the last backbone, task by task.
        test: Features of the test images with the last backbone, and their labels.
        sizes: Classes of each task.
        random_features: Number of random features of the ridge head.
    """
    classes = sum(sizes)
    last, seed = tasks[-1], len(tasks) - 1
    aside = held_out(last.labels, seed)
    held = last.after[aside], last.labels[aside]
    rest = TaskFeatures(last.before[~aside], last.after[~aside], last.labels[~aside])
    anew = [
        TaskFeatures(x, x, task.labels) for x, task in zip(fresh, tasks, strict=True)
    ]  # fmt: skip
    anew_rest = TaskFeatures(anew[-1].after[~aside], anew[-1].after[~aside], rest.labels)
    kinds: dict[str, Callable[[Sequence[TaskFeatures]], Statistics]] = {
        "stored": lambda tasks: stored(tasks, classes),
        "fresh": lambda tasks: stored(tasks, classes),
        "sdc": lambda tasks: compensated(tasks, classes, semantic_shift),
        "linear": lambda tasks: compensated(tasks, classes, linear_shift),
    }
    heads: dict[str, dict[str, dict[str, float]]] = {}
    kept, ridges = {}, {}
    for kind, statistics_of in kinds.items():
        used, used_rest = (anew, anew_rest) if kind == "fresh" else (tasks, rest)
        kept[kind] = statistics_of(used)
        without = statistics_of([*used[:-1], used_rest])
        scorers: dict[str, Callable[[Statistics, Floats], Floats]] = {
            "nearest mean": nearest_mean,
            **{f"LDA, ridge {ridge:g}": _lda_with(ridge) for ridge in LDA_RIDGES},
            **{f"regression, ridge {ridge:g}": _regression_with(ridge) for ridge in RIDGES[4:7]},
            "LDA and regression (our default)": ours,
            "Gaussian alignment": lambda s, x: aligned(s, x, sizes, None),
            "Gaussian alignment, logit norm": lambda s, x: aligned(s, x, sizes, 0.1),
        }
        probabilities = {}
        for name, scorer in scorers.items():
            # Images to test and images held out are scored together: alignment trains only once.
            both = [
                scorer(made, np.concatenate([test[0], held[0]])) for made in (kept[kind], without)
            ]
            temperature = best_temperature(both[1][len(test[0]) :], held[1]) if len(held[1]) else 1
            probabilities[name] = softmax(both[0][: len(test[0])] / temperature)
        if kind in ("stored", "fresh"):
            head = RidgeHead.empty(test[0].shape[1], classes, random_features)
            for number, task in enumerate(used):
                head = head.learn(task.after, task.labels, seed=number)
            ridges[kind] = head.ridge
            name = "ridge on random features"
            probabilities[name] = softmax(
                head.scores(test[0], classes) / head.temperature(classes)
            )  # fmt: skip
            mixed = (probabilities[name] + probabilities["LDA, ridge 0.1"]) / 2
            probabilities["mean of LDA 0.1 and ridge"] = mixed
        for name, values in probabilities.items():
            heads.setdefault(name, {})[kind] = {
                "accuracy": accuracy(values, test[1]),
                "ece": calibration_error(values, test[1]),
            }
    return {
        "heads": heads,
        "drift": {kind: drift(kept[kind], kept["fresh"]) for kind in kinds if kind != "fresh"},
        "ridge": ridges,
    }


def over_the_stream(
    tasks: Sequence[TaskFeatures], tests: Sequence[Floats], truth: Ints, sizes: Sequence[int]
) -> dict[str, dict[str, float]]:
    """Return figures of the whole stream for heads from statistics that follow the drift.

    Args:
        tasks: Each task's training features.
        tests: Features of all test images after each task.
        truth: Their labels.
        sizes: Classes of each task.
    """
    ends = np.cumsum(sizes)
    kept = [compensated(tasks[: i + 1], int(end), linear_shift) for i, end in enumerate(ends)]
    heads: dict[str, Callable[[Statistics, Floats], Floats]] = {
        "nearest mean": nearest_mean,
        "LDA, ridge 0.1": _lda_with(0.1),
        "regression, ridge 0.01": _regression_with(0.01),
        "regression, ridge 0.1": _regression_with(0.1),
        "LDA and regression (our default)": ours,
    }
    figures = {
        name: summarise(
            [head(part, features) for part, features in zip(kept, tests, strict=True)],
            truth,
            sizes,
        )
        for name, head in heads.items()
    }
    keys = ("final", "average", "forgetting", "task_known")
    return {name: {key: values[key] for key in keys} for name, values in figures.items()}


def _regression_with(ridge: float) -> Callable[[Statistics, Floats], Floats]:
    return lambda statistics, features: regression(statistics, features, ridge)


def _lda_with(ridge: float) -> Callable[[Statistics, Floats], Floats]:
    return lambda statistics, features: lda(statistics, features, ridge)


def novelty_study(
    tasks: Sequence[TaskFeatures],
    test: tuple[Floats, Ints],
    sizes: Sequence[int],
    *,
    random_features: int = RANDOM_FEATURES,
) -> dict[str, float | None]:
    """Return how well scores of novelty tell classes that come later from those learned so far.

    Args:
        tasks: Training features of the tasks learned so far.
        test: Features of test images of all classes, and their labels.
        sizes: Classes of each of ``tasks``.
        random_features: Number of random features of the ridge head.
    """
    classes = sum(sizes)
    statistics = stored(tasks, classes)
    features, new = test[0].astype(np.float64), test[1] >= classes
    size = features.shape[1]
    covariance = statistics.covariance
    covariance = covariance + 0.1 * (covariance.trace() / size or 1.0) * np.eye(size)
    weights = statistics.counts / statistics.counts.sum()
    centre = weights @ statistics.means
    between = statistics.means - centre
    total = covariance + (between.T * weights) @ between
    to_class = _mahalanobis(features, statistics.means, covariance).min(1)
    to_all = _mahalanobis(features, centre[None], total)[:, 0]
    logits = lda(statistics, features, 0.1)
    probabilities = softmax(logits / 4)
    directions = statistics.means / np.linalg.norm(statistics.means, axis=1, keepdims=True)
    cosines = features @ directions.T / np.linalg.norm(features, axis=1, keepdims=True)
    head = RidgeHead.empty(size, classes, random_features)
    for number, task in enumerate(tasks):
        head = head.learn(task.after, task.labels, seed=number)
    scores = {
        "Mahalanobis": to_class,
        "relative Mahalanobis": to_class - to_all,
        "distance to the nearest mean": -nearest_mean(statistics, features).max(1),
        "cosine to the nearest mean": -cosines.max(1),
        "1 - probability (LDA)": -probabilities.max(1),
        "entropy (LDA)": -(probabilities * np.log(probabilities + 1e-12)).sum(1),
        "largest logit (LDA)": -logits.max(1),
        "energy (LDA)": -np.logaddexp.reduce(logits / 4, axis=1),
        "largest score (ridge)": -head.scores(test[0], classes).max(1),
    }
    return {name: auroc(values, new) for name, values in scores.items()}


def _mahalanobis(features: Floats, means: Floats, covariance: Floats) -> Floats:
    """Return squared Mahalanobis distances (n, m)."""
    values, vectors = np.linalg.eigh(covariance)
    whiten = vectors / np.sqrt(values)
    return squared_distances(features @ whiten, means @ whiten)
