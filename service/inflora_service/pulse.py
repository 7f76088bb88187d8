"""How much a server is asked, and how long it takes, over the last minutes."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from inflora_service.metrics import DURATION, Recorder

SECONDS = 2.0
"""From one look at the counts to the next."""

WINDOW = 10.0
"""Over how long each figure is taken: with less, a handful of calls would make it jump."""

KEPT = 300.0
"""How far back figures go."""

_METHODS = (
    ("inflora.v1.PredictorService", "Predict"),
    ("inference.GRPCInferenceService", "ModelInfer"),
)
"""Calls whose durations are those of predictions; streams last as long as their clients like."""

_BOUNDS = (*DURATION.buckets, math.inf)


@dataclass(frozen=True)
class Moment:
    """What was asked in the seconds before a moment.

    Attributes:
        ago: How many seconds ago it was.
        calls: Predictions a second that were answered.
        images: Images a second.
        p50: Seconds within which half of them were answered; None if there were none.
        p99: Likewise 99 of 100.
        failed: Those a second that were refused, failed or given up.
    """

    ago: float
    calls: float
    images: float
    p50: float | None
    p99: float | None
    failed: float = 0.0


@dataclass(frozen=True)
class _Counts:
    at: float
    images: int
    answered: list[float]
    failed: int


class Pulse:
    """Looks at the counts every ``SECONDS``, whether or not somebody looks at it.

    Args:
        recorder: Has the counts.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._seen: deque[_Counts] = deque(maxlen=round((KEPT + WINDOW) / SECONDS))
        self._looking: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look, in a running event loop."""
        self._looking = asyncio.create_task(self._look_on(), name="pulse")

    def stop(self) -> None:
        """Look no more."""
        if self._looking is not None:
            self._looking.cancel()

    def moments(self) -> list[Moment]:
        """Return what was asked, oldest first, this moment the last. For any thread."""
        seen = [*self._seen, self._look()]
        now, moments, begin = seen[-1].at, [], 0
        for index, counts in enumerate(seen[1:], 1):
            while begin < index - 1 and seen[begin].at < counts.at - WINDOW:
                begin += 1
            moments.append(_moment(seen[begin], counts, now))
        return [each for each in moments if each.ago <= KEPT]

    async def _look_on(self) -> None:
        while True:
            self._seen.append(self._look())
            await asyncio.sleep(SECONDS)

    def _look(self) -> _Counts:
        return _Counts(
            time.monotonic(),
            self._recorder.predicted_images,
            self._recorder.answered(_METHODS),
            self._recorder.failed(_METHODS),
        )


def _moment(before: _Counts, after: _Counts, now: float) -> Moment:
    seconds = max(after.at - before.at, 1e-3)
    counts = [b - a for a, b in zip(before.answered, after.answered, strict=True)]
    return Moment(
        now - after.at,
        counts[-1] / seconds,
        (after.images - before.images) / seconds,
        quantile(_BOUNDS, counts, 0.5),
        quantile(_BOUNDS, counts, 0.99),
        (after.failed - before.failed) / seconds,
    )


def quantile(bounds: Sequence[float], cumulative: Sequence[float], share: float) -> float | None:
    """Return within what a share of the values lies, as Prometheus estimates it; None of none.

    Args:
        bounds: Upper bounds of the buckets, ascending; the last is infinite.
        cumulative: How many values are up to each bound.
        share: From 0 to 1.
    """
    if not cumulative[-1]:
        return None
    wanted = share * cumulative[-1]
    index = next(i for i, count in enumerate(cumulative) if count >= wanted)
    if index == len(bounds) - 1:
        return bounds[-2]  # nobody knows how far beyond
    low, under = (bounds[index - 1], cumulative[index - 1]) if index else (0.0, 0.0)
    inside = cumulative[index] - under
    return low + (bounds[index] - low) * ((wanted - under) / inside if inside else 1.0)
