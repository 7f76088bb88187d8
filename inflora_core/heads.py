"""What answers: linear discriminants from the statistics of the classes. No torch.

Heads that were each trained in their own task have never been compared with each other. Statistics
of all classes can be, without keeping an image. docs/method.md has the figures of the alternatives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from inflora_core.model import (
    MOST_NOVEL,
    TEMPERATURES,
    Array,
    Calibration,
    ContinualModel,
    HeldOut,
    Novelty,
)

TEMPERATURE = 6.0
"""What the logits are divided by until there are images to fit it on (``fit_temperature``)."""

REGRESSION_SHARE = 0.4
"""Of regression in what answers: with more of it, probabilities are worse; with less, more is
forgotten (docs/method.md)."""

EVEN_SHARE = 0.5
"""Of regression in what A_t is trained against, where probabilities are softened anyway."""

LARGEST_LOGIT = 30.0
"""Of a class's mean; easy classes would have logits of 1e5, which float32 cannot hold to 1e-4."""

LEAST_VARIANCE = 1e-6
"""Of a feature within a class, as a share of the mean square of all means."""

TINY = 1e-6
"""Against division by the size of an image that lies at the centre of all classes."""

DRIFT_RIDGE = 1.0
"""Of the regression that follows the features, as a share of their mean squared size."""

EXAMINED_IMAGES = 2000
"""Of a task's training images at most: enough to measure a few numbers on."""


@dataclass(frozen=True)
class ClassStatistics:
    """What is kept of the images of all classes: no image, nothing that grows with their number.

    Attributes:
        means: (classes, e) mean final features of each class.
        counts: (classes,) int64, images that a mean is over.
        scatter: (e, e) sum over all images of (z - mu_c)(z - mu_c)^T.
        freedom: Its degrees of freedom: images beyond the first of each class. Not to be had from
            ``counts``: a forgotten class leaves its share of the scatter.
    """

    means: Array
    counts: Array
    scatter: Array
    freedom: int

    @classmethod
    def of(cls, model: ContinualModel) -> ClassStatistics:
        """Return the statistics that ``model`` keeps."""
        return cls(model.class_means, model.class_counts, model.class_scatter, model.class_freedom)

    def with_images(self, features: Array, positions: Array, classes: int) -> ClassStatistics:
        """Add images, of new classes or of known ones.

        Known and new images of a class are pooled: its mean is over all of them, and the scatter
        gets what lies between the two means.

        Args:
            features: (n, e) final features.
            positions: (n,) int, each image's class among all ``classes``.
            classes: Number of classes afterwards, at least as many as there are now.
        """
        rows = np.asarray(features, np.float64)
        size = self.scatter.shape[0]
        old_means, old_counts = np.zeros((classes, size)), np.zeros(classes, np.int64)
        old_means[: len(self.means)], old_counts[: len(self.counts)] = self.means, self.counts
        added = np.bincount(positions, minlength=classes)
        sums = np.zeros((classes, size))
        np.add.at(sums, positions, rows)
        arrived = np.flatnonzero(added)
        new_means = np.zeros((classes, size))
        new_means[arrived] = sums[arrived] / added[arrived, None]
        deviations = rows - new_means[positions]
        counts = old_counts + added
        share = added / np.maximum(counts, 1)
        between = (new_means - old_means)[arrived]
        weight = (old_counts * share)[arrived, None]
        scatter = self.scatter + deviations.T @ deviations + between.T @ (weight * between)
        means = old_means + share[:, None] * (new_means - old_means)
        return ClassStatistics(
            means.astype(np.float32),
            counts.astype(np.int64),
            scatter.astype(np.float32),
            self.freedom + len(rows) - int(((old_counts == 0) & (added > 0)).sum()),
        )

    def drifted(self, before: Array, after: Array) -> ClassStatistics:
        """Return the statistics with means as they would be after a task moved the features.

        The images that they are of are gone, but the task's own images were seen before and after:
        a ridge regression of (after - before) on before says how features move, and the means move
        with it (Gomez-Villa et al., "Exemplar-free Continual Representation Learning via Learnable
        Drift Compensation", 2024; there without the pull towards "does not move").

        Args:
            before: (n, e) features of the task's images with the older weights.
            after: (n, e) features of the same images with the newer ones.
        """
        if not len(self.means):
            return self
        rows = np.asarray(before, np.float64)
        gram = rows.T @ rows
        ridge = DRIFT_RIDGE * float(np.trace(gram)) / len(gram) * np.eye(len(gram))
        movement = np.linalg.solve(gram + ridge, rows.T @ (np.asarray(after, np.float64) - rows))
        means = self.means.astype(np.float64)
        return ClassStatistics(
            (means + means @ movement).astype(np.float32), self.counts, self.scatter, self.freedom
        )

    def covariance(self) -> tuple[Array, float]:
        """Return the shared covariance (e, e) float64, shrunk towards a sphere, and by what share.

        The share is the oracle approximating shrinkage of Chen et al., "Shrinkage Algorithms for
        MMSE Covariance Estimation" (2010), equation 23: from S and the degrees of freedom alone,
        with nothing to be tuned from 2 images a class to thousands.
        """
        size = len(self.scatter)
        scatter = self.scatter.astype(np.float64)
        scale = float(np.mean(self.means.astype(np.float64) ** 2)) or 1.0
        # Images that repeat each other to the bit must not look infinitely certain.
        scatter += self.freedom * LEAST_VARIANCE * scale * np.eye(size)
        trace = float(np.trace(scatter))
        if self.freedom == 0:
            # One image a class: the nearest mean is all that can be said.
            return scale * np.eye(size), 1.0
        sample = scatter / self.freedom
        square, power = float((sample**2).sum()), (trace / self.freedom) ** 2
        spread = (self.freedom + 1 - 2 / size) * (square - power / size)
        towards = (1 - 2 / size) * square + power
        shrinkage = 1.0 if spread <= towards else towards / spread
        sphere = trace / self.freedom / size * np.eye(size)
        return (1 - shrinkage) * sample + shrinkage * sphere, shrinkage


@dataclass(frozen=True)
class Discriminant:
    """Linear discriminants over all classes, before their temperature: a mean of two kinds.

    With the shared covariance S, m the mean of the means, D = mu - m and B = D^T D / classes:

    * linear discriminant analysis: D_c S^-1 (x - m) - D_c S^-1 D_c / 2;
    * ridge regression on which class it is: D_c (S + B)^-1 (x - m), times what brings it nearest
      to the first within a class: the one is sure of what is far from all others without end,
      the other is never sure, and features that have moved since fool it less.

    ``share`` of the mean is regression. Equal priors in both, however many images a class has.

    Attributes:
        weight: (classes, e) float64.
        bias: (classes,) float64.
        centre: (e,) m.
        precision: (e, e) S^-1.
        total: (e, e) (S + B)^-1.
        scale: What the regression is multiplied by.
        shrinkage: How much of S is a sphere, 0 to 1.
    """

    weight: Array
    bias: Array
    centre: Array
    precision: Array
    total: Array
    scale: float
    shrinkage: float

    @classmethod
    def of(cls, statistics: ClassStatistics, share: float = REGRESSION_SHARE) -> Discriminant:
        """Return the discriminants of at least one class; ``share`` of them is regression."""
        means = statistics.means.astype(np.float64)
        covariance, shrinkage = statistics.covariance()
        centre = means.mean(0)
        centred = means - centre
        precision = inverse(covariance)
        total = inverse(covariance + centred.T @ centred / len(centred))
        analysis, regression = centred @ precision, centred @ total
        within = regression @ covariance
        # With S^-1 for precision, W S V^T is D V^T. One class alone has no discriminant.
        size = float((within * regression).sum())
        scale = float((centred * regression).sum()) / size if size else 0.0
        weight = (1 - share) * analysis + share * scale * regression
        bias = -weight @ centre - (1 - share) / 2 * (analysis * centred).sum(1)
        return cls(weight, bias, centre, precision, total, scale, shrinkage)

    def logits(self, features: Array) -> Array:
        """Return (n, classes) float64 for features (n, e)."""
        return np.asarray(features, np.float64) @ self.weight.T + self.bias

    def divided(self, means: Array, temperature: float) -> tuple[Array, Array]:
        """Return weight (classes, e) and bias (classes,), float32, of calibrated logits.

        They are divided by ``temperature``, or by as much as keeps the logits of the ``means``
        within LARGEST_LOGIT; neither changes which class wins.
        """
        largest = float(np.abs(self.logits(means)).max())
        divisor = max(temperature, largest / LARGEST_LOGIT)
        return (self.weight / divisor).astype(np.float32), (self.bias / divisor).astype(np.float32)


def inverse(symmetric: Array) -> Array:
    """Return the inverse (e, e), symmetric to the bit, of a positive definite matrix."""
    inverted = np.linalg.inv(symmetric)
    return (inverted + inverted.T) / 2


def leave_one_out(
    statistics: ClassStatistics,
    features: Array,
    positions: Array,
    share: float = REGRESSION_SHARE,
) -> tuple[Array, Array, Array]:
    """Return the answers for images that ``statistics`` contain, each as if it were not in them.

    Leaving x out takes n_c / (n_c - 1) d d^T, with d = x - mu_c, from the scatter, and moves the
    mean of x's class; S^-1 follows by the Sherman-Morrison formula, (S + B)^-1 by Woodbury's.
    Shrinkage, degrees of freedom, centre and scale stay as they are, and so does the precision that
    novelty is scored with.

    Args:
        statistics: Over all images, those of ``features`` among them.
        features: (n, e).
        positions: (n,) int, the class of each.
        share: Of regression.

    Returns:
        Logits (m, classes) float64 and novelty scores (m,) of those images whose class has others,
        and which these are, (m,) int.
    """
    kept = np.flatnonzero(statistics.counts[positions] > 1)
    rows, labels = np.asarray(features, np.float64)[kept], positions[kept]
    if not len(kept):
        return np.zeros((0, len(statistics.means))), np.zeros(0), kept
    discriminant = Discriminant.of(statistics)
    precision = discriminant.precision
    means = statistics.means.astype(np.float64)
    count = statistics.counts[labels].astype(np.float64)
    deviation = rows - means[labels]
    left_out = (1 - discriminant.shrinkage) / max(statistics.freedom, 1) * count / (count - 1)
    lever = deviation @ precision
    # Images that alone span a direction would make it singular: never quite.
    gain = left_out / np.maximum(1 - left_out * (deviation * lever).sum(1), 1e-3)
    around = rows - discriminant.centre
    centred = means - discriminant.centre
    across, along = lever @ centred.T, (lever * around).sum(1)
    analysis = centred @ precision
    inner = around @ analysis.T
    sizes = (analysis * centred).sum(1)
    logits = inner + (gain * along)[:, None] * across
    logits -= 0.5 * (sizes[None] + gain[:, None] * across**2)
    cosines = inner / np.sqrt(np.maximum(sizes, TINY))
    own = centred[labels] - deviation / (count - 1)[:, None]
    own_across = (own * lever).sum(1)
    own_inner, own_size = ((own @ precision) * around).sum(1), ((own @ precision) * own).sum(1)
    each = np.arange(len(kept)), labels
    logits[each] = own_inner + gain * own_across * along
    logits[each] -= 0.5 * (own_size + gain * own_across**2)
    cosines[each] = own_inner / np.sqrt(np.maximum(own_size, TINY))
    length = np.sqrt(np.maximum(((around @ precision) * around).sum(1), TINY))
    regressed = _regression_left_out(
        discriminant.total, centred, around, deviation, labels, count, left_out
    )
    logits = (1 - share) * logits + share * discriminant.scale * regressed
    return logits, 1 - cosines.max(1) / length, kept


def _regression_left_out(
    total: Array,
    centred: Array,
    around: Array,
    deviation: Array,
    labels: Array,
    count: Array,
    left_out: Array,
) -> Array:
    """Return D_c (S + B)^-1 (x - m), (n, classes), with each x out of S and out of B.

    With u = D_y / (classes (n_y - 1)), y the class of x, S + B loses
    left_out d d^T + u d^T + d u^T - d d^T / (classes (n_y - 1)^2): a matrix of rank 2.
    """
    others = count - 1
    moved = 1 / (len(centred) * others)
    pair = np.stack([deviation, centred[labels]], 1)
    middle = np.zeros((len(around), 2, 2))
    middle[:, 0, 0] = moved / others - left_out
    middle[:, 0, 1] = middle[:, 1, 0] = -moved
    levers = pair @ total
    seen = (levers @ around[:, :, None]).squeeze(2)
    changed = middle @ levers
    capacitance = np.eye(2) + changed @ pair.transpose(0, 2, 1)
    # What (S + B)^-1 (x - m) becomes, one row an image.
    turned = around @ total
    turned -= np.einsum("np,npe->ne", seen, np.linalg.solve(capacitance, changed))
    answers = turned @ centred.T
    answers[np.arange(len(around)), labels] -= (turned * deviation).sum(1) / others
    return answers


def cross_entropy(logits: Array, positions: Array, temperature: float) -> float:
    """Return the mean cross-entropy of (n, classes) logits divided by ``temperature``."""
    scaled = logits / temperature
    scaled -= scaled.max(1, keepdims=True)
    truth = scaled[np.arange(len(scaled)), positions]
    return float((np.log(np.exp(scaled).sum(1)) - truth).mean())


def fit_temperature(logits: Array, positions: Array) -> float:
    """Return the temperature, 0.5 to 50, at which logits (n, classes) are the likeliest.

    Guo et al., "On Calibration of Modern Neural Networks" (2017), section 4.2.
    """
    return float(TEMPERATURES[int(np.argmin(losses_at(logits, positions)))])


def losses_at(logits: Array, positions: Array) -> Array:
    """Return the summed cross-entropy (93,) of (n, classes) logits at each of ``TEMPERATURES``."""
    return len(logits) * np.array([cross_entropy(logits, positions, t) for t in TEMPERATURES])


def sureness(classes: int) -> float:
    """Return how much larger the logits of so many classes must be than those of ten.

    To be as sure among C classes, a softmax needs logits log(C) as large. Without this,
    temperatures that were measured while there were few classes make many look less sure than they
    are.
    """
    return math.log(max(classes, 2)) / math.log(10)


def temperature_of(calibration: Calibration, classes: int) -> float:
    """Return the temperature at which all that was measured is the likeliest."""
    if not calibration.images:
        return TEMPERATURE
    return float(TEMPERATURES[int(np.argmin(calibration.losses))]) / sureness(classes)


def teaching_temperature(logits: Array, positions: Array, share: float) -> float:
    """Return the temperature at which the cross-entropy is ``share`` of that of knowing nothing.

    A head that is sure of itself teaches nothing: the loss of classes that frozen features tell
    apart already is next to 0, and so are its gradients. Never below the likeliest temperature.

    Args:
        logits: (n, classes), of images that the head was not made from.
        positions: (n,) their classes.
        share: 0 to 1, of log(classes).
    """
    low = fit_temperature(logits, positions)
    wanted = share * math.log(max(logits.shape[1], 2))
    high = 1e8
    if cross_entropy(logits, positions, low) >= wanted:
        return low
    # The loss rises with the temperature from there: halve the interval, on a logarithmic scale.
    for _ in range(50):
        middle = math.sqrt(low * high)
        if cross_entropy(logits, positions, middle) < wanted:
            low = middle
        else:
            high = middle
    return high


def novelty_of(statistics: ClassStatistics, discriminant: Discriminant) -> Novelty:
    """Return what scores images by the largest cosine with a class's mean, whitened, around m."""
    whitening = np.linalg.cholesky(discriminant.precision)
    means = (statistics.means.astype(np.float64) - discriminant.centre) @ whitening
    sizes = np.linalg.norm(means, axis=1, keepdims=True)
    directions = np.divide(means, sizes, out=np.zeros_like(means), where=sizes > 0)
    weight = directions @ whitening.T
    return Novelty(
        weight=weight.astype(np.float32),
        bias=(-weight @ discriminant.centre).astype(np.float32),
        whitening=whitening.astype(np.float32),
        offset=(-discriminant.centre @ whitening).astype(np.float32),
    )


def novelty_scores(novelty: Novelty, features: Array) -> Array:
    """Return s (n,) float64 for features (n, e): 0 to 2, before it is made a share of images."""
    rows = np.asarray(features, np.float64)
    sizes = np.linalg.norm(rows @ novelty.whitening + novelty.offset, axis=1)
    along = (rows @ novelty.weight.T + novelty.bias).max(1)
    scores: Array = 1 - along / np.maximum(sizes, TINY)
    return scores


def novelty_knots(calibration: Calibration) -> Array:
    """Return the scores (101,) float64 below which 0%, 1%, ..., 100% of known images lie.

    Rising from 0 to ``MOST_NOVEL``; between counted bins by interpolation. Evenly spread as long
    as nothing was counted.
    """
    total = int(calibration.scores.sum())
    if not total:
        return np.linspace(0, MOST_NOVEL, 101)
    edges = np.linspace(0, MOST_NOVEL, len(calibration.scores) + 1)
    shares = np.concatenate([[0], np.cumsum(calibration.scores)]) / total
    # Only where the share rises: a flat stretch has no inverse.
    rising = np.concatenate([np.diff(shares) > 0, [False]]) | np.concatenate(
        [[False], np.diff(shares) > 0]
    )
    knots: Array = np.interp(np.linspace(0, 1, 101), shares[rising], edges[rising])
    knots[0], knots[-1] = 0.0, MOST_NOVEL
    return knots


def novelty_shares(model: ContinualModel, features: Array) -> Array:
    """Return the share of known images (n,) that look less new, as the exported file does.

    The same sum of ramps as in the graph: where many images had one score, the share rises at once.
    """
    knots = novelty_knots(model.calibration)
    scores = novelty_scores(model.novelty, features)
    widths = ramp_widths(knots)
    risen = np.clip(scores[:, None] - knots[:-1], 0, widths) / widths
    shares: Array = np.minimum(risen.mean(1), 1)
    return shares


def ramp_widths(knots: Array) -> Array:
    """Return the widths (k - 1,) of the ramps between ``knots`` (k,), none of them 0."""
    return np.maximum(np.diff(knots), 1e-6)


@dataclass(frozen=True)
class Examined:
    """Answers about a task's images that what answered was not made from.

    Attributes:
        method: ``HELD_OUT``: images that were kept apart. ``LEAVE_ONE_OUT``: training images, each
            left out of the statistics in turn; A_t has seen them, so they flatter. ``NONE``.
        logits: (m, classes) before any temperature.
        positions: (m,) int, their classes.
        scores: (m,) their novelty scores.
    """

    method: HeldOut
    logits: Array
    positions: Array
    scores: Array

    def accuracy(self, columns: Array | None = None) -> float | None:
        """Return the share whose class wins, among all or among ``columns``; None without any."""
        return accuracy(self.logits, self.positions, columns)


def accuracy(logits: Array, positions: Array, columns: Array | None = None) -> float | None:
    """Return the share of (n, classes) logits that are largest at ``positions``; None for n = 0.

    Args:
        logits: Of n images.
        positions: (n,) int, the classes they should be.
        columns: Positions of the classes that compete, ascending; None for all.
    """
    if not len(positions):
        return None
    if columns is None:
        return float((logits.argmax(1) == positions).mean())
    return float((columns[logits[:, columns].argmax(1)] == positions).mean())


def examine(
    model: ContinualModel,
    statistics: ClassStatistics,
    train: tuple[Array, Array],
    held_out: tuple[Array, Array],
    from_statistics: bool,
) -> Examined:
    """Ask for images that were held out, or else leave training images out one by one.

    Leaving out is for what is made of statistics, and where some class of the task is too small to
    hold any out.

    Args:
        model: What answers; made from ``statistics``.
        statistics: Those of all classes, with ``train`` and without ``held_out``.
        train: Features (n, e) and positions (n,).
        held_out: The same, (m, e) and (m,).
        from_statistics: Whether what answers is ``Discriminant``.
    """
    features, positions = held_out
    everywhere = len(np.unique(positions)) == len(np.unique(train[1]))
    if from_statistics and not everywhere:
        sample = spread(train[1])
        some, labels = train[0][sample], train[1][sample]
        logits, scores, kept = leave_one_out(statistics, some, labels)
        if len(kept):
            return Examined(HeldOut.LEAVE_ONE_OUT, logits, labels[kept], scores)
    method = HeldOut.HELD_OUT if len(positions) else HeldOut.NONE
    raw = (
        Discriminant.of(statistics).logits(features) if from_statistics else model.logits(features)
    )
    return Examined(method, raw, positions, novelty_scores(model.novelty, features))


def spread(positions: Array, most: int = EXAMINED_IMAGES) -> Array:
    """Return which images to examine, (m,): of every class its share, however they came."""
    return np.argsort(positions, kind="stable")[every(len(positions), most)]


def every(count: int, most: int) -> slice:
    """Return the slice that takes at most ``most`` of ``count``, evenly."""
    return slice(None, None, -(-count // most))


def pooled(calibration: Calibration, examined: Examined) -> Calibration:
    """Return ``calibration`` with what a task's images add to its sums.

    One class has no probability to be wrong about; and among fewer than three classes every image
    lies on one line with the means, so that cosines say nothing.
    """
    classes = examined.logits.shape[1]
    if not len(examined.positions) or classes < 2:
        return calibration
    scores = calibration.scores
    if classes > 2:
        counted, _ = np.histogram(
            np.clip(examined.scores, 0, MOST_NOVEL), len(scores), (0, MOST_NOVEL)
        )
        scores = scores + counted
    return Calibration(
        calibration.images + len(examined.positions),
        calibration.losses + losses_at(examined.logits * sureness(classes), examined.positions),
        scores,
    )


def answering(
    model: ContinualModel,
    statistics: ClassStatistics,
    calibration: Calibration,
    trained: tuple[Array, Array] | None = None,
) -> ContinualModel:
    """Return ``model`` with what answers made anew from ``statistics``.

    Args:
        model: Whose weights the features come from.
        statistics: Of all its classes.
        calibration: What to divide the logits by, and to compare novelty with.
        trained: Weight and bias to answer with instead.
    """
    discriminant = Discriminant.of(statistics)
    temperature = temperature_of(calibration, len(statistics.means))
    weight, bias = trained or discriminant.divided(statistics.means, temperature)
    return replace(
        model,
        head_weight=weight,
        head_bias=bias,
        class_means=statistics.means,
        class_counts=statistics.counts,
        class_scatter=statistics.scatter,
        class_freedom=statistics.freedom,
        novelty=novelty_of(statistics, discriminant),
        calibration=calibration,
    )


def answers_from_statistics(model: ContinualModel) -> bool:
    """Return whether what answers is made of the statistics, and no heads as they were trained."""
    made = answering(model, ClassStatistics.of(model), model.calibration)
    size = float(np.abs(made.head_weight).max())
    return bool(np.allclose(made.head_weight, model.head_weight, rtol=0, atol=1e-3 * size))
