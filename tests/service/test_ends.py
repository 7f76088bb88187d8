"""However a task ends, it ends once: its record, its version and the audit log say the same."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from inflora.v1 import learner_service_pb2 as learner_pb
from inflora.v1 import model_service_pb2 as model_pb
from inflora.v1 import predictor_service_pb2 as predictor_pb
from inflora.v1 import task_pb2 as pb
from inflora_core import audit, failpoints
from inflora_core.audit import MOVES, Event
from inflora_core.errors import UnavailableError
from inflora_core.model import Forget, Task, TaskState
from inflora_core.predictor import Predictor
from inflora_core.spool import CHECKPOINT
from inflora_service import auditing, tasks
from inflora_service.auditing import AuditTrail
from inflora_service.doctor import examine
from inflora_service.examples import Examples
from inflora_service.learner_process import LearnerProcess
from inflora_service.records import Snapshot, TaskRecords
from inflora_service.server import Settings
from inflora_service.space import Space
from tests.service.conftest import BLUE, GREEN, RED, Running, Script, fails, png

MANY_FILES = OSError(errno.EMFILE, "too many open files")


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried again is tried at once."""
    for module in (auditing, tasks):
        monkeypatch.setattr(module, "RETRY_SECONDS", 0.0)


def fail_once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: Exception) -> None:
    """Have a method fail the next time that it is called."""
    method, errors = getattr(owner, name), [error]

    def failing(*arguments: Any, **named: Any) -> Any:
        if errors:
            raise errors.pop()
        return method(*arguments, **named)

    monkeypatch.setattr(owner, name, failing)


def reach_once(monkeypatch: pytest.MonkeyPatch, point: str, error: int) -> None:
    """Have a failpoint fail the next time that it is reached."""
    errors = [OSError(error, os.strerror(error))]

    def reach(name: str) -> None:
        if name == point and errors:
            raise errors.pop()

    monkeypatch.setattr(failpoints, "reach", reach)


def id_of(task: pb.Task) -> str:
    return task.name.rpartition("/")[2]


def record_of(root: Path, task: pb.Task) -> Task:
    records = TaskRecords(root)
    found = records.get(id_of(task)).task
    records.close()
    return found


def moves(root: Path) -> list[tuple[str, int | None, int | None]]:
    lines = audit.verify(root).lines
    return [(x.event, x.version_from, x.version_to) for x in lines if x.event in MOVES]


async def taught(running: Running, **classes: tuple[int, int, int]) -> pb.Task:
    sent = {label: [png(colour)] for label, colour in classes.items()}
    return await running.ended((await running.learn(sent)).name)


async def answered_by(running: Running) -> str:
    return (await running.predictor.Predict(predictor_pb.PredictRequest(images=[png()]))).version


# -- what fails after the version is durable -------------------------------------------------------


async def assert_published_once(running: Running, task: pb.Task) -> None:
    ended = await running.ended(task.name)
    assert (ended.state, ended.version) == (pb.TASK_STATE_PUBLISHED, "models/default/versions/1")
    assert await answered_by(running) == ended.version
    record = record_of(running.settings.store, task)
    assert (record.state, record.version) == (TaskState.PUBLISHED, 1)
    lines = audit.verify(running.settings.store).lines
    ends = [line.event for line in lines if line.task == id_of(task)]
    assert ends == [Event.ACCEPTED, Event.PUBLISHED]
    assert moves(running.settings.store) == [(Event.PROMOTED, None, 1)]
    assert not examine(running.settings.store, read_only=True).found


async def test_its_end_is_not_undone_where_it_cannot_be_reported_at_once(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_once(monkeypatch, AuditTrail, "_ending", MANY_FILES)
    await assert_published_once(running, await running.learn({"a": [png()]}))


async def test_a_worker_that_fails_when_its_version_is_durable(
    running: Running, script: Script
) -> None:
    fault = {"reason": "LIMIT_EXCEEDED", "message": "cannot flush a folder", "field": ""}
    script.then("LEARNED", do="fail", **fault)
    await assert_published_once(running, await running.learn({"a": [png()]}))


@pytest.mark.parametrize("error", [MANY_FILES, MemoryError()], ids=["files", "memory"])
async def test_a_version_that_cannot_be_loaded_for_now(
    running: Running, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    fail_once(monkeypatch, Predictor, "warm_up", error)
    await assert_published_once(running, await running.learn({"a": [png()]}))


async def test_a_pointer_that_may_not_be_on_the_disk_is_reported_once(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    reach_once(monkeypatch, "pointer.replaced", errno.EMFILE)
    await assert_published_once(running, await running.learn({"a": [png()]}))


async def test_what_current_names_answers_when_a_roll_back_is_only_half_flushed(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    await taught(running, a=RED)
    await taught(running, b=GREEN)
    reach_once(monkeypatch, "pointer.replaced", errno.EMFILE)
    name = "models/default/versions/1"
    await running.model.PromoteVersion(model_pb.PromoteVersionRequest(name=name))
    assert running.store.current() == 1
    assert await answered_by(running) == name
    assert moves(running.settings.store)[-1] == (Event.ROLLED_BACK, 2, 1)


@pytest.mark.parametrize(
    ("point", "refused"),
    [
        ("accept.insert", True),
        ("accept.inserted", True),
        ("audit.append", True),
        ("audit.appended", False),  # by then it was written
    ],
)
async def test_what_was_refused_is_not_there(
    running: Running, monkeypatch: pytest.MonkeyPatch, point: str, refused: bool
) -> None:
    """Wherever the disk was full, no record and no entry of the log speaks of it."""
    reach_once(monkeypatch, point, errno.ENOSPC)
    if refused:
        with fails("RESOURCE_EXHAUSTED", "LIMIT_EXCEEDED"):
            await running.learn({"a": [png()]}, request_id="r")
        assert not (await running.learner.ListTasks(learner_pb.ListTasksRequest())).tasks
    await assert_published_once(running, await running.learn({"a": [png()]}, request_id="r"))
    assert len(audit.verify(running.settings.store).history.accepted) == 1


# -- giving up, trying again ---------------------------------------------------------------------


async def test_a_cancel_between_two_workers_is_not_lost(
    running: Running, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, counting, go_on = asyncio.get_running_loop(), asyncio.Event(), threading.Event()
    update, cancel, asked = TaskRecords.update, LearnerProcess.cancel, asyncio.Event()

    def noted(process: LearnerProcess, task: str) -> None:
        asked.set()
        cancel(process, task)

    def slow(records: TaskRecords, snapshot: Snapshot) -> None:
        if snapshot.task.crashes and not snapshot.task.state.ended:
            loop.call_soon_threadsafe(counting.set)
            assert go_on.wait(60)
        update(records, snapshot)

    monkeypatch.setattr(TaskRecords, "update", slow)
    monkeypatch.setattr(LearnerProcess, "cancel", noted)
    script.hold("TRAINING")
    task = await running.learn({"a": [png()]})
    await script.reached("TRAINING")
    script.pass_from_now_on("TRAINING")
    script.kill(signal.SIGKILL)
    await counting.wait()
    cancelling = asyncio.ensure_future(
        running.learner.CancelTask(learner_pb.CancelTaskRequest(name=task.name))
    )
    await asked.wait()
    go_on.set()
    assert (await cancelling).task.state == pb.TASK_STATE_CANCELLED
    assert not running.store.numbers()


async def test_a_purge_waits_for_a_task_that_is_taken_up_again(
    start: Callable[..., Any],
    settings: Settings,
    script: Script,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits = settings.limits.model_copy(update={"task_attempts": 1})
    running = await start(limits=limits)
    await taught(running, secret=RED, green=GREEN)
    script.then("TRAINING", do="exit", status=1)
    aside = await taught(running, secret=BLUE)
    assert aside.state == pb.TASK_STATE_SET_ASIDE

    loop, checking, go_on = asyncio.get_running_loop(), asyncio.Event(), threading.Event()
    check = Space.check

    def slow(space: Space, *sizes: int, **named: int) -> None:
        loop.call_soon_threadsafe(checking.set)
        assert go_on.wait(60)
        check(space, *sizes, **named)

    purging, purge_examples = asyncio.Event(), Examples.purge

    def noted(examples: Examples, *arguments: Any) -> None:
        loop.call_soon_threadsafe(purging.set)
        purge_examples(examples, *arguments)

    monkeypatch.setattr(Examples, "purge", noted)
    forget = learner_pb.ForgetClassesRequest(labels=["secret"], purge=True)
    script.hold("EXPORTING")
    purge = (await running.learner.ForgetClasses(forget)).task
    await script.reached("EXPORTING")
    monkeypatch.setattr(Space, "check", slow)
    retrying = asyncio.ensure_future(
        running.learner.RetryTask(learner_pb.RetryTaskRequest(name=aside.name))
    )
    await checking.wait()
    script.release("EXPORTING")
    await purging.wait()
    go_on.set()
    await retrying
    assert (await running.ended(purge.name)).state == pb.TASK_STATE_PUBLISHED
    # Taken up before the purge, it teaches the class anew, and has its images.
    assert (await running.ended(aside.name)).state == pb.TASK_STATE_PUBLISHED


def test_names_are_not_said_to_be_gone_while_somebody_reads_them(tmp_path: Path) -> None:
    records = TaskRecords(tmp_path)
    task = Task(
        id="t", display_name="", request_id="", content_sha256="", labels=(), example_counts=(),
        example_bytes=0, settings={}, create_time=tasks.now(),
        edit=Forget(("secret",), purge=True),
    )  # fmt: skip
    records.insert(task)
    with closing(sqlite3.connect(tmp_path / "tasks.sqlite", isolation_level=None)) as reader:
        reader.execute("BEGIN")
        assert reader.execute("SELECT COUNT(*) FROM tasks").fetchone() == (1,)
        records._connection.execute("PRAGMA busy_timeout = 0")
        with pytest.raises(UnavailableError, match="another program reads"):
            records.redact(["secret"], task.id)
        reader.execute("COMMIT")
    records.redact(["secret"], task.id)
    assert not any(b"secret" in path.read_bytes() for path in tmp_path.iterdir())
    records.close()


# -- a server that is killed ----------------------------------------------------------------------


async def killed_at_work(running: Running, script: Script, task: pb.Task | None = None) -> pb.Task:
    """Have a server end in work on a task as if it had been killed."""
    script.hold("TRAINING")
    task = task or await running.learn({"a": [png()]})
    await script.reached("TRAINING")
    await running.server.stop()
    script.gone()
    records = TaskRecords(running.settings.store)
    snapshot = records.get(id_of(task))
    assert snapshot.task.state is TaskState.QUEUED  # it was stopped, in truth
    records.update(replace(snapshot, task=replace(snapshot.task, state=TaskState.LEARNING)))
    records.close()
    return task


async def test_a_task_that_takes_the_server_along_is_set_aside(
    start: Callable[..., Any], settings: Settings, script: Script
) -> None:
    task = None
    for _ in range(settings.limits.task_attempts):
        task = await killed_at_work(await start(), script, task)
    assert task is not None
    running = await start()
    aside = await running.ended(task.name)
    assert aside.state == pb.TASK_STATE_SET_ASIDE
    assert "the server was killed 3 times" in aside.error.message
    script.pass_from_now_on("TRAINING")
    await taught(running, b=GREEN)
    await running.learner.RetryTask(learner_pb.RetryTaskRequest(name=task.name))
    assert (await running.ended(task.name)).state == pb.TASK_STATE_PUBLISHED


async def test_one_that_comes_further_each_time_is_not(
    start: Callable[..., Any], settings: Settings, script: Script
) -> None:
    task = None
    for epoch in range(2 * settings.limits.task_attempts):
        task = await killed_at_work(await start(), script, task)
        (settings.store / "spool" / id_of(task) / CHECKPOINT).write_text(f"{epoch}\n")
    assert task is not None
    script.pass_from_now_on("TRAINING")
    running = await start()
    assert (await running.ended(task.name)).state == pb.TASK_STATE_PUBLISHED


async def test_nor_one_whose_server_was_only_stopped(
    start: Callable[..., Any], settings: Settings, script: Script
) -> None:
    running = await start()
    script.hold("TRAINING")
    task = await running.learn({"a": [png()]})
    for _ in range(settings.limits.task_attempts + 1):
        await script.reached("TRAINING")
        await running.server.stop()
        script.gone()
        running = await start()
    await script.reached("TRAINING")
    script.release("TRAINING")
    assert (await running.ended(task.name)).state == pb.TASK_STATE_PUBLISHED


async def test_a_server_starts_where_its_records_cannot_be_written(
    start: Callable[..., Any], script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = await start()
    published = await taught(running, b=GREEN)
    task = await killed_at_work(running, script)
    reach_once(monkeypatch, "record.update", errno.ENOSPC)
    script.pass_from_now_on("TRAINING")
    running = await start()
    assert await answered_by(running) == published.version
    assert (await running.ended(task.name)).state == pb.TASK_STATE_PUBLISHED


# -- a power cut -----------------------------------------------------------------------------------


async def test_all_of_a_task_is_flushed_before_it_is_a_task(
    start: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files, and the folders that have their names: what is not may be gone after a power cut."""
    root = tmp_path / "new" / "store"
    flushed: set[Path] = set()
    fsync, insert = os.fsync, TaskRecords.insert
    at_insert: list[set[Path]] = []

    def noting(descriptor: int) -> None:
        fsync(descriptor)
        flushed.add(Path(os.readlink(f"/proc/self/fd/{descriptor}")))

    def asking(records: TaskRecords, task: Task) -> None:
        at_insert.append(set(flushed))
        insert(records, task)

    monkeypatch.setattr(os, "fsync", noting)
    monkeypatch.setattr(TaskRecords, "insert", asking)
    running = await start(store=root)
    task = await running.learn({"a": [png()]}, request_id="r")
    spool = root / "spool" / id_of(task)
    (known,) = at_insert
    files = {spool / name for name in ("images.bin", "examples.jsonl", "upload.json")}
    folders = {spool, root / "spool", root, root / "models", root / "models" / "default"}
    assert files | folders | {root.parent, tmp_path} <= known
    await running.ended(task.name)
