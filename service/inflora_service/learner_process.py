"""The server's end of the learning worker: a process that may die without taking anything along.

``inflora_core.worker`` describes the protocol. The worker works on one job at a time; a worker that
dies is replaced, and what it was working on fails with ``LearnerCrashedError``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from inflora_core.config import Gate, LearnConfig
from inflora_core.errors import (
    ERRORS_BY_REASON,
    CancelledError,
    InfloraError,
    LearnerCrashedError,
)
from inflora_core.model import Edit, Progress, Stage
from inflora_service.aio import unbroken

log = logging.getLogger(__name__)

_EDIT: TypeAdapter[Edit] = TypeAdapter(Edit)

RESTART_DELAYS = (0.0, 0.5, 1.0, 2.0, 5.0, 15.0)
"""Seconds before a restart, by how many workers died since one last finished a job."""

CANCEL_SECONDS = 10.0
"""How long a worker may go on with a job that is given up, before it is killed."""

UNHEALTHY_AFTER = 3
"""Workers that died in a row before they were ready: the next will hardly do better."""

STOP_SECONDS = 5.0
"""How long a worker may take to end by itself."""

_EVENTS = frozenset({"ready", "prepared", "progress", "learned", "failed", "cancelled", "leaving"})

_LINE_BYTES = 2**20


@dataclass
class _Job:
    """The one command that the worker carries out.

    Attributes:
        command: As sent.
        result: The version for "learn" and "edit", None for "prepare".
        on_progress: Told of every progress event.
        sent: Whether the present worker got it.
        attempts: How many workers got it.
        cancelled: Somebody asked for it to be given up.
        progress: The last one reported, None before the first.
    """

    command: dict[str, Any]
    on_progress: Callable[[Progress], None]
    result: asyncio.Future[int | None] = field(default_factory=asyncio.Future)
    sent: bool = False
    attempts: int = 0
    cancelled: bool = False
    progress: Progress | None = None

    @property
    def task(self) -> str | None:
        return self.command.get("task")


class LearnerProcess:
    """Keeps one learning worker running and gives it one job at a time.

    Args:
        command: How to start a worker.
        keep_open: Descriptors that the worker inherits; see ``server.StoreLock``.
        on_health: Told whether workers come up, whenever that changes.
        on_end: Told that a worker ended, and that another will be started.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        keep_open: Sequence[int] = (),
        on_health: Callable[[bool], None] = lambda healthy: None,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self._command = command
        self._keep_open = keep_open
        self._on_health = on_health
        self._on_end = on_end
        self._process: asyncio.subprocess.Process | None = None
        self._ready = asyncio.Event()
        self._job: _Job | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._deaths = 0
        self._deaths_unready = 0

    @property
    def pid(self) -> int | None:
        """Process id of the worker, None while there is none."""
        return self._process.pid if self._process else None

    @property
    def ready(self) -> bool:
        """Whether there is a worker that takes jobs."""
        return self._ready.is_set()

    def start(self) -> None:
        """Start a worker, and from now on a new one whenever it dies."""
        self._supervisor = asyncio.create_task(self._supervise(), name="learner-supervisor")

    async def stop(self) -> None:
        """End the worker. A job in work never gets a result."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
            self._supervisor = None

    async def wait_ready(self) -> None:
        """Wait until a worker can start on a job at once."""
        await self._ready.wait()

    async def prepare(self, backbone: str, architecture: str | None) -> None:
        """Have the worker give the store its backbone.

        Raises:
            InfloraError: as the worker reports it, for example ``UnsupportedBackboneError``.
            LearnerCrashedError: the worker died of it.
        """
        command = {"command": "prepare", "backbone": backbone, "architecture": architecture}
        await self._run(_Job(command, lambda progress: None))

    async def learn(
        self,
        task: str,
        spool: Path,
        settings: LearnConfig,
        gate: Gate,
        parent: int | None,
        on_progress: Callable[[Progress], None],
        traceparent: str = "",
    ) -> int:
        """Have the worker learn ``task``; return the version, durable but not yet current.

        It is a candidate if the publish gate, with the limits ``gate``, holds it back. With a
        ``traceparent``, the worker's part of the trace goes below that span.

        Raises:
            CancelledError: ``cancel`` came in time.
            LearnerCrashedError: the worker died of it.
            InfloraError: any other failure that the worker reports.
        """
        command = {
            "command": "learn",
            "task": task,
            "spool": str(spool),
            "settings": settings.model_dump(mode="json"),
            "gate": gate.model_dump(mode="json"),
            "parent": parent,
            "traceparent": traceparent,
        }
        return await self._version_of(_Job(command, on_progress))

    async def edit(
        self,
        task: str,
        edit: Edit,
        gate: Gate,
        parent: int | None,
        on_progress: Callable[[Progress], None],
        traceparent: str = "",
    ) -> int:
        """Have the worker change the class table; return the version as ``learn`` does.

        Of ``gate`` only what decides about smaller forms counts.

        Raises:
            InfloraError: as ``learn`` does.
        """
        change = _EDIT.dump_python(edit, mode="json")
        command = {
            "command": "edit",
            "task": task,
            "edit": change,
            "gate": gate.model_dump(mode="json"),
            "parent": parent,
            "traceparent": traceparent,
        }
        return await self._version_of(_Job(command, on_progress))

    def cancel(self, task: str) -> None:
        """Ask for ``task`` to be given up; who waits for it gets ``CancelledError`` if it is."""
        if self._job is None or self._job.task != task:
            return
        self._job.cancelled = True
        if self._job.sent:
            self._send({"command": "cancel", "task": task})
            loop = asyncio.get_running_loop()
            loop.call_later(CANCEL_SECONDS, self._insist, self._job, self._process)
        else:
            self._finish(CancelledError("cancelled before the learner began"))

    async def abandon(self) -> None:
        """End the present worker, whatever it is at; return once it can do nothing any more."""
        process = self._process
        if process is not None:
            self._ready.clear()
            _kill(process)
            await process.wait()

    def _insist(self, job: _Job, process: asyncio.subprocess.Process | None) -> None:
        """Kill a worker that does not notice that its job is given up."""
        stuck = job is self._job and not job.result.done() and process is self._process
        # A version that is being published is let be: it may be durable already.
        publishing = job.progress is not None and job.progress.stage is Stage.PUBLISHING
        if stuck and not publishing and process is not None:
            log.warning("the learning worker goes on with a cancelled task, and is ended")
            _kill(process)

    async def _version_of(self, job: _Job) -> int:
        number = await self._run(job)
        if number is None:
            raise InfloraError("the learning worker did not name the version")
        return number

    async def _run(self, job: _Job) -> int | None:
        if self._job is not None:
            raise InfloraError("the learning worker has a job already")
        self._job = job
        try:
            self._submit()
            return await job.result
        finally:
            self._job = None

    def _submit(self) -> None:
        """Send the job if there is one and a worker that takes it."""
        if self._job is not None and self._ready.is_set():
            self._job.sent = True
            self._job.attempts += 1
            self._send(self._job.command)

    def _send(self, command: dict[str, Any]) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.write(json.dumps(command).encode() + b"\n")

    def _finish(self, result: int | InfloraError | None) -> None:
        if self._job is None or self._job.result.done():
            return
        if isinstance(result, InfloraError):
            self._job.result.set_exception(result)
        else:
            self._job.result.set_result(result)

    # -- one worker after the other ---------------------------------------------------------

    async def _supervise(self) -> None:
        while True:
            try:
                process = await self._spawn()
            except OSError as error:
                ended = f"could not be started: {error}"
            else:
                ended = await self._live(process)
            if not self._ready.is_set():
                self._deaths_unready += 1
                if self._deaths_unready == UNHEALTHY_AFTER:
                    self._on_health(False)
            self._ready.clear()
            delay = RESTART_DELAYS[min(self._deaths, len(RESTART_DELAYS) - 1)]
            self._deaths += 1
            log.error("the learning worker %s; restarting it in %g s", ended, delay)
            self._on_end()
            self._crash_job(ended)
            await asyncio.sleep(delay)

    async def _spawn(self) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=_LINE_BYTES,
            pass_fds=tuple(self._keep_open),
            # A Ctrl-C at the terminal is for the server, which then ends the worker.
            start_new_session=True,
        )
        log.info("learning worker started, process %d", process.pid)
        return process

    async def _live(self, process: asyncio.subprocess.Process) -> str:
        """Work with one worker to its end; return how it ended."""
        self._process = process
        try:
            await self._read_events(process)
        except asyncio.CancelledError:
            if not self._ready.is_set():
                _kill(process)  # it has no work yet, and cannot hear before its imports are done
            raise
        finally:
            self._process = None
            await unbroken(_end(process))
        return _how_it_ended(process.returncode)

    def _crash_job(self, ended: str) -> None:
        job = self._job
        if job is None:
            return
        if not job.sent:
            if job.task is None and self._deaths_unready >= UNHEALTHY_AFTER:
                # The server waits for this before it serves at all, so it must hear of it.
                self._finish(LearnerCrashedError(f"the learning worker {ended} on its start"))
            return
        if job.progress is None and job.cancelled:
            # It had not begun, and the next worker would not know that it was given up.
            self._finish(CancelledError("cancelled on request"))
            return
        if job.progress is None and job.attempts == 1:
            # It may have died before it read the command: not the job's fault, so far.
            job.sent = False
            return
        at = f" at stage {job.progress.stage}" if job.progress else ""
        if job.progress and job.progress.epoch:
            at += f", epoch {job.progress.epoch} of {job.progress.epochs}"
        self._finish(LearnerCrashedError(f"the learning worker {ended}{at}"))

    async def _read_events(self, process: asyncio.subprocess.Process) -> None:
        """Act on what the worker sends until it ends, or sends what makes no sense."""
        assert process.stdout is not None
        while True:
            try:
                line = await process.stdout.readline()
                if not line:
                    return
                self._on_event(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError):
                log.exception("the learning worker sent what is no event, and is ended")
                _kill(process)
                return

    def _on_event(self, event: dict[str, Any]) -> None:
        kind, task = event["event"], event.get("task")
        if kind not in _EVENTS:
            raise ValueError(f"there is no event {kind!r}")
        if kind == "ready":
            self._deaths_unready = 0
            self._ready.set()
            self._on_health(True)
            self._submit()
        elif kind == "leaving":
            self._ready.clear()  # the next job waits for the next worker
        elif self._job is None or task != self._job.task:
            log.debug("the learning worker sent news of a job that nobody waits for any more")
        elif kind == "progress":
            progress = Progress(
                Stage(event["stage"]),
                event["fraction"],
                event["epoch"],
                event["epochs"],
                event["loss"],
            )
            self._job.progress = progress
            self._job.on_progress(progress)
        else:
            self._deaths = 0
            self._finish(_result(event))


def _result(event: dict[str, Any]) -> int | InfloraError | None:
    """Return what became of a job, by the event that ended it."""
    match event["event"]:
        case "learned":
            return int(event["version"])
        case "cancelled":
            return CancelledError("cancelled on request")
        case "failed":
            error = ERRORS_BY_REASON.get(event["reason"], InfloraError)
            return error(event["message"], field=event["field"])
    return None  # prepared


async def _end(process: asyncio.subprocess.Process) -> None:
    """Have the worker end, by force if it does not when its input does."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        # Not wait_for, which in Python 3.11 loses a cancellation that comes as the process ends.
        async with asyncio.timeout(STOP_SECONDS):
            await process.wait()
    except TimeoutError:
        _kill(process)
        await process.wait()


def _kill(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()


def _how_it_ended(status: int | None) -> str:
    if status is None:
        return "ended"
    if status >= 0:
        return f"ended with exit status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    hint = " (often a sign of too little memory)" if -status == signal.SIGKILL else ""
    return f"was killed by {name}{hint}"
