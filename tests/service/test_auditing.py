"""Everything that is acknowledged is in the audit log, once, and nothing else is."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from inflora.v1 import learner_service_pb2 as learner_pb
from inflora.v1 import learner_service_pb2_grpc
from inflora.v1 import model_service_pb2 as model_pb
from inflora.v1 import task_pb2 as pb
from inflora_core import audit, durable, failpoints
from inflora_core.audit import FILE, SERVER, UNKNOWN, Event, Line
from inflora_service import auditing
from inflora_service.server import Settings
from tests.service.conftest import GREEN, RED, Running, Script, fails, png, upload
from tests.service.test_bad_input import assert_unharmed, publish
from tests.service.test_restarting import PROGRAM

SECRET = "Grün von Ü."


def lines(root: Path) -> list[Line]:
    """Return the log, which must be sound, without starts."""
    reading = audit.verify(root)
    assert (reading.faults, reading.torn) == ((), 0)
    return [line for line in reading.lines if line.event != Event.STARTED]


def id_of(task: pb.Task) -> str:
    return task.name.rpartition("/")[2]


async def promote(running: Running, number: int) -> None:
    request = model_pb.PromoteVersionRequest(name=f"models/default/versions/{number}")
    await running.model.PromoteVersion(request)


async def forget(running: Running, *, purge: bool) -> pb.Task:
    request = learner_pb.ForgetClassesRequest(labels=[SECRET], purge=purge)
    task = (await running.learner.ForgetClasses(request)).task
    return await running.ended(task.name)


async def lead_a_life(running: Running, script: Script) -> list[pb.Task]:
    """Do one of everything."""
    first = await running.ended((await running.learn({"red": [png(RED)]})).name)
    second = await running.ended((await running.learn({SECRET: [png(GREEN)]})).name)
    await promote(running, 1)
    await promote(running, 2)
    await promote(running, 2)  # it is already
    script.then("MERGING", do="fail", reason="PARITY", message="they differ", field="")
    failed = await running.ended((await running.learn({"c": [png()]})).name)
    script.hold("TRAINING")
    cancelled = await running.learn({"d": [png()]})
    await script.reached("TRAINING")
    script.pass_from_now_on("TRAINING")
    await running.learner.CancelTask(learner_pb.CancelTaskRequest(name=cancelled.name))
    return [first, second, failed, cancelled, await forget(running, purge=True)]


async def test_the_log_of_a_life(running: Running, script: Script) -> None:
    first, second, failed, cancelled, purged = await lead_a_life(running, script)
    found = lines(running.settings.store)
    said = [(line.event, line.task, line.version_from, line.version_to) for line in found]
    assert said == [
        (Event.ACCEPTED, id_of(first), None, None),
        (Event.PROMOTED, "", None, 1),
        (Event.PUBLISHED, id_of(first), None, 1),
        (Event.ACCEPTED, id_of(second), None, None),
        (Event.PROMOTED, "", 1, 2),
        (Event.PUBLISHED, id_of(second), 1, 2),
        (Event.ROLLED_BACK, "", 2, 1),
        (Event.PROMOTED, "", 1, 2),
        (Event.ACCEPTED, id_of(failed), None, None),
        (Event.FAILED, id_of(failed), None, None),
        (Event.ACCEPTED, id_of(cancelled), None, None),
        (Event.CANCELLED, id_of(cancelled), None, None),
        (Event.ACCEPTED, id_of(purged), None, None),
        (Event.FORGOTTEN, id_of(purged), None, 3),
        (Event.PROMOTED, "", 2, 3),
        (Event.PURGED, id_of(purged), None, 3),
        (Event.PUBLISHED, id_of(purged), 2, 3),
    ]
    asked = (Event.ACCEPTED, Event.CANCELLED, Event.ROLLED_BACK)
    for number, line in enumerate(found):
        by_caller = line.event in asked or number == 7
        assert line.who.startswith("ipv4:127.0.0.1:") if by_caller else line.who == SERVER
        assert not line.recovered
    hashes = {line.data_sha256 for line in found if line.task == id_of(first)}
    assert len(hashes) == 1
    assert len(hashes.pop()) == 64
    # The hash of a request that is nothing but a name is as good as the name.
    assert not any(line.data_sha256 for line in found if line.task == id_of(purged))
    assert [line.reason for line in found if line.event == Event.FAILED] == ["PARITY"]
    assert [line.classes for line in found if line.event == Event.PURGED] == [
        (f"{id_of(second)}.0",)
    ]
    content = (running.settings.store / FILE).read_text()
    assert not {name for name in (SECRET, ascii(SECRET)[1:-1], "they differ") if name in content}


async def test_a_start_completes_a_log_that_was_cut_anywhere(
    running: Running, start: Callable[..., Any], script: Script, tmp_path: Path
) -> None:
    """Whatever a crash kept out of it is read from the store, once, and nothing else is added."""
    tasks = await lead_a_life(running, script)
    await running.server.stop()
    content = (running.settings.store / FILE).read_bytes().splitlines(keepends=True)

    def said(found: list[Line], events: set[str]) -> list[tuple[Any, ...]]:
        return sorted(
            (line.event, line.task, line.version_from, line.version_to, line.data_sha256)
            for line in found
            if line.event in events
        )

    whole = lines(running.settings.store)
    of_tasks = {Event.ACCEPTED, Event.PUBLISHED, Event.FAILED, Event.CANCELLED}
    for cut in range(0, len(content), 3):
        copy = shutil.copytree(running.settings.store, tmp_path / f"copy-{cut}")
        torn = content[cut][:20] if cut % 2 else b""
        (copy / FILE).write_bytes(b"".join(content[:cut]) + torn)
        for _ in range(2):  # the second start has nothing to add
            again: Running = await start(store=copy)
            await again.server.stop()
            found = lines(copy)
            by_event = sorted(of_tasks), said(whole, of_tasks)
            assert by_event == (sorted(of_tasks), said(found, of_tasks))
            assert audit.History.of(found).current[-1] == 3
            for event in (Event.FORGOTTEN, Event.PURGED):
                keys = [line.classes for line in found if line.event == event]
                assert keys == [(f"{id_of(tasks[1])}.0",)]
        added = [line for line in found if line.recovered]
        assert {line.who for line in added if line.event == Event.CANCELLED} <= {UNKNOWN}
        assert all(line.who.startswith("ipv4:") for line in added if line.event == Event.ACCEPTED)
        assert len([*copy.glob("audit.torn-*")]) == bool(torn)


async def test_a_store_without_a_log_gets_one(
    start: Callable[..., Any], settings: Settings
) -> None:
    publish(settings.store, red=RED)
    running: Running = await start()
    await running.server.stop()
    (found,) = lines(settings.store)
    assert (found.event, found.version_to, found.who, found.recovered) == (
        *(Event.PROMOTED, 1, UNKNOWN, True),
    )


async def test_the_head_is_noted_at_start_and_stop(
    start: Callable[..., Any], settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    running: Running = await start()
    assert audit.verify(settings.store).head in caplog.text
    await running.ended((await running.learn({"a": [png()]})).name)
    await running.server.stop()
    assert audit.verify(settings.store).head in caplog.text


@contextmanager
def full(monkeypatch: pytest.MonkeyPatch, times: int) -> Iterator[list[bytes]]:
    """Have the disk refuse the next ``times`` entries; yields those."""
    refused: list[bytes] = []
    append = durable.append

    def fail(path: Path, data: bytes, at: int) -> None:
        if len(refused) < times:
            refused.append(data)
            raise OSError(errno.ENOSPC, "No space left on device")
        append(path, data, at)

    with monkeypatch.context() as broken:
        broken.setattr(durable, "append", fail)
        broken.setattr(auditing, "RETRY_SECONDS", 0.0)
        yield refused


async def test_what_cannot_be_logged_is_not_accepted(
    start: Callable[..., Any], settings: Settings, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(settings.store, red=RED, green=GREEN)
    running: Running = await start()
    with full(monkeypatch, 2):
        with fails("RESOURCE_EXHAUSTED", "LIMIT_EXCEEDED"):
            await running.learn({"a": [png()]}, request_id="again")
        with fails("RESOURCE_EXHAUSTED", "LIMIT_EXCEEDED"):
            await running.learner.ForgetClasses(learner_pb.ForgetClassesRequest(labels=["red"]))
    script.hold("DECODING")
    await assert_unharmed(running)
    task = await running.learn({"a": [png()]}, request_id="again")
    accepted = [line.task for line in lines(settings.store) if line.event == Event.ACCEPTED]
    assert accepted[1:] == [id_of(task)]


async def test_what_is_done_is_told_once_it_is_logged(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    await running.ended((await running.learn({"a": [png()]})).name)
    task = await running.learn({"b": [png()]})
    await running.ended(task.name)
    with full(monkeypatch, 3) as refused:
        await promote(running, 1)
    assert len(refused) == 3
    last = lines(running.settings.store)[-1]
    assert (last.event, last.version_to) == (Event.ROLLED_BACK, 1)


async def test_a_full_disk_does_not_keep_a_server_from_starting(
    start: Callable[..., Any], settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(settings.store, red=RED)
    publish(settings.store, green=GREEN)
    with full(monkeypatch, 1):
        running: Running = await start()
    assert not (settings.store / FILE).exists()
    await promote(running, 1)
    said = [(line.event, line.version_to) for line in audit.verify(settings.store).lines]
    assert said == [(Event.PROMOTED, 2), (Event.STARTED, None), (Event.ROLLED_BACK, 1)]


async def test_a_changed_log_is_said_to_be_and_goes_on(
    running: Running, start: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    await running.ended((await running.learn({"a": [png()]})).name)
    await running.server.stop()
    path = running.settings.store / FILE
    path.write_bytes(path.read_bytes().replace(b"ipv4:127.0.0.1", b"ipv4:127.0.0.9"))
    again: Running = await start()
    assert f"{FILE}, line 2: it was changed" in caplog.text
    await again.ended((await again.learn({"b": [png()]})).name)
    await again.server.stop()
    assert {fault.line for fault in audit.verify(running.settings.store).faults} == {2, 3}


async def test_examples_of_a_task_whose_record_is_lost_are_kept(
    running: Running, start: Callable[..., Any], script: Script, caplog: pytest.LogCaptureFixture
) -> None:
    script.hold("DECODING")
    task = await running.learn({"a": [png()]})
    await script.reached("DECODING")
    await running.server.stop()
    (running.settings.store / "tasks.sqlite").unlink()
    await start()
    assert f"task {id_of(task)} was accepted, and its record is lost" in caplog.text
    assert (running.settings.store / "spool" / id_of(task) / "images.bin").exists()


@pytest.mark.parametrize("point", ["audit.append", "audit.appended"])
@pytest.mark.parametrize("visit", [2, 3, 4])
async def test_a_server_that_is_killed_at_an_entry(
    start: Callable[..., Any],
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    point: str,
    visit: int,
) -> None:
    """First the start is logged; then a task is accepted, its version promoted, and published."""
    command = [sys.executable, "-c", PROGRAM, str(settings.store), *settings.worker]
    process = await asyncio.create_subprocess_exec(
        *command,
        stdout=asyncio.subprocess.PIPE,
        env=os.environ | {failpoints.VARIABLE: f"{point}=kill@{visit}"},
    )
    assert process.stdout is not None
    address = (await process.stdout.readline()).decode().strip()
    async with grpc.aio.insecure_channel(address) as channel:
        stub = learner_service_pb2_grpc.LearnerServiceStub(channel)
        with contextlib.suppress(grpc.aio.AioRpcError):
            await stub.LearnTask(upload({"a": [png()]}))
        assert await process.wait() == -signal.SIGKILL
    running: Running = await start()
    (task,) = (await running.learner.ListTasks(learner_pb.ListTasksRequest())).tasks
    assert (await running.ended(task.name)).version == "models/default/versions/1"
    found = lines(settings.store)
    assert sorted(line.event for line in found) == sorted(
        (Event.ACCEPTED, Event.PROMOTED, Event.PUBLISHED)
    )
    (accepted,) = [line for line in found if line.event == Event.ACCEPTED]
    assert accepted.who.startswith("ipv4:127.0.0.1:")
    # What was not in the log by then is added, and said to be; a publication goes on instead.
    recovered = [line.event for line in found if line.recovered]
    expected = {2: Event.ACCEPTED, 3: Event.PROMOTED, 4: Event.PUBLISHED}
    assert recovered == ([expected[visit]] if point == "audit.append" else [])
