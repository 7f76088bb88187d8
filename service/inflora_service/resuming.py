"""Uploads under way, and those that broke off and can be continued.

What breaks off, and has a request id, stays on the disk for a time: a connection that is lost, a
client or a server that is killed. What is refused does not.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from inflora_core import durable
from inflora_core.config import Limits
from inflora_core.errors import (
    BrokenOffError,
    ConflictError,
    DamagedError,
    InfloraError,
    StateError,
    UnavailableError,
)
from inflora_core.model import now
from inflora_core.predictor import processors
from inflora_core.spool import IMAGES, INDEX, read_origin, recover
from inflora_service.aio import unbroken
from inflora_service.examples import Examples
from inflora_service.space import Space
from inflora_service.uploads import Progress, TaskRequest, Upload

log = logging.getLogger(__name__)

GRACE_SECONDS = 60.0
"""A partial upload is kept for at least as long after a start of the server, or for its whole time
if that is less: by a clock that was wrong it may seem too old."""


@dataclass(frozen=True)
class PartialUpload:
    """What can be continued.

    Attributes:
        count: Examples that are durable.
        size: Their encoded bytes.
        expire_time: When it is removed unless it is continued.
    """

    count: int
    size: int
    expire_time: datetime


@dataclass
class _Feeding:
    """An upload that a connection feeds.

    Attributes:
        upload: The upload.
        handler: What is to be cancelled for another connection to take over.
        displaced: Another one does.
        left: Set once the spool is closed.
    """

    upload: Upload
    handler: asyncio.Task[object]
    displaced: bool = False
    left: asyncio.Event = field(default_factory=asyncio.Event)

    def displace(self) -> None:
        if not self.displaced:
            self.displaced = True
            self.handler.cancel()


@dataclass
class _Waiting:
    """An upload that broke off.

    Attributes:
        id: Name of its spool.
        request: Its spec.
        deadline: By the clock that never goes back.
        size: Bytes of images on the disk.
        progress: How much of it is durable; None until somebody looks.
        looking: Held by whoever does.
    """

    id: str
    request: TaskRequest
    deadline: float
    size: int
    progress: Progress | None = None
    looking: asyncio.Lock = field(default_factory=asyncio.Lock)


class Uploads:
    """All uploads of one store.

    Args:
        examples: Where spools are.
        space: Says whether there is room.
        limits: What is refused, and how long what breaks off is kept.
        clock: Seconds, as ``time.monotonic``.
    """

    def __init__(
        self,
        examples: Examples,
        space: Space,
        limits: Limits,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._examples = examples
        self._space = space
        self._limits = limits
        self._clock = clock
        self._feeding: dict[str, _Feeding] = {}
        self._newest: dict[str, _Feeding] = {}
        self._waiting: dict[str, _Waiting] = {}
        # Half of the processors: checking an upload must not hold up predictions.
        self._checkers = ThreadPoolExecutor(max(1, processors() // 2), "upload-check")

    def adopt(self, tasks: Collection[str]) -> None:
        """Take up what broke off with the last process. Blocks; only at the start.

        Args:
            tasks: Those whose spools are theirs.
        """
        for name in self._examples.spooled():
            folder = self._examples.spools / name
            if name in tasks:
                continue
            try:
                request = TaskRequest.of_origin(read_origin(folder))
                age = time.time() - (folder / INDEX).stat().st_mtime
                size = (folder / IMAGES).stat().st_size
            except (DamagedError, OSError) as error:
                log.info("the upload in %s cannot be continued: %s", folder, error)
                continue
            longest = self._limits.upload_seconds
            left = min(max(longest - age, GRACE_SECONDS), longest)
            found = _Waiting(name, request, self._clock() + left, size)
            # Of several, which a crash may leave, the one that grew last.
            other = self._waiting.get(request.request_id)
            if other is None or other.deadline <= found.deadline:
                self._waiting[request.request_id] = found
        if self._waiting:
            log.info("%d uploads that broke off can be continued", len(self._waiting))

    async def close(self) -> None:
        """Wait for all uploads to be closed, and let the threads go."""
        for feeding in list(self._feeding.values()):
            await feeding.left.wait()
        self._checkers.shutdown(wait=False, cancel_futures=True)

    def hold(self, spool: str) -> bool:
        """Whether a spool is that of an upload, and nobody else's to remove."""
        return spool in self._feeding or any(w.id == spool for w in self._waiting.values())

    async def expire(self) -> None:
        """Remove what nobody continued in time."""
        for waiting in list(self._waiting.values()):
            if waiting.deadline <= self._clock():
                await self._drop(waiting)
        await self._trim()

    async def query(self, request_id: str) -> PartialUpload | None:
        """Return how much there is of the upload with that id; None if nothing.

        What has arrived of one that is under way is made durable first.

        Raises:
            OSError: it cannot be read or written.
        """
        left = self._limits.upload_seconds
        if (feeding := self._newest.get(request_id)) is not None:
            progress = await feeding.upload.flush()
        elif (waiting := self._waiting.get(request_id)) is not None:
            async with waiting.looking:
                if self._waiting.get(request_id) is not waiting:
                    return await self.query(request_id)  # somebody came to continue it
                progress = await self._look(waiting)
            left = waiting.deadline - self._clock()
        else:
            return None
        if not progress.count:
            return None
        return PartialUpload(progress.count, progress.size, now() + timedelta(seconds=left))

    @asynccontextmanager
    async def open(self, request: TaskRequest, new_id: str) -> AsyncIterator[Upload]:
        """The upload that ``request`` begins or continues, to be filled and made a task.

        Leaving it decides what becomes of the spool: it is the task's, or waits to be continued, or
        is removed.

        Raises:
            StateError: there is not that much to continue.
            ConflictError: the upload that is there has another spec; or another connection came to
                continue this one.
        """
        waiting = await self._claim(request) if request.resume_from else None
        handler = asyncio.current_task()
        assert handler is not None, "a coroutine runs in a task"
        folder = self._examples.spools / (waiting.id if waiting else new_id)
        upload = Upload(request, folder, self._limits, self._space, self._checkers)
        feeding = _Feeding(upload, handler)
        replaced = self._register(feeding)
        refused = False
        try:
            if replaced is not None:
                await asyncio.to_thread(self._examples.remove, replaced.id)
            if waiting is not None:
                await self._resume(upload)
            yield upload
        except asyncio.CancelledError:
            if not feeding.displaced:
                raise
            handler.uncancel()
            raise ConflictError(
                "another connection continues this upload", field="spec.request_id"
            ) from None
        except Exception as error:
            refused = _refuses(error)
            raise
        else:
            refused = True  # another upload of the same request became the task
        finally:
            await unbroken(self._leave(feeding, refused, waiting))

    def _register(self, feeding: _Feeding) -> _Waiting | None:
        """Note an upload that begins; return what it replaces."""
        self._feeding[feeding.upload.id] = feeding
        request_id = feeding.upload.request.request_id
        if not request_id:
            return None
        self._newest[request_id] = feeding
        return self._waiting.pop(request_id, None)

    async def _claim(self, request: TaskRequest) -> _Waiting:
        """Take an upload out of those that wait, from another connection if one feeds it."""
        request_id = request.request_id
        while (feeding := self._newest.get(request_id)) is not None:
            _check_same(feeding.upload.request, request)
            feeding.displace()
            await feeding.left.wait()
        waiting = self._waiting.get(request_id)
        if waiting is None:
            raise _not_from(0)
        _check_same(waiting.request, request)
        async with waiting.looking:
            pass  # nobody cuts it back any more
        if self._waiting.get(request_id) is not waiting:
            return await self._claim(request)
        return self._waiting.pop(request_id)

    async def _resume(self, upload: Upload) -> None:
        """Go on where the upload broke off, if that is where the client goes on."""
        there = await upload.reopen()
        if there != upload.request.resume_from:
            raise _not_from(there)

    async def _leave(self, feeding: _Feeding, refused: bool, before: _Waiting | None) -> None:
        """Close an upload's spool, and let it wait unless it is refused or a task's.

        Args:
            feeding: The upload.
            refused: Whether it cannot be continued.
            before: What it was to continue.
        """
        upload = feeding.upload
        request_id = upload.request.request_id
        # What a connection sends while another takes over would only put that one out of step.
        progress = await upload.close(flush=not (refused or feeding.displaced))
        superseded = self._newest.get(request_id) is not feeding
        if not superseded:
            del self._newest[request_id]
        if not upload.accepted:
            if before is not None and not upload.looked and not superseded:
                self._waiting[request_id] = before  # it could not even be looked at
            elif refused or superseded or not progress.count:
                await asyncio.to_thread(self._examples.remove, upload.id)
            else:
                await self._wait(upload, progress)
        del self._feeding[upload.id]
        feeding.left.set()

    async def _wait(self, upload: Upload, progress: Progress) -> None:
        """Let an upload wait to be continued."""
        deadline = self._clock() + self._limits.upload_seconds
        request = replace(upload.request, resume_from=0)
        found = _Waiting(upload.id, request, deadline, progress.size, progress)
        self._waiting[request.request_id] = found
        log.info("upload %s broke off after %d examples", upload.id, progress.count)
        await self._trim()

    async def _trim(self) -> None:
        """Let those go that have waited longest, while there are too many."""
        while len(self._waiting) > self._limits.partial_uploads or (
            sum(waiting.size for waiting in self._waiting.values()) > self._limits.partial_bytes
        ):
            oldest = min(self._waiting.values(), key=lambda waiting: waiting.deadline)
            await self._drop(oldest)

    async def _drop(self, waiting: _Waiting) -> None:
        if self._waiting.get(waiting.request.request_id) is not waiting:
            return  # somebody came to continue it while another one was removed
        log.info("upload %s is removed: nobody continued it", waiting.id)
        del self._waiting[waiting.request.request_id]
        await asyncio.to_thread(self._examples.remove, waiting.id)

    async def _look(self, waiting: _Waiting) -> Progress:
        if waiting.progress is None:
            folder = self._examples.spools / waiting.id
            state = await unbroken(asyncio.to_thread(recover, folder))
            waiting.progress = Progress(state.count, state.size)
        return waiting.progress


def _check_same(first: TaskRequest, now: TaskRequest) -> None:
    """Refuse to continue an upload as another one than it was."""
    if first.origin() != now.origin():
        raise ConflictError(
            "the upload was begun with another spec: it is the same but for resume_from",
            field="spec",
        )


def _not_from(count: int) -> StateError:
    return StateError(
        f"{count} examples are there, so it goes on from {count}", field="spec.resume_from"
    )


def _refuses(error: Exception) -> bool:
    """Whether an upload that ends with ``error`` cannot be continued."""
    if isinstance(error, OSError):
        return durable.is_full(error)  # what takes up the room goes
    return isinstance(error, InfloraError) and not isinstance(
        error, (BrokenOffError, UnavailableError, StateError)
    )
