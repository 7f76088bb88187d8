"""The worker dies, or speaks nonsense: the task is reported, the next succeeds, Predict goes on."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import pytest

from inflora.v1 import learner_service_pb2 as learner_pb
from inflora.v1 import predictor_service_pb2 as predictor_pb
from inflora.v1 import task_pb2 as pb
from inflora_core import audit
from inflora_core.audit import Event
from inflora_core.errors import (
    LearnerCrashedError,
    UnsupportedBackboneError,
)
from inflora_service import learner_process
from inflora_service.doctor import examine
from inflora_service.server import Settings
from tests.service.conftest import GREEN, RED, Running, Script, fails, png
from tests.service.scripted_worker import STAGES
from tests.service.test_bad_input import publish


@pytest.mark.parametrize("stage", STAGES)
async def test_killed_in_a_stage(
    start: Callable[..., Any], settings: Any, script: Script, stage: str
) -> None:
    publish(settings.store, red=RED)
    running = await start()
    script.hold(stage)
    task = await running.learn({"green": [png(GREEN)]})
    await script.reached(stage)
    script.pass_from_now_on(stage)
    request = predictor_pb.PredictRequest(images=[png(RED)])
    before = await running.predictor.Predict(request)

    script.kill(signal.SIGKILL)
    assert await running.predictor.Predict(request) == before
    ended = await running.ended(task.name)
    assert ended.version == "models/default/versions/2", "another worker took it up"
    assert running.store.numbers() == [1, 2]
    assert len(script.pids) == 2
    assert not list((running.settings.store / "spool").iterdir())


@pytest.fixture
async def set_aside(running: Running, script: Script) -> pb.Task:
    """A task of which three workers died, one of them further on than the one before it."""
    script.then("DECODING", do="exit", status=4)
    for _ in range(3):
        script.then("TRAINING", do="exit", status=3)
    task = await running.learn({"green": [png(GREEN)]}, request_id="green")
    ended: pb.Task = await running.ended(task.name)
    assert len(script.pids) in (4, 5)
    return ended


async def test_a_task_that_keeps_ending_it_is_set_aside(
    running: Running, set_aside: pb.Task, start: Callable[..., Any]
) -> None:
    assert set_aside.state == pb.TASK_STATE_SET_ASIDE
    assert b"LEARNER_CRASHED" in set_aside.error.details[0].value
    assert "exit status 3 at stage TRAINING, epoch 1 of" in set_aside.error.message
    other = await running.learn({"red": [png(RED)]})
    assert (await running.ended(other.name)).version == "models/default/versions/1"
    spool = running.settings.store / "spool" / set_aside.name.rpartition("/")[2]
    await running.server.stop()
    running = await start()
    await running.server.tasks.sweep()
    assert (await running.get(set_aside.name)).state == pb.TASK_STATE_SET_ASIDE
    assert (spool / "images.bin").exists()
    retry = learner_pb.RetryTaskRequest(name=set_aside.name)
    again = (await running.learner.RetryTask(retry)).task
    assert (again.state, again.HasField("error")) == (pb.TASK_STATE_QUEUED, False)
    assert (await running.ended(again.name)).version == "models/default/versions/2"
    assert not spool.exists()
    with fails("FAILED_PRECONDITION", "WRONG_STATE", field="name"):
        await running.learner.RetryTask(retry)
    events = [line.event for line in audit.verify(running.settings.store).lines]
    about = [event for event in events if event in (Event.SET_ASIDE, Event.RETRIED)]
    assert about == [Event.SET_ASIDE, Event.RETRIED]
    assert examine(running.settings.store, read_only=True).sound


async def test_a_task_that_was_set_aside_can_be_given_up(
    running: Running, set_aside: pb.Task
) -> None:
    request = learner_pb.CancelTaskRequest(name=set_aside.name)
    for _ in range(2):
        cancelled = (await running.learner.CancelTask(request)).task
        assert cancelled.state == pb.TASK_STATE_CANCELLED
        assert not cancelled.HasField("error")
    assert not list((running.settings.store / "spool").iterdir())


async def test_its_examples_are_no_upload_that_broke_off(
    running: Running, set_aside: pb.Task, start: Callable[..., Any]
) -> None:
    """Those go after a while, or when the request comes again; it waits as long as it takes."""
    await running.server.stop()
    limits = running.settings.limits.model_copy(update={"upload_seconds": 0.0})
    running = await start(limits=limits)
    again = await running.learn({"green": [png(GREEN)]}, request_id="green")
    assert (again.name, again.state) == (set_aside.name, pb.TASK_STATE_SET_ASIDE)
    retry = learner_pb.RetryTaskRequest(name=set_aside.name)
    await running.learner.RetryTask(retry)
    assert (await running.ended(set_aside.name)).state == pb.TASK_STATE_PUBLISHED


async def test_workers_that_die_early_and_late_in_turn_come_no_further(
    running: Running, script: Script
) -> None:
    for answer in ({"do": "exit", "status": 3}, {"do": "go"}, {"do": "exit", "status": 3}):
        script.then("TRAINING", **answer)
    script.then("EXPORTING", do="exit", status=3)
    ended = await running.ended((await running.learn({"green": [png(GREEN)]})).name)
    assert ended.state == pb.TASK_STATE_SET_ASIDE


async def test_what_is_purged_meanwhile_is_not_tried_again(
    running: Running, set_aside: pb.Task
) -> None:
    for label in ("green", "red"):
        await running.ended((await running.learn({label: [png(GREEN)]})).name)
    purge = learner_pb.ForgetClassesRequest(labels=["green"], purge=True)
    await running.ended((await running.learner.ForgetClasses(purge)).task.name)
    assert not list((running.settings.store / "spool").iterdir())
    assert examine(running.settings.store, read_only=True).sound
    with fails("FAILED_PRECONDITION", "WRONG_STATE", field="name"):
        await running.learner.RetryTask(learner_pb.RetryTaskRequest(name=set_aside.name))


async def test_a_task_that_takes_too_long_fails(
    start: Callable[..., Any], settings: Settings, script: Script
) -> None:
    limits = settings.limits.model_copy(update={"task_seconds": 0.5})
    running = await start(limits=limits)
    script.hold("TRAINING")
    ended = await running.ended((await running.learn({"a": [png()]})).name)
    assert ended.state == pb.TASK_STATE_FAILED
    assert "longer than 0.5 s" in ended.error.message
    script.pass_from_now_on("TRAINING")
    assert len(script.pids) == 1


async def test_a_worker_that_ignores_a_cancellation_is_ended(
    running: Running, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learner_process, "CANCEL_SECONDS", 0.0)
    script.hold("TRAINING")
    task = await running.learn({"a": [png()]})
    await script.reached("TRAINING")
    script.pass_from_now_on("TRAINING")
    os.kill(script.pids[-1], signal.SIGSTOP)
    cancelled = await running.learner.CancelTask(learner_pb.CancelTaskRequest(name=task.name))
    assert cancelled.task.state == pb.TASK_STATE_CANCELLED
    again = await running.learn({"a": [png()]})
    assert (await running.ended(again.name)).state == pb.TASK_STATE_PUBLISHED


async def test_killed_when_the_version_is_durable_already(running: Running, script: Script) -> None:
    script.hold("LEARNED")
    task = await running.learn({"a": [png()]})
    await script.reached("LEARNED")
    script.kill(signal.SIGKILL)
    ended = await running.ended(task.name)
    assert ended.state == pb.TASK_STATE_PUBLISHED
    assert ended.version == "models/default/versions/1"
    assert running.store.current() == 1


async def test_killed_while_it_has_nothing_to_do(running: Running, script: Script) -> None:
    await running.ended((await running.learn({"a": [png()]})).name)
    script.kill(signal.SIGKILL)
    task = await running.learn({"b": [png()]})
    assert (await running.ended(task.name)).state == pb.TASK_STATE_PUBLISHED
    assert len(script.pids) == 2


@pytest.mark.parametrize(
    "line",
    [
        "no JSON",
        "[1]",
        "{}",
        '{"event": "invented"}',
        '{"event": "progress", "task": TASK, "stage": "DREAMING"}',
        '{"event": "learned", "task": TASK, "version": "the best"}',
        '{"event": "' + "x" * 2**21 + '"}',
    ],
)
async def test_that_speaks_nonsense_is_replaced(
    running: Running, script: Script, line: str
) -> None:
    script.hold("TRAINING")
    task = await running.learn({"a": [png()]})
    await script.reached("TRAINING")
    script.pass_from_now_on("TRAINING")
    name = task.name.split("/")[-1]
    script.hold("EXTENDING")
    script.release("TRAINING", do="say", line=line.replace("TASK", f'"{name}"'))
    await script.reached("EXTENDING")
    script.release("EXTENDING")
    assert (await running.ended(task.name)).state == pb.TASK_STATE_PUBLISHED
    assert len(script.pids) == 2


async def test_that_ends_by_itself_is_reported_with_its_status(
    running: Running, script: Script
) -> None:
    for _ in range(running.settings.limits.task_attempts):
        script.then("CHECKING", do="exit", status=3)
    ended = await running.ended((await running.learn({"a": [png()]})).name)
    assert "exit status 3 at stage CHECKING" in ended.error.message


async def test_that_dies_before_it_begins_is_tried_once_more(
    running: Running, script: Script
) -> None:
    """Nobody can tell whether it read the command: the task is not to blame the first time."""
    script.hold("START")
    task = await running.learn({"a": [png()]})
    await script.reached("START")
    script.kill(signal.SIGKILL)
    await script.reached("START")
    assert len(script.pids) == 2
    script.release("START")
    assert (await running.ended(task.name)).state == pb.TASK_STATE_PUBLISHED


async def test_health_says_when_no_worker_comes_up(
    start: Callable[..., Any], script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learner_process, "RESTART_DELAYS", (0.0,))
    deaths = learner_process.UNHEALTHY_AFTER
    for _ in range(deaths):
        script.then("START", do="exit", status=1)
    script.hold("START")
    running = await start()
    service = "inflora.v1.LearnerService"
    await script.reached("START")
    assert len(script.pids) == deaths + 1
    assert await running.serving(service) == "NOT_SERVING"
    assert await running.serving() == "SERVING"
    task = await running.learn({"a": [png()]})  # is accepted all the same
    script.release("START")
    assert (await running.ended(task.name)).state == pb.TASK_STATE_PUBLISHED
    assert await running.serving(service) == "SERVING"


async def test_a_new_store_gets_its_backbone_from_the_worker(
    start: Callable[..., Any], settings: Any, script: Script, tmp_path: Any
) -> None:
    running = await start(store=tmp_path / "new")
    assert ("PREPARE", None) in script.visits
    task = await running.learn({"a": [png()]})
    assert (await running.ended(task.name)).state == pb.TASK_STATE_PUBLISHED


async def test_a_backbone_that_is_refused_ends_the_start(
    start: Callable[..., Any], script: Script, tmp_path: Any
) -> None:
    script.then(
        "PREPARE", do="fail", reason="UNSUPPORTED_BACKBONE", message="a Swin has no qkv", field="x"
    )
    with pytest.raises(UnsupportedBackboneError, match="Swin"):
        await start(store=tmp_path / "new", backbone="swin_tiny")
    running = await start(store=tmp_path / "new")  # the store is not spoilt, nor locked
    assert await running.serving() == "SERVING"


@pytest.mark.parametrize(
    "worker", [(sys.executable, "-c", "raise SystemExit(7)"), ("no-such-program",)]
)
async def test_a_new_store_without_a_worker_ends_the_start(
    start: Callable[..., Any],
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
    worker: tuple[str, ...],
) -> None:
    monkeypatch.setattr(learner_process, "RESTART_DELAYS", (0.0,))
    with pytest.raises(LearnerCrashedError, match=r"exit status 7|could not be started"):
        await start(store=tmp_path / "new", worker=worker)
