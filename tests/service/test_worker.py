"""The worker dies, or speaks nonsense: the task is reported, the next succeeds, Predict goes on."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import Any

import pytest

from inflora.v1 import predictor_service_pb2 as predictor_pb
from inflora.v1 import task_pb2 as pb
from inflora_core.errors import (
    LearnerCrashedError,
    UnsupportedBackboneError,
)
from inflora_service import learner_process
from tests.service.conftest import GREEN, RED, Running, Script, png
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
    assert await running.predictor.Predict(request) == before
    assert ended.state == pb.TASK_STATE_FAILED
    assert b"LEARNER_CRASHED" in ended.error.details[0].value
    assert "SIGKILL" in ended.error.message
    assert stage in ended.error.message
    assert not list((running.settings.store / "spool").iterdir())

    again = await running.learn({"green": [png(GREEN)]})
    assert (await running.ended(again.name)).version == "models/default/versions/2"
    assert len(script.pids) == 2


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
    ended = await running.ended(task.name)
    assert ended.state == pb.TASK_STATE_FAILED
    assert b"LEARNER_CRASHED" in ended.error.details[0].value
    script.pass_from_now_on("EXTENDING")
    again = await running.learn({"a": [png()]})
    assert (await running.ended(again.name)).state == pb.TASK_STATE_PUBLISHED


async def test_that_ends_by_itself_is_reported_with_its_status(
    running: Running, script: Script
) -> None:
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
