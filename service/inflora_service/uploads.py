"""Examples on their way in: each is checked as it arrives. Those of a task are spooled."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inflora_core.config import Limits
from inflora_core.errors import InvalidInputError, LimitExceededError
from inflora_core.images import decode
from inflora_core.labels import check_label
from inflora_core.spool import SpoolSummary, SpoolWriter
from inflora_service.aio import map_threads, unbroken

_SLICE = 16
"""Examples a thread checks at a time: a message can hold a hundred thousand tiny ones."""


@dataclass(frozen=True)
class TaskRequest:
    """What a client asks for in a spec, checked.

    Attributes:
        display_name: Free text.
        request_id: "" or the client's own id of the request.
        settings: Fields of ``LearnConfig`` that the spec sets.
    """

    display_name: str
    request_id: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class Example:
    """One labelled image as it arrived."""

    image: bytes
    label: str


def decode_example(example: Example, index: int, limits: Limits) -> NDArray[np.uint8]:
    """Return the pixels of an upload's example number ``index``.

    Raises:
        InvalidInputError: its label or image is not acceptable; its field is named.
        LimitExceededError: its image is too large.
    """
    check_label(example.label, field=f"examples[{index}].label")
    return decode(example.image, limits, field=f"examples[{index}].image")


class Intake:
    """How much of an upload has arrived.

    Args:
        limits: What is refused.

    Attributes:
        count: Examples so far.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.count = 0
        self._size = 0

    def take(self, examples: Sequence[Example]) -> int:
        """Count a batch; return the number of its first example, from 0.

        Raises:
            InvalidInputError: the batch is empty.
            LimitExceededError: all in all there are too many images, or they are too large.
        """
        if not examples:
            raise InvalidInputError("a batch holds at least one example", field="examples")
        start = self.count
        self.count += len(examples)
        self._size += sum(len(example.image) for example in examples)
        if self.count > self._limits.task_images:
            raise LimitExceededError(
                f"an upload has at most {self._limits.task_images} images", field="examples"
            )
        if self._size > self._limits.task_bytes:
            raise LimitExceededError(
                f"an upload's images have at most {self._limits.task_bytes} bytes in all",
                field="examples",
            )
        return start

    def check_count(self, count: int) -> None:
        """Raise ``InvalidInputError`` unless ``count`` examples have arrived."""
        if count != self.count:
            raise InvalidInputError(
                f"{count} examples were announced, {self.count} arrived", field="end.example_count"
            )


class Upload:
    """Collects a task's examples; leave it unfinished and nothing of them is left.

    Args:
        request: What the spec asked for.
        folder: Where the spool is made.
        limits: What is refused.
        pool: Threads that decode images to check them.
    """

    def __init__(self, request: TaskRequest, folder: Path, limits: Limits, pool: Executor) -> None:
        self.request = request
        self._labels: set[str] = set()
        self._folder = folder
        self._limits = limits
        self._pool = pool
        self._spool: SpoolWriter | None = None
        self._intake = Intake(limits)

    @property
    def id(self) -> str:
        """Id of the task to be: its spool's name."""
        return self._folder.name

    async def __aenter__(self) -> Upload:
        """Return self. The spool is made with the first examples."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove the spool unless it is finished."""
        if self._spool is not None:
            await unbroken(asyncio.to_thread(self._spool.__exit__, kind, error, trace))

    async def add(self, examples: Sequence[Example]) -> None:
        """Check a batch and spool it.

        Raises:
            InvalidInputError: a label or an image is not acceptable; its field is named.
            LimitExceededError: the task is over a limit.
        """
        start = self._intake.take(examples)
        slices = [
            (start + at, examples[at : at + _SLICE]) for at in range(0, len(examples), _SLICE)
        ]
        await map_threads(self._pool, self._check_examples, slices)
        for index, example in enumerate(examples, start):
            if example.label not in self._labels:
                self._admit(example.label, f"examples[{index}].label")
        await unbroken(asyncio.to_thread(self._write, examples))

    def check_count(self, count: int) -> None:
        """Raise ``InvalidInputError`` unless ``count`` examples have arrived."""
        self._intake.check_count(count)

    def finish(self) -> SpoolSummary:
        """Flush the examples to the disk, from where nothing but their new owner removes them.

        Blocks.

        Raises:
            InvalidInputError: there are none.
        """
        if self._spool is None:
            raise InvalidInputError("the task is empty: send examples", field="examples")
        return self._spool.finish()

    def _check_examples(self, numbered: tuple[int, Sequence[Example]]) -> None:
        start, examples = numbered
        for index, example in enumerate(examples, start):
            decode_example(example, index, self._limits)

    def _admit(self, label: str, field: str) -> None:
        if len(self._labels) == self._limits.task_classes:
            raise LimitExceededError(
                f"a task has at most {self._limits.task_classes} classes", field=field
            )
        self._labels.add(label)

    def _write(self, examples: Sequence[Example]) -> None:
        # Made here, where it cannot be lost to a cancellation between making and keeping it.
        self._spool = self._spool or SpoolWriter(self._folder)
        for example in examples:
            self._spool.add(example.image, example.label)
