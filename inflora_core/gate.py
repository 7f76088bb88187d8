"""The publish gate: what was measured about a task, held against limits. No torch.

A version that fails a check is stored like any other, but does not become current: it is a
candidate, until a person promotes it all the same. docs/operations.md has the figures behind it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from inflora_core.config import Gate
from inflora_core.heads import Examined
from inflora_core.model import (
    Agreement,
    Array,
    ContinualModel,
    Evidence,
    Factors,
    GateCheck,
    HeldOut,
    Learned,
    Likeness,
    Told,
)

LUCK = 0.01
"""How often labels that mean nothing may be told right as often as is asked for."""

POWER = 0.8
"""How often typical labels must be, or there are too few images to say anything."""

TYPICAL = 0.5
"""Share beyond chance that is told right among a task's own classes, typically. Honest tasks of
five and more images a class had 0.5 to 0.9 on the bundled backbone."""

TYPICAL_ALONE = 0.25
"""The same where one class alone is told from all that are known, which is harder."""

FEWEST_ALIKE = 15
"""Images of a new class that it takes to say what it is like. With 5, honest classes look as much
like others as repeated ones do."""

FEWEST_CANARIES = 20
"""Canary images that it takes to say what was lost."""

MOST_NAMED = 5
"""Classes that look like others whom a report names."""


@dataclass(frozen=True)
class Canaries:
    """How often the canary images of old classes are told right among all classes.

    Attributes:
        images: How many there are.
        before: Share that the version before tells right.
        after: Share that the new version tells right.
    """

    images: int
    before: float
    after: float


# -- what is measured ------------------------------------------------------------------------------


def evidence(
    left_out: tuple[Array, Array], examined: Examined, taught: Array, known: int
) -> Evidence:
    """Return what learning shows about a task's labels.

    Args:
        left_out: Logits (m, classes) and classes (m,) of the training images before A_t is trained,
            each left out of the statistics in turn.
        examined: Answers in the end. What was trained on shows nothing.
        taught: Positions of the task's classes, ascending.
        known: How many classes were known before; the others are new.
    """
    held_out = examined.method is HeldOut.HELD_OUT
    return Evidence(
        untrained=told(*left_out, taught),
        held_out=told(examined.logits, examined.positions, taught) if held_out else None,
        likenesses=tuple(likenesses(*left_out, (c for c in taught.tolist() if c >= known))),
    )


def told(logits: Array, positions: Array, columns: Array) -> Told | None:
    """Return how often images are told right among ``columns``; None where that says nothing.

    Chance is what the same answers would get had they nothing to do with the images, as in Cohen's
    kappa: classes may differ in size, and answers may favour some. One class alone competes with
    all that there are.

    Args:
        logits: (n, classes), of what was not made from the images.
        positions: (n,) int, the classes they should be.
        columns: Positions of the classes that compete, ascending.
    """
    images, classes = logits.shape
    if len(columns) == 1:
        if not images or classes < 2:
            return None
        right = int((logits.argmax(1) == positions).sum())
        return Told(right, images, 1 / classes, TYPICAL_ALONE)
    if len(np.unique(positions)) < 2:
        return None
    answers = columns[logits[:, columns].argmax(1)]
    chance = sum(float((positions == c).mean() * (answers == c).mean()) for c in columns)
    return Told(int((answers == positions).sum()), images, chance, TYPICAL)


def likenesses(logits: Array, positions: Array, new: Iterable[int]) -> Iterator[Likeness]:
    """Yield for each of the ``new`` classes the one that it is the hardest to tell from.

    A normal distribution of margins is assumed: with the 15 to 40 images that a class often has,
    counting them instead would be by a half more at the mercy of luck.

    Args:
        logits: (n, classes), of what was not made from the images.
        positions: (n,) int, the classes they should be.
        new: Positions of the classes to look at; one of few images is passed over.
    """
    for position in new:
        own = logits[positions == position]
        if len(own) < FEWEST_ALIKE or logits.shape[1] < 2:
            continue
        margins = own[:, [position]] - own
        spread = np.maximum(margins.std(0, ddof=1), 1e-9 * np.abs(own).max() + 1e-30)
        ratio = margins.mean(0) / spread
        ratio[position] = np.inf
        other = int(ratio.argmin())
        share = 0.5 * math.erfc(-float(ratio[other]) / math.sqrt(2))
        yield Likeness(position, other, share)


def beyond_chance(right: float, found: Told) -> float:
    """Return so many right answers as a share of the way from chance (0) to perfect (1)."""
    return (right / found.images - found.chance) / max(1 - found.chance, 1e-12)


def least_right(found: Told) -> int | None:
    """Return the fewest right answers that are no luck; None if there are too few images to say.

    The exact binomial test: images are taken for independent of each other.
    """
    tails = binomial_tails(found.images, found.chance)
    least = int((tails > LUCK).sum())
    if least > found.images:
        return None
    typical = found.chance + found.typical * (1 - found.chance)
    enough = binomial_tails(found.images, typical)[least] >= POWER
    return least if enough else None


def binomial_tails(trials: int, share: float) -> Array:
    """Return P(X >= k), (trials + 1,) for k from 0, of X successes, each of probability ``share``.

    Args:
        trials: At least 1.
        share: 0 to 1.
    """
    share = min(max(share, 1e-12), 1 - 1e-12)
    counts = np.arange(trials + 1)
    logs = np.array([math.lgamma(k + 1) for k in range(trials + 1)])
    densities = np.exp(
        logs[-1] - logs - logs[::-1]
        + counts * math.log(share) + (trials - counts) * math.log1p(-share)
    )  # fmt: skip
    tails: Array = np.minimum(densities[::-1].cumsum()[::-1], 1.0)
    return tails


def not_finite(model: ContinualModel, factors: dict[str, Factors]) -> int:
    """Return how many numbers of head, statistics and factors are NaN or infinite."""
    novelty = model.novelty
    arrays = [
        *(model.head_weight, model.head_bias, model.class_means, model.class_scatter),
        *(novelty.weight, novelty.bias, novelty.whitening, novelty.offset),
        *(part for pair in factors.values() for part in (pair.expansion, pair.reduction)),
    ]
    return sum(int((~np.isfinite(array)).sum()) for array in arrays)


# -- what is made of it ----------------------------------------------------------------------------


def checks(
    learned: Learned, settings: Gate, canaries: Canaries | None = None
) -> tuple[GateCheck, ...]:
    """Return what the gate finds, without what is switched off.

    Args:
        learned: The task as it was learned.
        settings: The limits.
        canaries: What was measured on images of old classes; None if there are none.
    """
    found = [
        _not_finite(learned, settings.not_finite),
        _leak(learned, settings.leak),
        _accuracy(learned.evidence, settings.accuracy),
        _distinct(learned, settings.distinct),
        *_forgetting(learned, settings, canaries),
    ]
    return tuple(check for check in found if check is not None)


def warnings(learned: Learned, settings: Gate) -> Iterator[str]:
    """Yield which new classes are hard to tell from another one, the hardest first."""
    alike = [
        likeness
        for likeness in learned.evidence.likenesses
        if settings.similar is not None and not likeness.told >= settings.similar
    ]
    alike.sort(key=lambda likeness: likeness.told)
    for likeness in alike[:MOST_NAMED]:
        yield (
            f"{_likeness(learned, likeness)} If both are the same, forget one, and give the other "
            "its name as an alias."
        )
    if len(alike) > MOST_NAMED:
        yield f"{len(alike) - MOST_NAMED} more new classes are hard to tell from another one."


SURE = 0.95
"""How sure it has to be that a form agrees on less than is asked for: 32 images are few."""


def form_refusal(form: str, agreement: Agreement, settings: Gate) -> str:
    """Return what there is against handing out a form of a version; "" if there is nothing.

    Args:
        form: Its name, that of its limit among the settings.
        agreement: With ``model.onnx``.
        settings: The limits.
    """
    least: float | None = getattr(settings, form)
    if least is None:
        return "it is off"
    luck = binomial_tails(agreement.images, 1 - least)[agreement.differing]
    if agreement.differing and luck < 1 - SURE:
        return f"it names {agreement.differing} of {agreement.images} images differently"
    if settings.form_distance is not None and agreement.distance > settings.form_distance:
        return f"its probabilities are {agreement.distance:.3f} away on average"
    return ""


def why_held_back(failed: Iterable[GateCheck]) -> str:
    """Return what there is against a version, in plain English."""
    return " ".join(check.message for check in failed)


def _not_finite(learned: Learned, limit: int | None) -> GateCheck | None:
    if limit is None:
        return None
    count = not_finite(learned.model, learned.factors)
    message = f"{count} numbers of the head or the factors are not finite; at most {limit} may be."
    return GateCheck("not_finite", count, limit, count <= limit, message)


def _leak(learned: Learned, limit: float | None) -> GateCheck | None:
    if limit is None:
        return None
    leak = learned.report.leak
    message = (
        f"The update touches protected directions: the largest leak of a layer is {leak:.2g}, and "
        f"at most {limit:.2g} is allowed."
    )
    return GateCheck("leak", leak, limit, leak <= limit, message)


def _accuracy(found: Evidence, share: float | None) -> GateCheck | None:
    if share is None:
        return None
    sides = (
        ("training images, each left out in turn before training", found.untrained),
        ("held-out images", found.held_out),
    )
    judged = []
    for images, side in sides:
        least = least_right(side) if side is not None else None
        if side is None or least is None:
            continue
        value = beyond_chance(side.right, side)
        limit = max(share * side.typical / TYPICAL, beyond_chance(least, side))
        message = (
            f"{side.right / side.images:.0%} of {side.images} {images}, are told right, where "
            f"{side.chance:.0%} is chance: {value:.2f} of the way to perfect, and at least "
            f"{limit:.2f} is asked for. Are labels mixed up, or the images noise?"
        )
        judged.append(GateCheck("accuracy", value, limit, value >= limit, message))
    if not judged:
        message = "Accuracy was not measured: the task has too few images to tell it from luck."
        return GateCheck("accuracy", None, share, True, message)
    # What training makes of features that showed nothing before it counts as well.
    return next((check for check in judged if check.passed), judged[0])


def _distinct(learned: Learned, limit: float | None) -> GateCheck | None:
    if limit is None:
        return None
    found = learned.evidence.likenesses
    if not found:
        message = f"Likeness was not measured: no new class has {FEWEST_ALIKE} images."
        return GateCheck("distinct", None, limit, True, message)
    most = min(found, key=lambda likeness: likeness.told)
    message = f"{_likeness(learned, most)} At least {limit:.0%} is asked for."
    return GateCheck("distinct", most.told, limit, most.told >= limit, message)


def _likeness(learned: Learned, likeness: Likeness) -> str:
    new, other = (learned.model.classes[i].label for i in (likeness.position, likeness.other))
    return (
        f"Class {new!r} is hard to tell from {other!r}: before training, about {likeness.told:.0%} "
        "of its images were."
    )


def _forgetting(
    learned: Learned, settings: Gate, canaries: Canaries | None
) -> Iterator[GateCheck | None]:
    measured = canaries is not None and canaries.images >= FEWEST_CANARIES
    if settings.canary is not None:
        yield _canary(settings.canary, canaries if measured else None)
    # It stands in: features alone cannot show what their drift comes to.
    if settings.interference is not None and not (measured and settings.canary is not None):
        value, limit = learned.report.interference, settings.interference
        message = (
            f"The update disturbs what older tasks use: the largest interference of a layer is "
            f"{value:.2f}, and at most {limit:.2f} is allowed."
        )
        yield GateCheck("interference", value, limit, value <= limit, message)


def _canary(limit: float, canaries: Canaries | None) -> GateCheck:
    if canaries is None:
        message = "Accuracy on old classes was not measured: there are too few canary images."
        return GateCheck("canary", None, limit, True, message)
    loss = canaries.before - canaries.after
    message = (
        f"Of {canaries.images} images of old classes {canaries.before:.0%} were told right before "
        f"and {canaries.after:.0%} are now; a loss of at most {limit:.0%} is allowed."
    )
    return GateCheck("canary", loss, limit, loss <= limit, message)
