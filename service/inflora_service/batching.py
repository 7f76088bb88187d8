"""Images of many calls on their way through decoding and the model, in threads.

A thread that has nothing to do takes what is next, so an image never waits for a timer or for a
batch to fill: a batch is what came while the model was busy. ``turns`` decides what is next.

Every thread both decodes and runs the model, and what is decoded comes first. With as many threads
as processors, none waits for one, and who came first is answered first: with others that decode
ahead, the slowest of eight clients' calls took half as long again.
"""

from __future__ import annotations

import asyncio
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np

from inflora_core.config import Limits
from inflora_core.errors import InfloraError, UnavailableError
from inflora_core.images import picture
from inflora_core.predictor import Answers, Floats, Predictor
from inflora_service.turns import FOREVER, Call, Image, Prepared, Source, Turns

T = TypeVar("T")


@dataclass(frozen=True)
class _Waiting:
    """Somebody who waits for a call to end."""

    call: Call
    finish: Callable[[Answers], Any]
    done: asyncio.Future[Any]


class Batcher:
    """Decodes and classifies images of many calls. ``close`` ends its threads.

    Args:
        limits: What images are refused, and how many may wait.
        threads: Images that are decoded, and runs of the model, at a time.
        runs: Runs of the model at a time, at the most.
        on_run: Told of every run, one at a time, while others wait: its images of predictions,
            those that could wait, and its seconds.
    """

    def __init__(
        self,
        limits: Limits,
        threads: int,
        runs: int,
        on_run: Callable[[int, int, float], None] = lambda images, bulk, seconds: None,
    ) -> None:
        self._limits = limits
        self._on_run = on_run
        self._turns = Turns(limits, runs)
        self._waiting: dict[Call, _Waiting] = {}
        self._closed = False
        self._changed = threading.Condition()
        for number in range(1, threads + 1):
            threading.Thread(target=self._work, name=f"predict-{number}").start()

    @property
    def waiting(self) -> int:
        """Images of predictions without an answer."""
        with self._changed:
            return self._turns.predicting

    def take_batches(self, most: int, runs: int) -> None:
        """Give the model what it likes, from now on.

        Args:
            most: Images of a run; 1 at first.
            runs: Runs at a time.
        """
        with self._changed:
            self._turns.batch = most
            self._turns.runs = runs
            self._changed.notify_all()

    def close(self) -> None:
        """Give all calls up, and end the threads once they are done with what they hold."""
        with self._changed:
            self._closed = True
            for call in list(self._turns.calls):
                self._turns.leave(call)
                done = self._waiting.pop(call).done
                with suppress(RuntimeError):  # the loop is closed
                    done.get_loop().call_soon_threadsafe(done.cancel)
            self._changed.notify_all()

    async def predict(
        self,
        predictor: Predictor,
        images: Sequence[Source],
        finish: Callable[[Answers], T],
        deadline: float = FOREVER,
    ) -> T:
        """Return what ``finish`` makes of the answers for images.

        Args:
            predictor: Answers.
            images: At least one.
            finish: Is called in a thread, with the answers in the images' order.
            deadline: When the answer is of no use any more, by ``time.monotonic``.

        Raises:
            LimitExceededError: too much is waiting.
            DeadlineError: it cannot be answered in time.
            InvalidInputError: an image is not acceptable; the first such is named.
            UnavailableError: it is closed.
        """
        return await self._answer(
            Call(predictor, deadline, sources=deque(enumerate(images))), finish
        )

    async def classify_in_bulk(
        self, predictor: Predictor, pixels: Sequence[Floats], finish: Callable[[Answers], T]
    ) -> T:
        """Return what ``finish`` makes of the answers for images that are prepared, and can wait.

        They take turns with others, but never the last of several runs, and there is always room
        for them.

        Args:
            predictor: Answers.
            pixels: At least one, each (1, 3, height, width) float32.
            finish: As for ``predict``.
        """
        return await self._answer(
            Call(predictor, bulk=True, ready=deque(enumerate(pixels))), finish
        )

    async def _answer(self, call: Call, finish: Callable[[Answers], T]) -> T:
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        with self._changed:
            if self._closed:
                raise UnavailableError("the server is stopping")
            self._turns.enter(call, time.monotonic())
            self._waiting[call] = _Waiting(call, finish, done)
            self._changed.notify(call.left)
        try:
            return await done
        finally:
            with self._changed:
                self._waiting.pop(call, None)
                if not call.ended:  # given up, it leaves its place at once
                    self._turns.leave(call)
                    self._changed.notify_all()
            if done.done() and not done.cancelled():
                done.exception()  # looked at, should both it and a cancellation have come
            del call, done  # an error that comes from here holds this frame, and they the error

    def _work(self) -> None:
        # A turn's variables end with it: those of a thread that waits would keep a version in
        # memory.
        while self._take_turn():
            pass

    def _take_turn(self) -> bool:
        """Classify one batch, or decode one image; return whether there may be more to do."""
        batch: list[Prepared] = []
        image: Image | None = None
        with self._changed:
            while not (batch := self._turns.next_batch(time.monotonic())) and not (
                image := self._turns.next_image(time.monotonic())
            ):
                _tell(self._settled())
                if self._closed:
                    return False
                self._changed.wait()
            alone = bool(batch) and self._turns.is_alone(batch)
            settled = self._settled()
        _tell(settled)
        if batch:
            self._run(batch, alone)
        elif image:
            self._decode(*image)
        return True

    def _decode(self, call: Call, index: int, source: Source) -> None:
        def prepare() -> Floats:
            if not isinstance(source, bytes):
                return call.predictor.preprocess(source)
            decoded = picture(source, self._limits, field=f"images[{index}]")
            # Down to the model's size at once: hundreds of decoded photos would fill the memory.
            return call.predictor.preprocess(decoded)

        outcome = _attempt(prepare)
        with self._changed:
            self._turns.prepared(call, index, outcome)
            settled = self._settled()
        _tell(settled)

    def _run(self, batch: Sequence[Prepared], alone: bool) -> None:
        def classify() -> Answers:
            images = [each for _, _, each in batch]
            pixels = images[0] if len(images) == 1 else np.concatenate(images)
            return batch[0][0].predictor.classify(pixels, alone=alone)

        began = time.monotonic()
        outcome = _attempt(classify)
        ended = time.monotonic()
        bulk = sum(call.bulk for call, _, _ in batch)
        with self._changed:
            self._turns.classified(batch, outcome, began, ended)
            if isinstance(outcome, Answers):
                self._on_run(len(batch) - bulk, bulk, ended - began)
            if self._turns.waiting:
                self._changed.notify(len(batch))  # so many more may be decoded
            settled = self._settled()
        _tell(settled)

    def _settled(self) -> list[_Waiting]:
        """Return the calls that have ended and that somebody waits for."""
        settled = [self._waiting.pop(call) for call in self._turns.settled if call in self._waiting]
        self._turns.settled.clear()
        return settled


def _tell(settled: Sequence[_Waiting]) -> None:
    """Tell those who wait for calls how they ended."""
    for waiting in settled:
        call, finish = waiting.call, waiting.finish
        outcome = call.fault[1] if call.fault else _attempt(partial(_finish, call, finish))
        with suppress(RuntimeError):  # the loop is closed
            waiting.done.get_loop().call_soon_threadsafe(_resolve, waiting.done, outcome)


def _finish(call: Call, finish: Callable[[Answers], T]) -> T:
    return finish(Answers.joined(call.answers[index] for index in sorted(call.answers)))


def _resolve(done: asyncio.Future[Any], outcome: object) -> None:
    if done.done():
        return  # given up
    if isinstance(outcome, BaseException):
        done.set_exception(outcome)
    else:
        done.set_result(outcome)


def _attempt(work: Callable[[], T]) -> T | Exception:
    """Return what ``work`` returns, or its error with its traceback as a note.

    A traceback has frames, which hold the call and its version, and the call holds the error: a
    version with a call that failed would stay in memory long after it was swapped.
    """
    try:
        return work()
    except Exception as error:
        if not isinstance(error, InfloraError):
            error.add_note("".join(traceback.format_exception(error)))
        error.__cause__ = error.__context__ = None  # they have tracebacks, too
        return error.with_traceback(None)
