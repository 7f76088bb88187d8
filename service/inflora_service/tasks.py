"""The queue of tasks: from an accepted upload to a published version, one task at a time.

Two things are durable: the record of a task (``records.py``) and the version that came of it
(``store.py``). Whatever happens between them, at the next start every acknowledged task is either
ended, or has a version that is published then, or is queued again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

from inflora_core import canary, edits
from inflora_core.audit import SERVER
from inflora_core.config import Gate, LearnConfig, Limits, Retention
from inflora_core.errors import (
    CancelledError,
    ConflictError,
    DamagedError,
    GateError,
    InfloraError,
    LearnerCrashedError,
    LimitExceededError,
    NotFoundError,
    OvertakenError,
    QuotaExceededError,
    StateError,
    UnavailableError,
)
from inflora_core.logs import about
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
from inflora_core.spool import SpoolSummary, checkpoint_sum, read_spool
from inflora_core.store import Store
from inflora_core.tracing import traceparent
from inflora_service.access import name_of
from inflora_service.aio import unbroken
from inflora_service.auditing import AuditTrail
from inflora_service.errors import from_exception
from inflora_service.examples import Examples, Fate, fate
from inflora_service.learner_process import LearnerProcess
from inflora_service.promoting import ModelHost
from inflora_service.records import Snapshot, TaskRecords, content_hash, task_content
from inflora_service.resuming import PartialUpload, Uploads
from inflora_service.space import Space
from inflora_service.uploads import TaskRequest, Upload

log = logging.getLogger(__name__)

T = TypeVar("T")

RETRY_SECONDS = 2.0
"""Between attempts to write a record that the disk does not take."""

QUEUE_SECONDS = 30.0
"""After which who has enough tasks in the queue may ask again; tasks take about as long."""

SWEEP_SECONDS = 30.0
"""Between looks at what can be removed; more often where uploads are kept for less."""


@dataclass
class _Live:
    """A task that has not ended, or whose end is being told.

    Attributes:
        task: Its record, as it is on the disk.
        progress: The last one that the learner reported.
        cancelling: Somebody asked for it to be given up.
        cancelled_by: Who did.
        base: Number of the version that it is being learned on; None before the first.
        overtaken: Somebody has made another version current meanwhile.
        over: Its record once it has ended and that is durable; nobody was told yet.
        changed: Set at the next change, and replaced by another event then.
    """

    task: Task
    progress: Progress | None = None
    cancelling: bool = False
    cancelled_by: str = SERVER
    base: int | None = None
    overtaken: bool = False
    over: Task | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def snapshot(self) -> Snapshot:
        return Snapshot(self.task, self.progress)

    def change(self, task: Task) -> None:
        self.task = task
        self.notify()

    def on_progress(self, progress: Progress) -> None:
        # What a worker has to do again, another had done: how far the task is does not fall.
        done = self.progress.fraction if self.progress else 0.0
        self.progress = replace(progress, fraction=max(done, progress.fraction))
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
        store: Where versions are.
        records: The tasks.
        host: Publishes versions.
        audit: Is told what becomes of tasks.
        learner: Learns tasks.
        config: Settings of tasks that ask for none.
        limits: What is refused.
        gate: What versions are held back for.
        canary_images: How many images of each new class are kept; 0 for none.
        retention: Which versions are kept.
        examples: Where spools are.
        uploads: What may become tasks.
        space: Says whether there is room.
        queued_by: Says how many tasks a caller may have in the queue; None: any number.
        on_ended: Told of every task that has ended, once that is durable.
    """

    def __init__(
        self,
        store: Store,
        records: TaskRecords,
        host: ModelHost,
        audit: AuditTrail,
        learner: LearnerProcess,
        config: LearnConfig,
        limits: Limits,
        gate: Gate,
        canary_images: int,
        retention: Retention,
        examples: Examples,
        uploads: Uploads,
        space: Space,
        queued_by: Callable[[str], int | None],
        *,
        on_ended: Callable[[Task], None] = lambda task: None,
    ) -> None:
        self._store = store
        self._records = records
        self._host = host
        self._audit = audit
        self._learner = learner
        self._config = config
        self._limits = limits
        self._gate = gate
        self._canary_images = canary_images
        self._retention = retention
        self._examples = examples
        self._uploads = uploads
        self._space = space
        self._queued_by = queued_by
        self._on_ended = on_ended
        self._live: dict[str, _Live] = {}
        self._queue: deque[_Live] = deque()
        self._left_over: list[tuple[_Live, Coroutine[None, None, None]]] = []
        self._arrival = asyncio.Event()
        self._accepting = asyncio.Lock()
        self._stopping = False
        self._running: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Take up what the last process left, and begin."""
        for task in await asyncio.to_thread(self._records.unfinished):
            live = self._live[task.id] = _Live(task)
            if task.state is not TaskState.LEARNING:
                self._queue.append(live)
            elif (number := await self._version_of(task)) is not None:
                live.progress = Progress(Stage.PUBLISHING, 1.0)
                self._left_over.append((live, self._publish(live, number)))
            else:
                await self._take_up(live)
        await asyncio.to_thread(self._examples.open)
        await asyncio.to_thread(self._uploads.adopt, await self._known())
        await self._tidy()
        if self._live:
            log.info("taking up %d tasks that have not ended", len(self._live))
            self._arrival.set()
        self._running = [
            asyncio.create_task(self._run(), name="task-queue"),
            asyncio.create_task(self._sweep_on(), name="task-sweep"),
        ]

    async def _take_up(self, live: _Live) -> None:
        """Queue again, or have set aside, a task that the last process was killed at.

        A worker that takes all memory may take the server along: a container is ended as a whole.
        """
        reached = ""
        with contextlib.suppress(OSError):
            folder = self._examples.spools / live.task.id
            reached = await asyncio.to_thread(checkpoint_sum, folder)
        crashes = live.task.crashes + 1 if reached == live.task.killed_at else 1
        live.task = replace(
            live.task, state=TaskState.QUEUED, start_time=None, crashes=crashes, killed_at=reached
        )
        if crashes >= self._limits.task_attempts:
            self._left_over.append((live, self._give_up(live)))
            return
        self._queue.append(live)
        try:
            await asyncio.to_thread(self._records.update, live.snapshot)
        except InfloraError as error:
            # It is unfinished by its record all the same, and predictions are to be answered.
            log.warning("that a task was taken up is not written down: %s", error)

    async def _give_up(self, live: _Live) -> None:
        raise LearnerCrashedError(
            f"the server was killed {live.task.crashes} times in a row while it learned this"
        )

    async def _known(self) -> set[str]:
        """Return the tasks that there ever were: their spools are no uploads that broke off.

        One that was set aside waits for its examples longer than any upload is kept.
        """
        states = await asyncio.to_thread(self._records.states)
        return {task for task, _ in states} | self._audit.lost_tasks

    async def stop(self) -> None:
        """Stop learning; what is not published by now is taken up at the next start.

        Waiting for tasks ends with ``UnavailableError``, so that clients ask again. Uploads can
        still be finished: their tasks are queued for the next start.
        """
        self._stopping = True
        for live in self._live.values():
            live.notify()
        for running in self._running:
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running
        for _, work in self._left_over:
            work.close()
        for live in self._live.values():
            if live.task.state is TaskState.LEARNING and live.over is None:
                # Not killed: the next process need not count this as an attempt.
                task = replace(live.task, state=TaskState.QUEUED, start_time=None)
                with contextlib.suppress(InfloraError, OSError):
                    if await asyncio.to_thread(self._store.version_of_task, task.id) is None:
                        await asyncio.to_thread(self._records.update, Snapshot(task))

    async def sweep(self, *, insist: bool = False) -> None:
        """Remove uploads that nobody continued in time, and what could not be removed before.

        With the spools of uploads that broke off with the last process and cannot be continued.

        Args:
            insist: Raise the ``OSError`` where a spool that has to go cannot be deleted.
        """
        await self._uploads.expire()
        for name in await asyncio.to_thread(self._examples.spooled):
            if name not in self._live and not self._uploads.hold(name):
                await asyncio.to_thread(self._settle, name, insist)
        await asyncio.to_thread(self._examples.release, self._awaits_promotion)

    async def _tidy(self) -> None:
        """Sweep, as far as that can be done now."""
        try:
            await self.sweep()
        except OSError as error:
            log.warning("cannot tidy up now, trying on: %s", error)

    async def _sweep_on(self) -> None:
        while True:
            await asyncio.sleep(min(SWEEP_SECONDS, max(0.1, self._limits.upload_seconds)))
            try:
                await self._tidy()
                if not self._live:
                    await self._retain()  # of model.onnx that downloads brought back
            except Exception:
                log.exception("cannot tidy up now, trying on")

    def _settle(self, spool: str, insist: bool) -> None:
        try:
            self._examples.settle(self._records.get(spool).task, insist=insist)
        except NotFoundError:
            # Of an upload that became no task. Of one whose record is lost, they are all there is.
            if spool not in self._audit.lost_tasks:
                self._examples.remove(spool)
        except InfloraError as error:
            log.warning("the spool %s stays for now: %s", spool, error)

    def _awaits_promotion(self, task: str) -> bool:
        """Whether the version of a task was never current, and may become so."""
        try:
            number = self._records.get(task).task.version
            if number is None:
                return True  # kept by another setting, of a task that made none
            return (
                number not in self._audit.was_current
                and not self._store.version(number).state.stripped
            )
        except InfloraError as error:
            # Of a record that is lost, the examples are all there is.
            log.warning("the examples of task %s stay for now: %s", task, error)
            return True

    # -- accepting --------------------------------------------------------------------------

    @asynccontextmanager
    async def upload(self, request: TaskRequest, who: str) -> AsyncIterator[Upload]:
        """The upload of a new task, to be filled, and given to ``accept``; see ``Uploads.open``.

        Args:
            request: What the spec asks for.
            who: Who sends it.

        Raises:
            QuotaExceededError: they have enough tasks in the queue.
            LimitExceededError: the queue or the disk is full.
            StateError, ConflictError: it cannot be continued so.
        """
        try:
            await self._check_room(who)
        except LimitExceededError:
            # A request that was accepted before may be what fills the queue.
            if await asyncio.to_thread(self._records.by_request_id, request.request_id) is None:
                raise
        async with self._uploads.open(request, _new_id()) as upload:
            yield upload

    async def query_upload(self, request_id: str) -> PartialUpload | Task:
        """Return how far an upload has come, or the task that the request became.

        Raises:
            NotFoundError: there is neither.
        """
        task = await asyncio.to_thread(self._records.by_request_id, request_id)
        found = task or await self._uploads.query(request_id)
        if found is None:
            raise NotFoundError("nothing was uploaded under that id", field="request_id")
        return found

    async def accept(self, upload: Upload, who: str) -> Task:
        """Make the finished upload a task, durable and queued.

        Args:
            upload: What was uploaded.
            who: Who sent it, for the audit log.

        Returns:
            The new task, or the one that was made by the same request before.

        Raises:
            InvalidInputError: the upload is empty.
            ConflictError: the request id was used for something else.
            LimitExceededError: the queue or the disk is full.
        """
        return await unbroken(self._accept(upload, who))

    async def edit(self, request: EditRequest, who: str) -> Task:
        """Make a change of the class table a task, durable and queued.

        Args:
            request: What to change.
            who: Who asked for it, for the audit log.

        Returns:
            The new task, or the one that was made by the same request before.

        Raises:
            ConflictError: the request id was used for something else.
            LimitExceededError: the queue or the disk is full.
            InfloraError: as ``edits.check`` does, where no task is ahead that could change what
                there is.
        """
        return await unbroken(self._accept_edit(request, who))

    async def _accept(self, upload: Upload, who: str) -> Task:
        summary = await upload.finish()
        task = _new_task(upload, summary, who)
        async with self._accepting:
            earlier = await self._earlier(task, "spec.request_id")
            if earlier is not None:
                return earlier
            accepted = await self._admit(task)
            upload.accepted = True
            return accepted

    async def _accept_edit(self, request: EditRequest, who: str) -> Task:
        task = _new_edit(request, who)
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
        await self._check_room(task.who)
        try:
            await asyncio.to_thread(self._records.insert, task)
            await self._audit.accepted(task)
        except Exception:
            await self._withdraw(task.id)
            raise
        live = _Live(task)
        self._live[task.id] = live
        self._queue.append(live)
        self._arrival.set()
        with about(task=task.id):
            log.info(
                "task %s accepted: %s, %d classes, %d images",
                task.id,
                task.kind,
                len(task.labels),
                sum(task.example_counts),
            )
        return task

    async def _withdraw(self, task: str) -> None:
        """See that there is no record of a task that its client is told was not accepted."""
        with contextlib.suppress(InfloraError):
            # If it is not there, or the records cannot even be read, nothing is waited for.
            await asyncio.to_thread(self._records.get, task)
            await self._insist(self._records.delete, task)

    async def _check_room(self, who: str) -> None:
        most, name = self._queued_by(who), name_of(who)
        if most is not None and sum(name_of(each.task.who) == name for each in self._queue) >= most:
            raise QuotaExceededError(
                f"{name} is over its quota, queued_tasks = {most}: retry when one has ended",
                retry_seconds=QUEUE_SECONDS,
            )
        if len(self._queue) >= self._limits.queued_tasks:
            raise LimitExceededError(
                f"{len(self._queue)} tasks are queued already: retry when one has ended"
            )
        # What was accepted before needs room for its versions, too.
        await asyncio.to_thread(self._space.check, versions=len(self._live) + 1)

    # -- looking ----------------------------------------------------------------------------

    @property
    def progress(self) -> Progress | None:
        """How far the task is that is being worked on; None if none is. For any thread."""
        running = self.running
        return running.progress if running else None

    @property
    def running(self) -> Snapshot | None:
        """The task that is being worked on; None if none is. For any thread."""
        for live in list(self._live.values()):
            if live.task.state is TaskState.LEARNING:
                return live.snapshot
        return None

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

    async def cancel(self, task: str, who: str) -> Snapshot:
        """Give a task up; return it once it is cancelled, or has ended otherwise meanwhile.

        Args:
            task: Id of the task.
            who: Who asked for it, for the audit log.

        Raises:
            NotFoundError: there is no such task.
            StateError: it has ended otherwise before, or is being published.
            UnavailableError: the server is stopping; whether the task is cancelled is not said.
        """
        live = self._live.get(task)
        if live is None:
            return await unbroken(self._cancel_ended(task, who))
        if live.progress is not None and live.progress.stage is Stage.PUBLISHING:
            raise StateError(f"task {task} is being published", field="name")
        if not live.cancelling:
            live.cancelling, live.cancelled_by = True, who
        if live in self._queue:
            self._queue.remove(live)
            await unbroken(self._end(live, TaskState.CANCELLED))
        else:
            self._learner.cancel(task)
        while not live.task.state.ended:
            await self._wait(live.changed)
        return live.snapshot

    async def _cancel_ended(self, task: str, who: str) -> Snapshot:
        """Give up a task that was set aside; return one that is cancelled already."""
        async with self._accepting:
            ended = await self._record(task)
            if ended.task.state is TaskState.SET_ASIDE:
                live = self._live[task] = _Live(ended.task, cancelling=True, cancelled_by=who)
                await self._end(live, TaskState.CANCELLED, failure=None)
                return live.snapshot
        if ended.task.state is not TaskState.CANCELLED:
            raise StateError(f"task {task} is {ended.task.state} already", field="name")
        return ended

    async def retry(self, task: str, who: str) -> Snapshot:
        """Put a task that was set aside into the queue again, as the last one.

        Raises:
            NotFoundError: there is no such task.
            StateError: it was not set aside, or lost its examples or its names with a class that
                was purged.
            LimitExceededError: the queue or the disk is full.
        """
        return await unbroken(self._retry(task, who))

    async def _retry(self, task: str, who: str) -> Snapshot:
        async with self._accepting:
            found = self._live[task].task if task in self._live else (await self._record(task)).task
            if found.state is not TaskState.SET_ASIDE:
                raise StateError(f"task {task} is {found.state}, not set aside", field="name")
            if fate(found, "never") is not Fate.STAY:
                raise StateError(
                    f"a class of task {task} was purged, and its examples with it", field="name"
                )
            if not found.content_sha256:
                raise StateError(f"task {task} names a class that was purged since", field="name")
            await self._check_room(who)
            live = _Live(
                replace(
                    found,
                    state=TaskState.QUEUED,
                    start_time=None,
                    end_time=None,
                    failure=None,
                    crashes=0,
                )
            )
            await asyncio.to_thread(self._records.update, live.snapshot)
            await self._audit.retried(live.task, who)
            self._live[task] = live
            self._queue.append(live)
            self._arrival.set()
            return live.snapshot

    async def promote(self, number: int, who: str, *, force: bool = False) -> Version:
        """Make a version current, as ``ModelHost.promote`` does.

        What is being learned begins anew on that version: else it would bring back, as soon as it
        is published, what somebody has just rolled back from.
        """
        return await unbroken(self._promote(number, who, force))

    async def _promote(self, number: int, who: str, force: bool) -> Version:
        version = await self._host.promote(number, who, force=force)
        for live in self._live.values():
            if live.task.state is TaskState.LEARNING and live.base != number:
                live.overtaken = True
                self._learner.cancel(live.task.id)
        return version

    async def _wait(self, changed: asyncio.Event) -> None:
        if not self._stopping:
            await changed.wait()
        if self._stopping:
            raise UnavailableError("the server is stopping; ask again when it is back")

    async def _record(self, task: str) -> Snapshot:
        return await asyncio.to_thread(self._records.get, task)

    # -- working ----------------------------------------------------------------------------

    async def _run(self) -> None:
        for live, work in self._left_over:
            with about(task=live.task.id):
                await self._guarded(live, work)
        await self._retain()
        while True:
            live = await self._head()
            with about(task=live.task.id):
                await self._guarded(live, self._work(live))

    async def _retain(self) -> None:
        """Let old versions go, while none is being made: that needs the one it is made from."""
        try:
            await self._host.retain(self._retention)
        except Exception:
            # Whatever it is, the queue goes on, and a version that is current is published.
            log.exception("old versions stay for now")

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
            if live.over is not None:
                log.exception("task %s has ended all the same", live.task.id)
                self._let_go(live, live.over)
                return
            known = from_exception(error)
            crashed = isinstance(known, LearnerCrashedError)
            state = TaskState.SET_ASIDE if crashed else TaskState.FAILED
            log.warning("task %s is %s: %s", live.task.id, state, known.message)
            await self._end(live, state, failure=Failure(known.reason, known.message, known.field))

    async def _work(self, live: _Live) -> None:
        task = replace(live.task, state=TaskState.LEARNING, start_time=now())
        await self._write(Snapshot(task))
        live.change(task)
        try:
            number = await self._in_time(live)
        except Exception as error:
            # What failed may have come after the version was durable.
            made = await self._version_of(live.task)
            if made is None:
                raise
            log.warning("task %s has a version all the same: %s", live.task.id, error)
            number = made
        await self._publish(live, number)

    async def _version_of(self, task: Task) -> int | None:
        """Return the version that came of a task, if it is durable."""
        return await _as_often_as_it_takes(
            lambda: asyncio.to_thread(self._store.version_of_task, task.id)
        )

    async def _in_time(self, live: _Live) -> int:
        """Return the version that comes of a task, unless it takes too long."""
        seconds = self._limits.task_seconds
        try:
            async with asyncio.timeout(seconds or None):
                return await self._whatever_it_takes(live)
        except TimeoutError:
            await self._learner.abandon()
            raise LimitExceededError(
                f"the task took longer than {seconds:g} s; send fewer images, or ask for fewer "
                "epochs"
            ) from None

    async def _whatever_it_takes(self, live: _Live) -> int:
        """Return the version that comes of a task.

        It goes on when a worker dies of it, and begins anew when another version is made current.

        Raises:
            LearnerCrashedError: too many have, and none came further than the one before.
        """
        while True:
            if live.cancelling:
                raise CancelledError("cancelled on request")  # between two workers
            current = self._host.current
            live.base, live.overtaken = current.number if current else None, False
            try:
                return await self._make_version(live)
            except CancelledError:
                if not live.overtaken:
                    raise
                log.info("task %s begins anew: another version was made current", live.task.id)
            except LearnerCrashedError as error:
                # The last thing a worker does is to make the version durable.
                found = await self._version_of(live.task)
                if found is not None:
                    return found
                if live.overtaken:
                    continue  # the worker may have been ended for that
                await self._count_crash(live)
                if live.task.crashes >= self._limits.task_attempts:
                    raise
                log.warning("task %s goes on with another worker: %s", live.task.id, error.message)

    async def _count_crash(self, live: _Live) -> None:
        epoch = live.progress.epoch if live.progress else 0
        further = epoch > live.task.crashed_at
        # Of all, not of the last one: workers that die early and late in turn come no further.
        furthest = max(epoch, live.task.crashed_at)
        crashes = 1 if further else live.task.crashes + 1
        task = replace(live.task, crashes=crashes, crashed_at=furthest)
        await self._write(Snapshot(task, live.progress))
        live.task = task

    async def _publish(self, live: _Live, number: int) -> None:
        fraction = live.progress.fraction if live.progress else 1.0
        live.on_progress(Progress(Stage.PUBLISHING, fraction))
        if isinstance(live.task.edit, Forget):
            version = await self._forget(live, live.task.edit, number)
        else:
            version = await _as_often_as_it_takes(
                lambda: asyncio.to_thread(self._store.version, number)
            )
            await asyncio.to_thread(self._keep_canaries, live.task, version)
            try:
                version = await _as_often_as_it_takes(lambda: self._host.publish(number))
            except (GateError, OvertakenError) as error:
                await self._hold_back(live, version, error)
                return
        await self._retain()
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
            for image, label in read_spool(self._examples.spools / task.id):
                if label in keys:
                    if seen[label] % steps[label] == 0:
                        kept[label].append(image)
                    seen[label] += 1
            for label, images in kept.items():
                canary.keep(self._store.root, keys[label], images)
        except (OSError, MemoryError, DamagedError) as error:
            log.warning("no canary images are kept of task %s: %s", task.id, error)

    async def _hold_back(self, live: _Live, version: Version, error: InfloraError) -> None:
        """End a task whose version does not answer: the next one builds on the current one."""
        await self._end(
            live,
            TaskState.HELD_BACK,
            version=version.number,
            report=version.report,
            failure=Failure(error.reason, error.message),
        )

    async def _make_version(self, live: _Live) -> int:
        task = live.task
        if task.edit is not None:
            return await self._learner.edit(
                task.id, task.edit, self._gate, live.base, live.on_progress, task.traceparent
            )
        return await self._learner.learn(
            task.id,
            self._examples.spools / task.id,
            self._config.updated(**task.settings),
            self._gate,
            live.base,
            live.on_progress,
            task.traceparent,
        )

    async def _forget(self, live: _Live, edit: Forget, number: int) -> Version:
        """Publish a version that forgets classes, as often as it takes: none may be half gone."""
        names = frozenset(edit.labels)
        while True:
            try:
                version = await self._host.promote(number, SERVER)
                if not edit.purge:
                    return version
                # Names go from the manifests last: nowhere else is it written what they were.
                names |= await asyncio.to_thread(self._store.names_of, version.forgets)
                emptied = await asyncio.to_thread(self._store.emptied_tasks)
                await asyncio.to_thread(self._records.drop_scores, emptied)
                await asyncio.to_thread(
                    self._examples.purge, version.forgets, names, self._store.manifests()
                )
                # Not while a task that was set aside is taken up, or given up: its record would be
                # written again as it was read before.
                async with self._accepting:
                    for other in self._live.values():
                        other.task = other.task.withholding(names)
                    await asyncio.to_thread(self._records.redact, names, live.task.id)
                    live.task = live.task.without_classes(names)
                    # Examples of the class that a task which was set aside has.
                    await self.sweep(insist=True)
                await self._host.purge(number)
                return version
            except _PASSING as error:
                log.warning("cannot forget all of it yet, trying on: %s", error)
                await asyncio.sleep(RETRY_SECONDS)

    async def _end(self, live: _Live, state: TaskState, **changes: Any) -> None:
        ended = replace(live.task, state=state, end_time=now(), withheld=(), **changes)
        if state not in (TaskState.PUBLISHED, TaskState.HELD_BACK):
            ended = ended.without_classes(live.task.withheld)
        await self._write(Snapshot(ended, live.progress))
        live.over = ended
        cancelled = state is TaskState.CANCELLED
        await self._audit.ended(ended, live.cancelled_by if cancelled else SERVER)
        if live.task.withheld:
            with contextlib.suppress(InfloraError):  # the next change that fills the log does it
                await asyncio.to_thread(self._records.scrub)
        await asyncio.to_thread(self._examples.settle, ended)
        self._let_go(live, ended)

    def _let_go(self, live: _Live, ended: Task) -> None:
        """Tell who waits for a task that it has ended."""
        del self._live[ended.id]
        live.change(ended)
        self._on_ended(ended)
        log.info("task %s is %s", ended.id, ended.state)

    async def _write(self, snapshot: Snapshot) -> None:
        """Write the record, as often as it takes: nothing may be told that is not durable."""
        await self._insist(self._records.update, snapshot)

    async def _insist(self, change: Callable[[T], None], subject: T) -> None:
        """Make a change of the records, as often as it takes."""
        while True:
            try:
                return await asyncio.to_thread(change, subject)
            except Exception as error:
                # Whatever it is: else the queue would end with this task.
                log.warning("cannot write a task's record, trying on: %s", error)
                await asyncio.sleep(RETRY_SECONDS)


_PASSING = (OSError, MemoryError, LimitExceededError, UnavailableError)
"""What passes once its cause is gone, without anything being done here."""


async def _as_often_as_it_takes(work: Callable[[], Coroutine[None, None, T]]) -> T:
    """Do what is to be done with a version that is durable: its task cannot fail any more."""
    while True:
        try:
            return await work()
        except _PASSING as error:
            log.warning("cannot publish yet, trying on: %s", error)
            await asyncio.sleep(RETRY_SECONDS)


def _new_id() -> str:
    return f"{now():%Y%m%d-%H%M%S}-{secrets.token_hex(4)}"


def _new_edit(request: EditRequest, who: str) -> Task:
    return Task(
        id=_new_id(),
        display_name="",
        request_id=request.request_id,
        content_sha256=content_hash(asdict(request.edit)),
        labels=(),
        example_counts=(),
        example_bytes=0,
        settings={},
        create_time=now(),
        edit=request.edit,
        who=who,
        traceparent=traceparent(),
    )


def _new_task(upload: Upload, summary: SpoolSummary, who: str) -> Task:
    request = upload.request
    return Task(
        id=upload.id,
        display_name=request.display_name,
        request_id=request.request_id,
        content_sha256=task_content(request.display_name, request.settings, summary.sha256),
        labels=summary.labels,
        example_counts=summary.counts,
        example_bytes=summary.size,
        settings=request.settings,
        create_time=now(),
        who=who,
        traceparent=traceparent(),
    )
