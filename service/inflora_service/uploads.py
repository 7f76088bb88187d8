"""Examples on their way in: each is checked as it arrives. Those of a task are spooled."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from inflora_core import durable
from inflora_core.config import Limits
from inflora_core.errors import DamagedError, InvalidInputError, LimitExceededError
from inflora_core.images import decode
from inflora_core.labels import check_label
from inflora_core.spool import SpoolSummary, SpoolWriter, recover
from inflora_service.aio import map_threads, unbroken
from inflora_service.space import Space

log = logging.getLogger(__name__)

_SLICE = 16
"""Examples a thread checks at a time: a message can hold a hundred thousand tiny ones."""


@dataclass(frozen=True)
class TaskRequest:
    """What a client asks for in a spec, checked.

    Attributes:
        display_name: Free text.
        request_id: "" or the client's own id of the request.
        settings: Fields of ``LearnConfig`` that the spec sets.
        resume_from: Examples that are there already; 0 to begin anew.
    """

    display_name: str
    request_id: str
    settings: dict[str, Any]
    resume_from: int = 0

    def origin(self) -> dict[str, Any] | None:
        """Return what is written beside the spool, None if the upload cannot be continued."""
        if not self.request_id:
            return None
        origin = asdict(self)
        del origin["resume_from"]
        return origin

    @classmethod
    def of_origin(cls, origin: dict[str, Any]) -> TaskRequest:
        """Return the request that ``origin`` was written for.

        Raises:
            DamagedError: there can be none.
        """
        try:
            return _REQUEST.validate_json(json.dumps(origin), strict=True)
        except ValidationError as error:
            raise DamagedError(f"the spec of an upload cannot be read: {error}") from error


_REQUEST = TypeAdapter(TaskRequest)


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

    def go_on(self, count: int, size: int) -> None:
        """Count what is there of an upload that is continued.

        Args:
            count: Its examples.
            size: Their encoded bytes.
        """
        self.count, self._size = count, size

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


@dataclass(frozen=True)
class Progress:
    """How far an upload has come, for good.

    Attributes:
        count: Examples that a power cut cannot lose.
        size: Their encoded bytes.
    """

    count: int
    size: int


class Upload:
    """Collects a task's examples. Whoever made it closes it, and says what becomes of its spool.

    Args:
        request: What the spec asked for.
        folder: Where the spool is made, or is already.
        limits: What is refused.
        space: Says whether there is room.
        pool: Threads that decode images to check them.

    Attributes:
        accepted: Set by whoever makes it a task, whose the spool is from then on.
        looked: Whether it is known what is there of its spool.
    """

    def __init__(
        self, request: TaskRequest, folder: Path, limits: Limits, space: Space, pool: Executor
    ) -> None:
        self.request = request
        self.accepted = False
        self.looked = False
        self._labels: set[str] = set()
        self._folder = folder
        self._limits = limits
        self._space = space
        self._pool = pool
        self._spool: SpoolWriter | None = None
        self._intake = Intake(limits)
        # Others ask how much is durable while examples are written.
        self._writing = asyncio.Lock()

    @property
    def id(self) -> str:
        """Id of the task to be: its spool's name."""
        return self._folder.name

    async def reopen(self) -> int:
        """Go on with what is there of the spool; return the number of its examples.

        Raises:
            OSError: it cannot be read or written now.
        """
        async with self._writing:
            await unbroken(asyncio.to_thread(self._reopen))
        return self._intake.count

    async def add(self, examples: Sequence[Example]) -> None:
        """Check a batch and spool it.

        Raises:
            InvalidInputError: a label or an image is not acceptable; its field is named.
            LimitExceededError: the task is over a limit, or the disk has no room.
        """
        start = self._intake.take(examples)
        slices = [
            (start + at, examples[at : at + _SLICE]) for at in range(0, len(examples), _SLICE)
        ]
        await map_threads(self._pool, self._check_examples, slices)
        for index, example in enumerate(examples, start):
            if example.label not in self._labels:
                self._admit(example.label, f"examples[{index}].label")
        async with self._writing:
            await unbroken(asyncio.to_thread(self._write, examples))

    def check_count(self, count: int) -> None:
        """Raise ``InvalidInputError`` unless ``count`` examples have arrived."""
        self._intake.check_count(count)

    async def flush(self) -> Progress:
        """Make durable what has arrived, unless it is closed; return how much that is."""
        async with self._writing:
            if self._spool is not None and not self._spool.closed:
                await unbroken(asyncio.to_thread(self._spool.flush))
            return self._progress

    async def finish(self) -> SpoolSummary:
        """Flush the examples to the disk, sealed.

        Raises:
            InvalidInputError: there are none.
        """
        async with self._writing:
            if self._spool is None:
                raise InvalidInputError("the task is empty: send examples", field="examples")
            return await unbroken(asyncio.to_thread(self._spool.finish))

    async def close(self, *, flush: bool) -> Progress:
        """Leave the spool as it is; return how much of it is durable.

        Args:
            flush: Whether to make durable what has arrived, as far as that is possible.
        """
        async with self._writing:
            if self._spool is not None:
                await unbroken(asyncio.to_thread(self._close, self._spool, flush))
            return self._progress

    @property
    def _progress(self) -> Progress:
        spool = self._spool
        return Progress(spool.durable_count, spool.durable_size) if spool else Progress(0, 0)

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
        self._space.check(sum(len(example.image) for example in examples))
        # Made here, where it cannot be lost to a cancellation between making and keeping it.
        self._spool = self._spool or SpoolWriter(self._folder, self.request.origin())
        for example in examples:
            self._spool.add(example.image, example.label)

    def _reopen(self) -> None:
        try:
            state = recover(self._folder)
        except OSError as error:
            if not durable.is_damage(error):
                raise
            log.warning("the upload in %s cannot be continued: %s", self._folder, error)
            self.looked = True
            return
        self._labels.update(state.counts)
        self._intake.go_on(state.count, state.size)
        self._spool = SpoolWriter(self._folder, state=state)
        self.looked = True

    @staticmethod
    def _close(spool: SpoolWriter, flush: bool) -> None:
        spool.suspend()
        with spool:
            if flush and not spool.finished:
                try:
                    spool.flush()
                except OSError as error:
                    log.warning("what arrived last of %s is lost: %s", spool.folder, error)
