"""A server stops or is killed: what was acknowledged is taken up by the next one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from inflora.v1 import learner_service_pb2 as learner_pb
from inflora.v1 import learner_service_pb2_grpc
from inflora.v1 import model_service_pb2 as model_pb
from inflora.v1 import predictor_service_pb2 as predictor_pb
from inflora.v1 import task_pb2 as pb
from inflora_core import audit
from inflora_core.audit import Event
from inflora_core.errors import (
    DamagedError,
    InfloraError,
    StateError,
    StoreFormatError,
    UnavailableError,
)
from inflora_core.store import Store
from inflora_service import backbone_source, learner_process, store_lock
from inflora_service.backbone_source import BackboneSource
from inflora_service.server import CURRENT, Settings
from tests.service.conftest import BLUE, GREEN, RED, Running, Script, fails, png, upload
from tests.service.test_bad_input import publish


async def test_tasks_that_have_not_ended_are_taken_up_in_their_order(
    start: Callable[..., Any], script: Script
) -> None:
    running = await start()
    script.hold("TRAINING")
    tasks = [await running.learn({label: [png()]}, request_id=label) for label in "abc"]
    await script.reached("TRAINING")
    assert (await running.get(tasks[0].name)).state == pb.TASK_STATE_LEARNING
    await running.server.stop()
    script.pass_from_now_on("TRAINING")

    running = await start()
    again = await running.learn({"b": [png()]}, request_id="b")
    assert again.name == tasks[1].name
    ended = [await running.ended(task.name) for task in tasks]
    assert [task.version for task in ended] == [f"models/default/versions/{n}" for n in (1, 2, 3)]
    assert not list((running.settings.store / "spool").iterdir())


async def test_a_version_that_was_durable_already_is_published_not_learned_again(
    start: Callable[..., Any], script: Script
) -> None:
    running = await start()
    script.hold("LEARNED")
    task = await running.learn({"a": [png()]})
    await script.reached("LEARNED")
    await running.server.stop()
    assert running.store.current() is None
    visits = len(script.visits)

    script.hold("START")  # it needs no worker
    running = await start()
    ended = await running.ended(task.name)
    assert ended.state == pb.TASK_STATE_PUBLISHED
    assert ended.version == "models/default/versions/1"
    assert running.store.numbers() == [1]
    assert not [visit for visit in script.visits[visits:] if visit[0] != "START"]


async def test_ended_tasks_stay_ended(start: Callable[..., Any], script: Script) -> None:
    running = await start()
    script.then("MERGING", do="fail", reason="PARITY", message="they differ", field="")
    tasks = [await running.learn({label: [png()]}) for label in "ab"]
    ended = [await running.ended(task.name) for task in tasks]
    await running.server.stop()
    running = await start()
    for task in ended:
        assert await running.get(task.name) == task
    answer = await running.predictor.Predict(predictor_pb.PredictRequest(images=[png()]))
    assert answer.version == ended[1].version


async def test_what_nobody_was_told_of_is_removed(
    start: Callable[..., Any], settings: Settings
) -> None:
    orphan = settings.store / "spool" / "20260101-000000-00000000"
    orphan.mkdir(parents=True)
    (orphan / "images.bin").write_bytes(b"half an upl")
    half = settings.store / f".CURRENT.{'0' * 32}"
    half.write_bytes(b"1 ")
    ours = settings.store / ".notes.txt"
    ours.write_text("an operator's")
    running = await start()
    assert (orphan.exists(), half.exists(), ours.exists()) == (False, False, True)
    await running.learn({"a": [png()]})


# -- a server that is killed ---------------------------------------------------------------------

PROGRAM = """
import asyncio, pathlib, sys
from inflora_service.server import Settings, serve

settings = Settings(store=pathlib.Path(sys.argv[1]), port=0, worker=tuple(sys.argv[2:]))
asyncio.run(serve(settings, lambda address: print(address, flush=True)))
"""


@contextlib.asynccontextmanager
async def killed_at(
    point: str, settings: Settings, script: Script, colour: tuple[int, int, int] = RED
) -> AsyncIterator[str]:
    """Run a server as a process, and kill it when its worker waits at ``point`` with a task.

    Yields the task's name, with the worker, too, just before it notices.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PROGRAM, str(settings.store), *settings.worker),
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        address = (await process.stdout.readline()).decode().strip()
        async with grpc.aio.insecure_channel(address) as channel:
            stub = learner_service_pb2_grpc.LearnerServiceStub(channel)
            script.hold(point)
            task = (await stub.LearnTask(upload({"a": [png(colour)]}))).task
            await script.reached(point)
            script.pass_from_now_on(point)
            script.kill(signal.SIGSTOP)
    finally:
        process.kill()
        await process.wait()
    worker = script.pids[-1]
    try:
        yield task.name
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize("point", ["DECODING", "TRAINING", "PUBLISHING", "LEARNED"])
async def test_a_task_of_a_killed_server_becomes_one_version(
    start: Callable[..., Any], settings: Settings, script: Script, point: str
) -> None:
    async with killed_at(point, settings, script) as name:
        starting = asyncio.create_task(start())
        script.kill(signal.SIGCONT)
        running = await starting
        assert (await running.ended(name)).version == "models/default/versions/1"
        assert running.store.numbers() == [1]
        assert not list((settings.store / "spool").iterdir())


async def test_a_worker_that_is_left_keeps_the_store_to_itself(
    start: Callable[..., Any],
    settings: Settings,
    script: Script,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(store_lock, "PATIENCE_SECONDS", 0.0)
    async with killed_at("PUBLISHING", settings, script):
        with pytest.raises(UnavailableError, match="another server"):
            await start()


# -- draining -----------------------------------------------------------------------------------


async def test_watchers_are_sent_away_and_uploads_are_finished(
    start: Callable[..., Any], script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learner_process, "STOP_SECONDS", 0.1)
    running = await start()
    script.hold("TRAINING")
    task = await running.learn({"a": [png()]})
    await script.reached("TRAINING")
    watching = running.learner.WatchTask(learner_pb.WatchTaskRequest(name=task.name))
    await watching.read()
    script.kill(signal.SIGSTOP)  # it does not hear of the cancellation
    cancelling = running.learner.CancelTask(learner_pb.CancelTaskRequest(name=task.name))
    uploading = running.learner.LearnTask()
    *messages, end = upload({"b": [png()]})
    for message in messages:
        await uploading.write(message)
    await running.get(task.name)  # what was sent before has arrived
    health = running.health.Watch(
        health_pb2.HealthCheckRequest(service="inflora.v1.LearnerService")
    )
    assert (await health.read()).status == health_pb2.HealthCheckResponse.SERVING

    stopping = asyncio.create_task(running.server.stop())
    assert (await health.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    health.cancel()
    with fails("UNAVAILABLE", "UNAVAILABLE"):
        while True:
            await watching.read()
    await uploading.write(end)
    await uploading.done_writing()
    accepted = (await uploading).task
    await stopping
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cancelling
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE

    script.pass_from_now_on("TRAINING")
    running = await start()
    for name in (task.name, accepted.name):
        assert (await running.ended(name)).state == pb.TASK_STATE_PUBLISHED


# -- starts that must fail, and say why ---------------------------------------------------------


async def test_a_port_in_use(start: Callable[..., Any], settings: Settings, tmp_path: Path) -> None:
    running = await start()
    port = int(running.server.address.rpartition(":")[2])
    with pytest.raises(UnavailableError, match=str(port)):
        await start(store=tmp_path / "other", port=port)
    assert await running.serving() == "SERVING"


async def test_a_store_in_use(start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_lock, "PATIENCE_SECONDS", 0.0)
    running = await start()
    with pytest.raises(UnavailableError, match="another server"):
        await start()
    assert await running.serving() == "SERVING"
    await running.server.stop()
    await start()


async def test_a_store_of_a_newer_release(start: Callable[..., Any], settings: Settings) -> None:
    marker = settings.store / "FORMAT"
    marker.write_text(json.dumps({"format": 99}))
    with pytest.raises(StoreFormatError, match="99"):
        await start()


async def test_damaged_records(start: Callable[..., Any], settings: Settings) -> None:
    (settings.store / "tasks.sqlite").write_bytes(b"this is no database" * 1000)
    with pytest.raises(DamagedError, match=r"tasks\.sqlite"):
        await start()


async def test_a_damaged_backbone(start: Callable[..., Any], settings: Settings) -> None:
    (path,) = settings.store.glob("backbones/*/weights.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(DamagedError, match=r"weights\.safetensors"):
        await start()


async def test_another_backbone_than_the_store_s(
    start: Callable[..., Any], script: Script, tmp_path: Path
) -> None:
    file, moved, other = (tmp_path / name for name in ("a.bin", "moved.bin", "other.bin"))
    file.write_bytes(b"weights")
    moved.write_bytes(b"weights")
    other.write_bytes(b"other weights")
    store = tmp_path / "new"
    for backbone in (str(file), str(moved), None):
        running = await start(store=store, backbone=backbone)
        await running.server.stop()
    for backbone in (str(other), "bundled"):
        with pytest.raises(StateError, match=r"a\.bin"):
            await start(store=store, backbone=backbone)


async def test_a_backbone_is_noted_before_there_is_one(
    start: Callable[..., Any], script: Script, tmp_path: Path
) -> None:
    store = tmp_path / "new"
    # Just after the worker gave the store its backbone, as if the server had died there.
    script.then("PREPARE", do="fail", reason="INTERNAL", message="the end", field="")
    with pytest.raises(InfloraError, match="the end"):
        await start(store=store, backbone="first")
    assert Store.open(store).has_backbone()
    with pytest.raises(StateError, match="first"):
        await start(store=store, backbone="second")
    await start(store=store, backbone="first")


def test_a_note_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (BackboneSource(name, None, "") for name in ("first", "second"))
    backbone_source.remember(tmp_path, first)

    def fail(*paths: object) -> None:
        raise OSError("the disk is gone")

    with monkeypatch.context() as broken:
        broken.setattr(backbone_source.os, "replace", fail)
        with pytest.raises(OSError, match="gone"):
            backbone_source.remember(tmp_path, second)
    backbone_source.check(tmp_path, first)
    assert [path.name for path in tmp_path.iterdir()] == [backbone_source.FILE]
    backbone_source.remember(tmp_path, second)
    with pytest.raises(StateError, match="second"):
        backbone_source.check(tmp_path, first)


# -- a damaged version --------------------------------------------------------------------------


def damage(root: Path, number: int, name: str) -> Path:
    """Cut a file of a version short; return its path."""
    path = Store.open(root).path(number, name)
    path.write_bytes(path.read_bytes()[:-1])
    return path


async def test_queued_tasks_outlive_a_damaged_current_version(
    start: Callable[..., Any], settings: Settings, script: Script
) -> None:
    publish(settings.store, red=RED)
    number = publish(settings.store, green=GREEN)
    running: Running = await start()
    script.hold("DECODING")
    tasks = [await running.learn({label: [png()]}) for label in "ab"]
    await script.reached("DECODING")
    await running.server.stop()
    damage(settings.store, number, "head.safetensors")

    script.pass_from_now_on("DECODING")
    running = await start()
    await running.server.tasks._learner.wait_ready()
    await asyncio.sleep(0.1)  # time enough to fail
    for task in tasks:
        assert (await running.get(task.name)).state == pb.TASK_STATE_QUEUED
    promote = model_pb.PromoteVersionRequest(name="models/default/versions/1")
    await running.model.PromoteVersion(promote)
    for task in tasks:
        assert (await running.ended(task.name)).state == pb.TASK_STATE_PUBLISHED
    version = running.store.version(3)
    assert (version.parent, [c.label for c in version.classes]) == (1, ["red", "a"])


async def test_a_damaged_onnx_file_is_made_again(
    start: Callable[..., Any], settings: Settings
) -> None:
    publish(settings.store, red=RED)
    number = publish(settings.store, green=GREEN)
    path = Store.open(settings.store).path(number, "model.onnx")
    content = path.read_bytes()
    damage(settings.store, number, "model.onnx")
    Store.open(settings.store).path(1, "model.onnx").unlink()
    running: Running = await start()
    assert path.read_bytes() == content
    for name in ("models/default/versions/2", "models/default/versions/1"):
        request = predictor_pb.PredictRequest(images=[png()], version=name)
        assert (await running.predictor.Predict(request)).version == name


async def test_an_onnx_file_that_cannot_be_made_again(
    start: Callable[..., Any], settings: Settings
) -> None:
    number = publish(settings.store, red=RED)
    for name in ("model.onnx", "head.safetensors"):
        damage(settings.store, number, name)
    running: Running = await start()
    with fails("DATA_LOSS", "DAMAGED"):
        await running.predictor.Predict(predictor_pb.PredictRequest(images=[png()]))


async def current(running: Running) -> model_pb.Version:
    request = model_pb.GetVersionRequest(name="models/default/versions/current")
    return (await running.model.GetVersion(request)).version


async def answered(running: Running) -> int:
    """Return the number of the version that answers."""
    answer = await running.predictor.Predict(predictor_pb.PredictRequest(images=[png()]))
    return int(answer.version.rpartition("/")[2])


def events(root: Path) -> list[tuple[str, int | None, int | None]]:
    """Return what the audit log says, but for starts; it must be sound."""
    reading = audit.verify(root)
    assert (reading.faults, reading.torn) == ((), 0)
    return [
        (line.event, line.version_from, line.version_to)
        for line in reading.lines
        if line.event != Event.STARTED
    ]


async def test_the_newest_sound_ancestor_answers_in_place_of_a_damaged_version(
    start: Callable[..., Any], settings: Settings
) -> None:
    publish(settings.store, red=RED)
    number = publish(settings.store, green=GREEN)
    path = Store.open(settings.store).path(number, "head.safetensors")
    content = path.read_bytes()
    damage(settings.store, number, "head.safetensors")
    running: Running = await start()
    assert await running.serving("inflora.v1.PredictorService") == "SERVING"
    assert await running.serving(CURRENT) == "NOT_SERVING"
    assert await answered(running) == 1
    shown = await current(running)
    assert (shown.name, shown.current, shown.stand_in) == ("models/default/versions/1", True, True)
    assert running.store.current() == number
    task = await running.learn({"blue": [png()]})  # waits for a version to build on
    assert task.state == pb.TASK_STATE_QUEUED
    with fails("DATA_LOSS", "DAMAGED"):
        await running.model.PromoteVersion(
            model_pb.PromoteVersionRequest(name="models/default/versions/2")
        )
    await running.server.stop()
    assert events(settings.store)[1:] == [
        (Event.FELL_BACK, 2, 1),
        (Event.ACCEPTED, None, None),
    ]

    path.write_bytes(content)  # restored: all is as if it had never been damaged
    running = await start()
    assert await running.serving(CURRENT) == "SERVING"
    assert (await running.ended(task.name)).version == "models/default/versions/3"
    assert [c.label for c in running.store.version(3).classes] == ["red", "green", "blue"]
    assert not (await current(running)).stand_in


async def test_what_stands_in_can_be_promoted(
    start: Callable[..., Any], settings: Settings
) -> None:
    publish(settings.store, red=RED)
    number = publish(settings.store, green=GREEN)
    damage(settings.store, number, "head.safetensors")
    running: Running = await start()
    task = await running.learn({"blue": [png()]})
    promote = model_pb.PromoteVersionRequest(name="models/default/versions/1")
    promoted = (await running.model.PromoteVersion(promote)).version
    assert (promoted.current, promoted.stand_in) == (True, False)
    assert await running.serving(CURRENT) == "SERVING"
    assert (await running.ended(task.name)).state == pb.TASK_STATE_PUBLISHED
    assert running.store.version(3).parent == 1
    await running.server.stop()
    assert (Event.ROLLED_BACK, 2, 1) in events(settings.store)


@pytest.mark.parametrize("name", ["head.safetensors", "manifest.json"])
async def test_several_damaged_generations(
    start: Callable[..., Any], settings: Settings, name: str
) -> None:
    """Also where a manifest cannot say any more what its version was made from: the log can."""
    running: Running = await start()
    for label in "abcd":
        await running.ended((await running.learn({label: [png()]})).name)
    await running.server.stop()
    for number in (2, 3, 4):
        path = running.store._folder(number) / name
        path.write_bytes(path.read_bytes()[:-1])
    running = await start()
    assert await answered(running) == 1
    assert await running.serving(CURRENT) == "NOT_SERVING"


async def test_a_branch_is_no_ancestor(start: Callable[..., Any], settings: Settings) -> None:
    for name in "abc":
        publish(settings.store, **{name: RED})
    Store.open(settings.store).set_current(1)
    number = publish(settings.store, d=GREEN)
    damage(settings.store, number, "head.safetensors")
    running: Running = await start()
    assert (number, await answered(running)) == (4, 1)


async def test_with_nothing_sound_left_no_version_answers(
    start: Callable[..., Any], settings: Settings
) -> None:
    numbers = [publish(settings.store, **{name: RED}) for name in "ab"]
    for number in numbers:
        damage(settings.store, number, "head.safetensors")
    running: Running = await start()
    assert await running.serving("inflora.v1.PredictorService") == "NOT_SERVING"
    assert await running.serving(CURRENT) == "NOT_SERVING"
    assert await running.serving() == "SERVING"
    with fails("DATA_LOSS", "DAMAGED"):
        await running.predictor.Predict(predictor_pb.PredictRequest(images=[png()]))
    assert (await running.learn({"c": [png()]})).state == pb.TASK_STATE_QUEUED


@pytest.mark.parametrize("purge", [False, True])
async def test_what_is_forgotten_stays_so_in_what_stands_in(
    start: Callable[..., Any], settings: Settings, purge: bool
) -> None:
    publish(settings.store, red=RED)
    publish(settings.store, blue=BLUE)
    publish(settings.store, secret=GREEN)
    running: Running = await start()
    request = learner_pb.ForgetClassesRequest(labels=["secret"], purge=purge)
    task = (await running.learner.ForgetClasses(request)).task
    assert (await running.ended(task.name)).state == pb.TASK_STATE_PUBLISHED
    await running.server.stop()
    damage(settings.store, 4, "head.safetensors")
    running = await start()
    assert await answered(running) == (2 if purge else 3)
    assert [c.label for c in (await current(running)).classes] == ["red", "blue"]
    answer = await running.predictor.Predict(
        predictor_pb.PredictRequest(images=[png(GREEN)], top_k=10)
    )
    assert {score.label for score in answer.predictions[0].scores} == {"red", "blue"}


@pytest.mark.parametrize("content", [None, "two", "77\n", "1 " + "0" * 64 + "\n"])
async def test_a_lost_pointer_does_not_begin_anew(
    start: Callable[..., Any], settings: Settings, content: str | None
) -> None:
    running: Running = await start()
    for label in "ab":
        await running.ended((await running.learn({label: [png()]})).name)
    await running.server.stop()
    pointer = settings.store / "models/default/CURRENT"
    pointer.unlink()
    if content is not None:
        pointer.write_text(content)
    running = await start()
    assert await running.serving(CURRENT) == "NOT_SERVING"
    task = await running.learn({"c": [png()]})
    assert task.state == pb.TASK_STATE_QUEUED
    promote = model_pb.PromoteVersionRequest(name="models/default/versions/2")
    if content != "77\n":  # which names no version, so nobody knows what it was made from
        assert await answered(running) == 2
    await running.model.PromoteVersion(promote)
    assert (await running.ended(task.name)).version == "models/default/versions/3"
    assert running.store.version(3).parent == 2


async def test_what_is_left_of_a_store_is_not_taken_for_a_new_one(
    start: Callable[..., Any], settings: Settings
) -> None:
    publish(settings.store, red=RED)
    pointer = settings.store / "models/default/backbone"
    sha256 = pointer.read_bytes()
    pointer.unlink()
    with pytest.raises(DamagedError, match="no backbone"):
        await start()
    assert not pointer.exists()
    pointer.write_bytes(sha256)
    assert await answered(await start()) == 1


@pytest.mark.parametrize("name", [b"\xff", b"Not an id", "\N{SUPERSCRIPT TWO}".encode()])
async def test_what_is_not_ours_in_the_spool_does_not_keep_a_server_from_starting(
    start: Callable[..., Any], settings: Settings, name: bytes
) -> None:
    stranger = os.fsencode(settings.store / "spool") + b"/" + name
    os.makedirs(stranger)
    running: Running = await start()
    await running.server.tasks.sweep()
    assert stranger in [os.fsencode(path) for path in (settings.store / "spool").iterdir()]
    assert await running.serving() == "SERVING"
