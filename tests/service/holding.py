"""Runs of the model that wait until a test lets them go, and what is waiting meanwhile."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from inflora_core.config import Limits
from inflora_core.images import decode
from inflora_core.predictor import Answers, Predictor
from inflora_service.turns import Turns


class Gate:
    """Holds up the classification of an image, in its thread.

    Attributes:
        waiting: Runs that are held up now.
        most: Most that were at a time.
        arrived: Set once one was.
        open: Set to let them go.
    """

    def __init__(self) -> None:
        self.waiting = 0
        self.most = 0
        self.arrived = threading.Event()
        self.open = threading.Event()

    def pass_through(self) -> None:
        self.waiting += 1
        self.most = max(self.most, self.waiting)
        self.arrived.set()
        assert self.open.wait(60)
        self.waiting -= 1


@contextmanager
def gate(monkeypatch: pytest.MonkeyPatch, image: bytes) -> Iterator[Gate]:
    """Hold up runs with ``image`` among theirs, until the block ends or the gate is opened."""
    gate, classify = Gate(), Predictor.classify
    decoded = decode(image, Limits())

    def held_up(self: Predictor, pixels: Any, **more: Any) -> Answers:
        held = self.preprocess(decoded)[0]
        if any(np.array_equal(each, held) for each in pixels):
            gate.pass_through()
        return classify(self, pixels, **more)

    monkeypatch.setattr(Predictor, "classify", held_up)
    try:
        yield gate
    finally:
        gate.open.set()


class Watched:
    """The newest state of a server's calls, which can be waited for.

    Attributes:
        images: Images without an answer.
        idle: Whether nothing is under way, not even for calls that were given up.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.images = 0
        self.idle = True
        self._changed = threading.Condition()
        for name in ("enter", "leave", "prepared", "classified"):
            monkeypatch.setattr(Turns, name, self._seen(getattr(Turns, name)))

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until something holds of the attributes."""

        def wait() -> bool:
            with self._changed:
                return self._changed.wait_for(holds, 60)

        assert await asyncio.to_thread(wait)

    def _seen(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def seen(turns: Turns, *arguments: Any) -> Any:
            try:
                return method(turns, *arguments)
            finally:
                with self._changed:
                    self.images, self.idle = turns.images, turns.idle
                    self._changed.notify_all()

        return seen
