"""Whose image is next, and which calls cannot be answered in time, without threads and clocks.

Calls take turns, an image each: one with hundreds of images does not keep the others waiting.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from inflora_core.config import Limits
from inflora_core.errors import DeadlineError, LimitExceededError
from inflora_core.predictor import Answers, Floats, Predictor

FOREVER = math.inf
"""A deadline that never comes."""

_DECODED = 32
"""Images that are decoded before the model asks for them, at the least: model-sized tensors are
many times the size of the files, so no more of them wait than keep it busy."""

_NEWEST = 0.2
"""Weight of the newest measurement in an average."""

_DOUBT = 0.8
"""What averages are multiplied by once there is nothing to do after a call was refused because of
them: else one that a stall made long could refuse calls for good, and nothing would be measured
that corrects it."""


Source: TypeAlias = bytes | NDArray[np.uint8]
"""An encoded image, or (h, w, 3) uint8 of one that need not be decoded."""


@dataclass(eq=False)
class Call:
    """A call's images, and what is known of them.

    Attributes:
        predictor: Answers all of them.
        deadline: When an answer is of no use any more; seconds by the caller's clock.
        bulk: Whether it can wait for others.
        sources: Index and image of those that nobody has begun with.
        ready: Index and pixels, (1, 3, height, width) float32, of images that wait for the model.
        answers: Of images that have one, by their index.
        left: Images without an answer.
        bytes: Size of the sources.
        under_way: Images in somebody's hands.
        fault: Index of the first image that failed, and why.
        ended: Whether it is answered, failed, or given up.
    """

    predictor: Predictor
    deadline: float = FOREVER
    bulk: bool = False
    sources: deque[tuple[int, Source]] = field(default_factory=deque)
    ready: deque[tuple[int, Floats]] = field(default_factory=deque)
    answers: dict[int, Answers] = field(default_factory=dict)
    left: int = field(init=False)
    bytes: int = field(init=False)
    under_way: int = 0
    fault: tuple[int, BaseException] | None = None
    ended: bool = False

    def __post_init__(self) -> None:
        self.left = len(self.sources) + len(self.ready)
        self.bytes = sum(_size(source) for _, source in self.sources)


Image: TypeAlias = tuple[Call, int, Source]
Prepared: TypeAlias = tuple[Call, int, Floats]


class Turns:
    """Calls that wait, and what is to be done for them next.

    Args:
        limits: How much may wait.
        runs: Runs of the model at a time.

    Attributes:
        batch: Most images of a run.
        runs: Runs of the model at a time.
        calls: Those that have not ended, in the order of their coming.
        settled: Calls that have ended since somebody looked: answered, or with a fault.
    """

    def __init__(self, limits: Limits, runs: int) -> None:
        self.batch = 1
        self.runs = runs
        self.calls: dict[Call, None] = {}
        self.settled: list[Call] = []
        self._limits = limits
        self._to_decode: deque[Call] = deque()
        self._to_run: deque[Call] = deque()
        self._decoded = 0
        self._running = 0
        self._bulk_running = 0
        self._pace = _Pace()

    @property
    def images(self) -> int:
        """Images without an answer."""
        return sum(call.left for call in self.calls)

    @property
    def predicting(self) -> int:
        """Images without an answer, of calls that cannot wait."""
        return sum(call.left for call in self.calls if not call.bulk)

    @property
    def waiting(self) -> bool:
        """Whether an image is in nobody's hands."""
        return bool(self._to_decode or self._to_run)

    @property
    def idle(self) -> bool:
        """Whether nothing is waiting and nothing is under way, not even for calls given up."""
        return not (self.calls or self._decoded or self._running)

    def enter(self, call: Call, now: float) -> None:
        """Let a call wait its turn.

        Raises:
            LimitExceededError: too much is waiting.
            DeadlineError: it cannot be answered in time.
        """
        if not call.bulk:
            self._check_room(call)
        if call.deadline != FOREVER:
            self._check_time(call, now)
        self.calls[call] = None
        if call.sources:
            self._to_decode.append(call)
        if call.ready:
            self._to_run.append(call)

    def leave(self, call: Call) -> None:
        """Let go of a call, whether it has ended or is given up."""
        if call.ended:
            return
        call.ended = True
        del self.calls[call]
        self._drop(call)
        if not self.calls:
            self._pace.pause()

    def next_image(self, now: float) -> Image | None:
        """Take the image that is to be decoded next; None without one, or without room for it."""
        while self._to_decode and self._decoded < max(_DECODED, 2 * self.batch * self.runs):
            call = self._to_decode[0]
            if self._is_late(call, now):
                continue
            self._to_decode.popleft()
            index, source = call.sources.popleft()
            if call.sources:
                self._to_decode.append(call)
            call.under_way += 1
            self._decoded += 1
            return call, index, source
        return None

    def prepared(self, call: Call, index: int, outcome: Floats | BaseException) -> None:
        """Give an image back.

        Args:
            call: Its call.
            index: Which of the call's images it is.
            outcome: Its pixels, or why there are none.
        """
        call.under_way -= 1
        if isinstance(outcome, BaseException):
            self._fail(call, index, outcome)
        elif not call.ended and call.fault is None:
            call.ready.append((index, outcome))
            if len(call.ready) == 1:
                self._to_run.append(call)
            return
        self._decoded -= 1
        self._settle(call)

    def next_batch(self, now: float) -> list[Prepared]:
        """Take the images that are to be classified next, of one version; empty if there are none.

        In bulk, all runs but one are taken at most.
        """
        if self._running >= self.runs:
            return []
        may_bulk = self._bulk_running < max(1, self.runs - 1)
        turns: deque[Call] = deque()
        for call in list(self._to_run):
            if call.bulk and not may_bulk:
                continue
            if (not turns or call.predictor is turns[0].predictor) and not self._is_late(call, now):
                turns.append(call)
        batch: list[Prepared] = []
        while turns and len(batch) < self.batch:
            call = turns.popleft()
            self._to_run.remove(call)
            batch.append((call, *call.ready.popleft()))
            call.under_way += 1
            if call.ready:
                self._to_run.append(call)
                turns.append(call)
        if batch:
            self._running += 1
            self._bulk_running += _in_bulk(batch)
        return batch

    def is_alone(self, batch: Sequence[Prepared]) -> bool:
        """Whether nothing but ``batch``, which was taken, needs the processors."""
        return self._running == 1 and self.images == len(batch)

    def classified(
        self, batch: Sequence[Prepared], outcome: Answers | BaseException, began: float, now: float
    ) -> None:
        """Give a batch back.

        Args:
            batch: From ``next_batch``.
            outcome: Its answers, or why there are none.
            began: When the run began.
            now: When it ended.
        """
        self._running -= 1
        self._bulk_running -= _in_bulk(batch)
        for row, (call, index, _) in enumerate(batch):
            call.under_way -= 1
            self._decoded -= not call.bulk
            if isinstance(outcome, BaseException):
                self._fail(call, index, outcome)
            elif not call.ended and call.fault is None:
                call.answers[index] = outcome[row : row + 1]
                call.left -= 1
            self._settle(call)
        if isinstance(outcome, Answers):
            self._pace.ran(now - began, len(batch), now)
        if not self.calls:
            self._pace.pause()

    def _check_room(self, call: Call) -> None:
        others = [other for other in self.calls if not other.bulk]
        if not others:
            return
        images = sum(other.left for other in others)
        size = sum(other.bytes for other in others)
        for what, waiting, more, most in (
            ("images", images, call.left, self._limits.predict_waiting_images),
            ("bytes of images", size, call.bytes, self._limits.predict_waiting_bytes),
        ):
            if waiting + more > most:
                raise LimitExceededError(
                    f"the server is busy: {waiting} {what} are waiting, and at most {most} may: "
                    "retry later"
                )

    def _check_time(self, call: Call, now: float) -> None:
        left = call.deadline - now
        # Of a call with more images than this one has, no more come first: they take turns.
        before = sum(min(other.left, call.left) for other in self.calls)
        needed = self._pace.until(before + call.left) if before else 0.0
        if needed < left:
            return
        self._pace.doubted = True
        raise DeadlineError(
            f"{before} images come first, which takes about {needed:.3f} s with it, and "
            f"{max(left, 0.0):.3f} s are left: retry later, or allow more time"
        )

    def _is_late(self, call: Call, now: float) -> bool:
        """Whether a call cannot be answered in time any more; it fails if so."""
        needed = self._pace.until(1) if len(self.calls) > 1 else 0.0
        if now + needed < call.deadline:
            return False
        if now < call.deadline:
            self._pace.doubted = True
        self._fail(call, -1, DeadlineError("others came first, and not enough time is left"))
        self._settle(call)
        return True

    def _fail(self, call: Call, index: int, error: BaseException) -> None:
        # Images are begun with in their order: the first that is at fault is always found.
        if call.fault is None or index < call.fault[0]:
            call.fault = index, error
        self._drop(call)

    def _settle(self, call: Call) -> None:
        """End a call that is answered, or has failed and is in nobody's hands any more."""
        if not call.ended and not call.under_way and (call.fault or not call.left):
            self.leave(call)
            self.settled.append(call)

    def _drop(self, call: Call) -> None:
        """Forget the images of a call that are in nobody's hands."""
        if call.sources:
            self._to_decode.remove(call)
            call.sources.clear()
        if call.ready:
            self._to_run.remove(call)
            self._decoded -= 0 if call.bulk else len(call.ready)
            call.ready.clear()


@dataclass
class _Pace:
    """Averages that say how long answers take.

    Attributes:
        run: Seconds of a run.
        image: Seconds from one image to the next while there is always another one.
        last: When the last run ended, if there were others by then.
        doubted: Whether a call was refused because of them.
    """

    run: float = 0.0
    image: float = 0.0
    last: float | None = None
    doubted: bool = False

    def until(self, images: int) -> float:
        """Return the seconds until that many images are answered."""
        return self.run + (images - 1) * self.image

    def ran(self, seconds: float, images: int, now: float) -> None:
        self.run += _NEWEST * (seconds - self.run)
        if self.last is not None:
            self.image += _NEWEST * ((now - self.last) / images - self.image)
        self.last = now

    def pause(self) -> None:
        """Note that there is nothing to do: the time until the next run says nothing."""
        self.last = None
        if self.doubted:
            self.run *= _DOUBT
            self.image *= _DOUBT
            self.doubted = False


def _in_bulk(batch: Sequence[Prepared]) -> bool:
    return any(call.bulk for call, _, _ in batch)


def _size(source: Source) -> int:
    return len(source) if isinstance(source, bytes) else source.nbytes
