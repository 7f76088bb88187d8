"""The queue of tasks: from an accepted upload to a published version, one task at a time.

Two things are durable: the record of a task (``records.py``) and the version that came of it
(``store.py``). Whatever happens between them, at the next start every acknowledged task is either
ended, or has a version that is published then, or is queued again.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import secrets
import shutil
from collections import deque
from collections.abc import AsyncGenerator, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from inflora_core import canary, edits, failpoints
from inflora_core.config import Gate, LearnConfig, Limits
from inflora_core.errors import (
    CancelledError,
    ConflictError,
    DamagedError,
    GateError,
    InfloraError,
    LearnerCrashedError,
    LimitExceededError,
    StateError,
    UnavailableError,
)
from inflora_core.gate import why_held_back
from inflora_core.model import (
    Edit,
    Failure,
    Forget,
    Progress,
    Stage,
    Task,
    TaskState,
    Version,
    now,
)
from inflora_core.predictor import processors
from inflora_core.spool import SpoolSummary, read_spool
from inflora_core.store import Store
from inflora_service.aio import unbroken
from inflora_service.errors import from_exception
from inflora_service.learner_process import LearnerProcess
from inflora_service.records import Snapshot, TaskRecords
from inflora_service.serving import ModelHost
from inflora_service.uploads import TaskRequest, Upload

log = logging.getLogger(__name__)

RETRY_SECONDS = 2.0
"""Between attempts to write a record that the disk does not take."""


@dataclass
class _Live:
    """A task that has not ended, or whose end is being told.

    Attributes:
        task: Its record, as it is on the disk.
        progress: The last one that the learner reported.
        cancelling: Somebody asked for it to be given up.
        changed: Set at the next change, and replaced by another event then.
    """

    task: Task
    progress: Progress | None = None
    cancelling: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def snapshot(self) -> Snapshot:
        return Snapshot(self.task, self.progress)

    def change(self, task: Task) -> None:
        self.task = task
        self.notify()

    def on_progress(self, progress: Progress) -> None:
        self.progress = progress
        self.notify()

    def notify(self) -> None:
        """Wake whoever waits for a change."""
        self.changed.set()
        self.changed = asyncio.Event()


@dataclass(frozen=True)
class EditRequest:
    """What a client asks to change in the class table, checked as far as its form goes.

    Attributes:
        request_id: "" or the client's own id of the request.
        edit: What to change.
    """

    request_id: str
    edit: Edit


class TaskQueue:
    """Accepts tasks, has them worked on first come first served, and tells how they do.

    Args:
        store: Where versions are; spools are in its folder ``spool``.
        records: The tasks.
        host: Publishes versions.
        learner: Learns tasks.
        config: Settings of tasks that ask for none.
        limits: What is refused.
        gate: What versions are held back for.
        canary_images: How many images of each new class are kept; 0 for none.
    """

    def __init__(
        self,
        store: Store,
        records: TaskRecords,
        host: ModelHost,
        learner: LearnerProcess,
        config: LearnConfig,
        limits: Limits,
        gate: Gate,
        canary_images: int,
    ) -> None:
        self._store = store
        self._records = records
        self._host = host
        self._learner = learner
        self._config = config
        self._limits = limits
        self._gate = gate
        self._canary_images = canary_images
        self._spools = store.root / "spool"
        self._live: dict[str, _Live] = {}
        self._queue: deque[_Live] = deque()
        self._publishable: list[tuple[_Live, int]] = []
        self._arrival = asyncio.Event()
        self._accepting = asyncio.Lock()
        self._stopping = False
        self._runner: asyncio.Task[None] | None = None
        # Half of the processors: checking an upload must not hold up predictions.
        self._checkers = ThreadPoolExecutor(max(1, processors() // 2), "upload-check")

    async def start(self) -> None:
        """Take up what the last process left, and begin."""
        for task in await asyncio.to_thread(self._records.unfinished):
            number = None
            if task.state is TaskState.LEARNING:
                number = await asyncio.to_thread(self._store.version_of_task, task.id)
            if number is not None:
                live = _Live(task, Progress(Stage.PUBLISHING, 1.0))
                self._publishable.append((live, number))
            else:
                live = _Live(replace(task, state=TaskState.QUEUED, start_time=None))
                await asyncio.to_thread(self._records.update, live.snapshot)
                self._queue.append(live)
            self._live[task.id] = live
        await asyncio.to_thread(self._remove_orphans)
        if self._live:
            log.info("taking up %d tasks that have not ended", len(self._live))
            self._arrival.set()
        self._runner = asyncio.create_task(self._run(), name="task-queue")

    async def stop(self) -> None:
        """Stop learning; what is not published by now is taken up at the next start.

        Waiting for tasks ends with ``UnavailableError``, so that clients ask again. Uploads can
        still be finished: their tasks are queued for the next start.
        """
        self._stopping = True
        for live in self._live.values():
            live.notify()
        if self._runner is not None:
            self._runner.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._runner

    def close(self) -> None:
        """Let the threads go once they are idle; uploads cannot go on."""
        self._checkers.shutdown(wait=False, cancel_futures=True)

    # -- accepting --------------------------------------------------------------------------

    async def upload(self, request: TaskRequest) -> Upload:
        """Return the upload of a new task, to be entered, filled, and given to ``accept``.

        Raises:
            LimitExceededError: the queue is full.
        """
        try:
            self._check_room()
        except LimitExceededError:
            # A request that was accepted before may be what fills the queue.
            if await asyncio.to_thread(self._records.by_request_id, request.request_id) is None:
                raise
        return Upload(request, self._spools / _new_id(), self._limits, self._checkers)

    async def accept(self, upload: Upload) -> Task:
        """Make the finished upload a task, durable and queued.

        Returns:
            The new task, or the one that was made by the same request before.

        Raises:
            InvalidInputError: the upload is empty.
            ConflictError: the request id was used for something else.
            LimitExceededError: the queue or the disk is full.
        """
        return await unbroken(self._accept(upload))

    async def edit(self, request: EditRequest) -> Task:
        """Make a change of the class table a task, durable and queued.

        Returns:
            The new task, or the one that was made by the same request before.

        Raises:
            ConflictError: the request id was used for something else.
            LimitExceededError: the queue or the disk is full.
            InfloraError: as ``edits.check`` does, where no task is ahead that could change what
                there is.
        """
        return await unbroken(self._accept_edit(request))

    async def _accept(self, upload: Upload) -> Task:
        summary = await asyncio.to_thread(upload.finish)
        task = _new_task(upload, summary)
        accepted = None
        try:
            async with self._accepting:
                accepted = await self._earlier(task, "spec.request_id")
                if accepted is None:
                    accepted = await self._admit(task)
        finally:
            if accepted is not task:
                await asyncio.to_thread(self._remove_spool, task.id)
        return accepted

    async def _accept_edit(self, request: EditRequest) -> Task:
        task = _new_edit(request)
        async with self._accepting:
            earlier = await self._earlier(task, "request_id")
            if earlier is not None:
                return earlier
            if not self._live:
                await self._check_edit(request.edit)
            return await self._admit(task)

    async def _earlier(self, task: Task, field: str) -> Task | None:
        """Return the task that was made by the same request before, if there is one."""
        earlier = await asyncio.to_thread(self._records.by_request_id, task.request_id)
        if earlier is None:
            return None
        # Of a task that named purged classes nothing is left to be compared.
        same_content = earlier.content_sha256 in ("", task.content_sha256)
        if earlier.kind is not task.kind or not same_content:
            raise ConflictError(
                f"request_id was used for task {earlier.id} with other content: use a new one",
                field=field,
            )
        return earlier

    async def _check_edit(self, edit: Edit) -> None:
        current = self._host.current
        classes = current.classes if current else ()
        await asyncio.to_thread(edits.check, classes, edit, self._store.tables_for(edit))

    async def _admit(self, task: Task) -> Task:
        self._check_room()
        await asyncio.to_thread(self._records.insert, task)
        live = _Live(task)
        self._live[task.id] = live
        self._queue.append(live)
        self._arrival.set()
        log.info(
            "task %s accepted: %s, %d classes, %d images",
            task.id,
            task.kind,
            len(task.labels),
            sum(task.example_counts),
        )
        return task

    def _check_room(self) -> None:
        if len(self._queue) >= self._limits.queued_tasks:
            raise LimitExceededError(
                f"{len(self._queue)} tasks are queued already: retry when one has ended"
            )

    # -- looking ----------------------------------------------------------------------------

    async def get(self, task: str) -> Snapshot:
        """Return a task as it is now.

        Raises:
            NotFoundError: there is none.
        """
        live = self._live.get(task)
        return live.snapshot if live else await self._record(task)

    async def page(self, before: int | None, size: int) -> list[tuple[int, Snapshot]]:
        """Return up to ``size`` tasks, newest first; see ``TaskRecords.page``."""
        rows = await asyncio.to_thread(self._records.page, before, size)
        return [
            (number, live.snapshot if (live := self._live.get(ended.task.id)) else ended)
            for number, ended in rows
        ]

    async def watch(self, task: str) -> AsyncGenerator[Snapshot]:
        """Yield the task as it is, then at changes, until it has ended.

        Whoever is slow to take the next one gets the newest then, and none of those between.

        Raises:
            NotFoundError: there is no such task.
            UnavailableError: the server is stopping.
        """
        live = self._live.get(task)
        if live is None:
            yield await self._record(task)
            return
        while True:
            # Both before the task can change: whoever is slow must still be told of the end.
            changed, snapshot = live.changed, live.snapshot
            yield snapshot
            if snapshot.task.state.ended:
                return
            await self._wait(changed)

    async def cancel(self, task: str) -> Snapshot:
        """Give a task up; return it once it is cancelled, or has ended otherwise meanwhile.

        Raises:
            NotFoundError: there is no such task.
            StateError: it has ended otherwise before, or is being published.
            UnavailableError: the server is stopping; whether the task is cancelled is not said.
        """
        live = self._live.get(task)
        if live is None:
            ended = await self._record(task)
            if ended.task.state is not TaskState.CANCELLED:
                raise StateError(f"task {task} is {ended.task.state} already", field="name")
            return ended
        if live.progress is not None and live.progress.stage is Stage.PUBLISHING:
            raise StateError(f"task {task} is being published", field="name")
        live.cancelling = True
        if live in self._queue:
            self._queue.remove(live)
            await unbroken(self._end(live, TaskState.CANCELLED))
        else:
            self._learner.cancel(task)
        while not live.task.state.ended:
            await self._wait(live.changed)
        return live.snapshot

    async def _wait(self, changed: asyncio.Event) -> None:
        if not self._stopping:
            await changed.wait()
        if self._stopping:
            raise UnavailableError("the server is stopping; ask again when it is back")

    async def _record(self, task: str) -> Snapshot:
        return await asyncio.to_thread(self._records.get, task)

    # -- working ----------------------------------------------------------------------------

    async def _run(self) -> None:
        for live, number in self._publishable:
            await self._guarded(live, self._publish(live, number))
        while True:
            live = await self._head()
            await self._guarded(live, self._work(live))

    async def _head(self) -> _Live:
        """Return the next task, off the queue, once there is a worker that can begin with it.

        And a version to build on: a damaged one is no fault of the tasks, which would fail of it.
        """
        await self._host.wait_sound()
        while True:
            await self._learner.wait_ready()
            if self._queue:
                return self._queue.popleft()
            self._arrival.clear()
            await self._arrival.wait()

    async def _guarded(self, live: _Live, work: Coroutine[None, None, None]) -> None:
        """End the task with the error of ``work``, if it has one: the queue must go on."""
        try:
            await work
        except CancelledError:
            await self._end(live, TaskState.CANCELLED)
        except Exception as error:
            known = from_exception(error)
            log.warning("task %s failed: %s", live.task.id, known.message)
            failure = Failure(known.reason, known.message, known.field)
            await self._end(live, TaskState.FAILED, failure=failure)

    async def _work(self, live: _Live) -> None:
        task = replace(live.task, state=TaskState.LEARNING, start_time=now())
        await self._write(Snapshot(task))
        live.change(task)
        if live.cancelling:
            raise CancelledError("cancelled before the learner began")
        current = self._host.current
        parent = current.number if current else None
        try:
            number = await self._make_version(live, parent)
        except LearnerCrashedError:
            # The last thing a worker does is to make the version durable.
            found = await asyncio.to_thread(self._store.version_of_task, task.id)
            if found is None and live.cancelling:
                raise CancelledError("cancelled on request") from None
            if found is None:
                raise
            number = found
        await self._publish(live, number)

    async def _publish(self, live: _Live, number: int) -> None:
        fraction = live.progress.fraction if live.progress else 1.0
        live.on_progress(Progress(Stage.PUBLISHING, fraction))
        if isinstance(live.task.edit, Forget):
            version = await self._forget(live, live.task.edit, number)
        else:
            version = await asyncio.to_thread(self._store.version, number)
            await asyncio.to_thread(self._keep_canaries, live.task, version)
            if version.candidate:
                await self._hold_back(live, version)
                return
            version = await self._host.promote(number)
        await self._end(live, TaskState.PUBLISHED, version=number, report=version.report)

    def _keep_canaries(self, task: Task, version: Version) -> None:
        """Keep some images of each class that the task taught first, evenly among those it has.

        A task is not to fail for them: where they cannot be kept, there are none of its classes.
        """
        keys = {entry.label: entry.key for entry in version.classes if entry.task == task.id}
        if not self._canary_images or not keys:
            return
        counts = dict(zip(task.labels, task.example_counts, strict=True))
        steps = {label: -(-counts[label] // self._canary_images) for label in keys}
        kept: dict[str, list[bytes]] = {label: [] for label in keys}
        seen = dict.fromkeys(keys, 0)
        try:
            for image, label in read_spool(self._spools / task.id):
                if label in keys:
                    if seen[label] % steps[label] == 0:
                        kept[label].append(image)
                    seen[label] += 1
            for label, images in kept.items():
                canary.keep(self._store.root, keys[label], images)
        except (OSError, DamagedError) as error:
            log.warning("no canary images are kept of task %s: %s", task.id, error)

    async def _hold_back(self, live: _Live, version: Version) -> None:
        """End a task whose version stays a candidate: the next one builds on the current one."""
        assert version.report is not None, "a candidate has a report that says why it is one"
        error = GateError(
            f"version {version.number} is held back: {why_held_back(version.report.failed_checks)}"
        )
        await self._end(
            live,
            TaskState.HELD_BACK,
            version=version.number,
            report=version.report,
            failure=Failure(error.reason, error.message),
        )

    async def _make_version(self, live: _Live, parent: int | None) -> int:
        task = live.task
        if task.edit is not None:
            return await self._learner.edit(task.id, task.edit, parent, live.on_progress)
        return await self._learner.learn(
            task.id,
            self._spools / task.id,
            self._config.updated(**task.settings),
            self._gate,
            parent,
            live.on_progress,
        )

    async def _forget(self, live: _Live, edit: Forget, number: int) -> Version:
        """Publish a version that forgets classes, as often as it takes: none may be half gone."""
        names = frozenset(edit.labels)
        while True:
            try:
                version = await self._host.promote(number)
                if not edit.purge:
                    return version
                # Names go from the manifests last: nowhere else is it written what they were.
                names |= await asyncio.to_thread(self._store.names_of, version.forgets)
                for other in self._live.values():
                    other.task = other.task.withholding(names)
                await asyncio.to_thread(self._records.redact, names, live.task.id)
                live.task = live.task.without_classes(names)
                await self._host.purge(number)
                return version
            except (OSError, LimitExceededError, UnavailableError) as error:
                log.warning("cannot forget all of it yet, trying on: %s", error)
                await asyncio.sleep(RETRY_SECONDS)

    async def _end(self, live: _Live, state: TaskState, **changes: Any) -> None:
        ended = replace(live.task, state=state, end_time=now(), withheld=(), **changes)
        if state not in (TaskState.PUBLISHED, TaskState.HELD_BACK):
            ended = ended.without_classes(live.task.withheld)
        await self._write(Snapshot(ended, live.progress))
        if live.task.withheld:
            with contextlib.suppress(InfloraError):  # the next change that fills the log does it
                await asyncio.to_thread(self._records.scrub)
        await asyncio.to_thread(self._remove_spool, ended.id)
        del self._live[ended.id]
        live.change(ended)
        log.info("task %s is %s", ended.id, state)

    async def _write(self, snapshot: Snapshot) -> None:
        """Write the record, as often as it takes: nothing may be told that is not durable."""
        while True:
            try:
                return await asyncio.to_thread(self._records.update, snapshot)
            except InfloraError as error:
                log.warning("cannot write a task's record, trying on: %s", error)
                await asyncio.sleep(RETRY_SECONDS)

    def _remove_spool(self, task: str) -> None:
        try:
            failpoints.reach("spool.delete")
            shutil.rmtree(self._spools / task)
            failpoints.reach("spool.deleted")
        except FileNotFoundError:
            pass
        except OSError as error:
            log.warning("the spool of task %s stays until the next start: %s", task, error)

    def _remove_orphans(self) -> None:
        """Remove spools of uploads that broke off with the last process, and of ended tasks."""
        self._spools.mkdir(exist_ok=True)
        for folder in self._spools.iterdir():
            if folder.name not in self._live:
                self._remove_spool(folder.name)


def _new_id() -> str:
    return f"{now():%Y%m%d-%H%M%S}-{secrets.token_hex(4)}"


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _new_edit(request: EditRequest) -> Task:
    return Task(
        id=_new_id(),
        display_name="",
        request_id=request.request_id,
        content_sha256=_sha256(asdict(request.edit)),
        labels=(),
        example_counts=(),
        example_bytes=0,
        settings={},
        create_time=now(),
        edit=request.edit,
    )


def _new_task(upload: Upload, summary: SpoolSummary) -> Task:
    request = upload.request
    content = [request.display_name, request.settings, summary.sha256]
    return Task(
        id=upload.id,
        display_name=request.display_name,
        request_id=request.request_id,
        content_sha256=_sha256(content),
        labels=summary.labels,
        example_counts=summary.counts,
        example_bytes=summary.size,
        settings=request.settings,
        create_time=now(),
    )
