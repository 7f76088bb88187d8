"""A version is promoted while another is being made from the one before."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import pytest

from inflora.v1 import learner_service_pb2 as learner_pb
from inflora.v1 import model_service_pb2 as model_pb
from inflora.v1 import predictor_service_pb2 as predictor_pb
from inflora.v1 import task_pb2 as pb
from inflora_service import learner_process
from inflora_service.server import Settings
from tests.service.conftest import BLUE, GREEN, RED, Running, Script, png
from tests.service.scripted_worker import STAGES


def name_of(version: int) -> str:
    return f"models/default/versions/{version}"


async def promote(running: Running, number: int) -> model_pb.Version:
    request = model_pb.PromoteVersionRequest(name=name_of(number))
    return (await running.model.PromoteVersion(request)).version


async def parent(running: Running, number: int) -> str:
    request = model_pb.GetVersionRequest(name=name_of(number))
    return (await running.model.GetVersion(request)).version.parent


async def known(running: Running) -> set[str]:
    request = predictor_pb.PredictRequest(images=[png(RED)])
    (prediction,) = (await running.predictor.Predict(request)).predictions
    return {score.label for score in prediction.scores}


@pytest.fixture
async def taught(running: Running) -> Running:
    """Version 1 knows red, and version 2 green as well."""
    return await teach_two(running)


async def teach_two(running: Running) -> Running:
    for label, colour in (("red", RED), ("green", GREEN)):
        await running.ended((await running.learn({label: [png(colour)]})).name)
    return running


@pytest.mark.parametrize("stage", STAGES[:-1])
async def test_a_task_begins_anew_on_it(taught: Running, script: Script, stage: str) -> None:
    script.hold(stage)
    task = await taught.learn({"blue": [png(BLUE)]})
    await script.reached(stage)
    held = script.waiting_at(stage)
    assert (await promote(taught, 1)).current
    script.leave(stage, held)

    ended = await taught.ended(task.name)
    assert (ended.state, ended.version) == (pb.TASK_STATE_PUBLISHED, name_of(3))
    assert await parent(taught, 3) == name_of(1)
    assert await known(taught) == {"red", "blue"}
    begun = script.visits.count(("DECODING", task.name.rpartition("/")[2]))
    assert begun == 2
    assert len(script.pids) == 1


async def test_an_edit_does_so_too(taught: Running, script: Script) -> None:
    script.hold("CHECKING")
    update = learner_pb.UpdateClassRequest(parent="models/default", label="red", new_label="rot")
    task = (await taught.learner.UpdateClass(update)).task
    await script.reached("CHECKING")
    held = script.waiting_at("CHECKING")
    await promote(taught, 1)
    script.leave("CHECKING", held)
    assert (await taught.ended(task.name)).state == pb.TASK_STATE_PUBLISHED
    assert await parent(taught, 3) == name_of(1)
    assert await known(taught) == {"rot"}


async def test_promoting_what_is_current_disturbs_nothing(taught: Running, script: Script) -> None:
    script.hold("TRAINING")
    task = await taught.learn({"blue": [png(BLUE)]})
    await script.reached("TRAINING")
    await promote(taught, 2)
    script.release("TRAINING")
    await taught.ended(task.name)
    assert await parent(taught, 3) == name_of(2)
    assert script.visits.count(("DECODING", task.name.rpartition("/")[2])) == 1


@pytest.mark.parametrize("point", ["PUBLISHING", "LEARNED"])
async def test_what_is_made_by_then_is_held_back(
    taught: Running, script: Script, point: str
) -> None:
    script.hold(point)
    task = await taught.learn({"blue": [png(BLUE)]})
    await script.reached(point)
    await promote(taught, 1)
    script.release(point)

    held_back = await taught.ended(task.name)
    assert (held_back.state, held_back.version) == (pb.TASK_STATE_HELD_BACK, name_of(3))
    assert "version 1 was made current" in held_back.error.message
    assert await known(taught) == {"red"}
    assert (await promote(taught, 3)).current  # it is as good as any
    assert await known(taught) == {"red", "green", "blue"}


async def test_what_is_to_be_forgotten_is_forgotten_all_the_same(
    taught: Running, script: Script
) -> None:
    script.hold("PUBLISHING")
    forget = learner_pb.ForgetClassesRequest(parent="models/default", labels=["red"], purge=True)
    task = (await taught.learner.ForgetClasses(forget)).task
    await script.reached("PUBLISHING")
    await promote(taught, 1)
    script.release("PUBLISHING")
    assert (await taught.ended(task.name)).state == pb.TASK_STATE_PUBLISHED
    assert await known(taught) == {"green"}


async def test_a_worker_that_does_not_notice_is_ended_and_that_is_no_crash(
    start: Callable[..., Any],
    settings: Settings,
    script: Script,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    once = settings.limits.model_copy(update={"task_attempts": 1})
    taught = await teach_two(await start(limits=once))
    monkeypatch.setattr(learner_process, "CANCEL_SECONDS", 0.05)
    script.hold("TRAINING")
    task = await taught.learn({"blue": [png(BLUE)]})
    await script.reached("TRAINING")
    script.pass_from_now_on("TRAINING")
    script.kill(signal.SIGSTOP)
    await promote(taught, 1)
    assert (await taught.ended(task.name)).state == pb.TASK_STATE_PUBLISHED
    assert await parent(taught, 3) == name_of(1)
    assert len(script.pids) == 2
