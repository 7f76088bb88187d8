"""Giving a task up, in each state and stage."""

from __future__ import annotations

import asyncio
import signal

import pytest

from inflora.v1 import learner_service_pb2 as learner_pb
from inflora.v1 import task_pb2 as pb
from tests.service.conftest import Running, Script, fails, png
from tests.service.scripted_worker import STAGES


async def cancel(running: Running, name: str) -> pb.Task:
    response = await running.learner.CancelTask(learner_pb.CancelTaskRequest(name=name))
    return response.task


async def test_while_queued(running: Running, script: Script) -> None:
    script.hold("DECODING")
    first = await running.learn({"a": [png()]})
    second = await running.learn({"b": [png()]})
    await script.reached("DECODING")

    cancelled = await cancel(running, second.name)
    assert cancelled.state == pb.TASK_STATE_CANCELLED
    assert not cancelled.HasField("start_time")
    assert cancelled.HasField("end_time")
    assert await cancel(running, second.name) == cancelled  # once more changes nothing
    assert len(list((running.settings.store / "spool").iterdir())) == 1

    await running.learn({"b": [png()]})  # its class is free again
    script.release("DECODING")
    assert (await running.ended(first.name)).state == pb.TASK_STATE_PUBLISHED
    assert (await running.get(second.name)).state == pb.TASK_STATE_CANCELLED


@pytest.mark.parametrize("stage", STAGES[:-1])
async def test_while_learning(running: Running, script: Script, stage: str) -> None:
    script.hold(stage)
    task = await running.learn({"a": [png()]})
    watching = asyncio.ensure_future(running.watched(task.name))
    await script.reached(stage)

    cancelled = await cancel(running, task.name)
    assert cancelled.state == pb.TASK_STATE_CANCELLED
    assert (await watching)[-1] == cancelled
    assert not running.store.numbers()
    assert not list((running.settings.store / "spool").iterdir())

    script.release(stage)
    again = await running.learn({"a": [png()]})
    assert (await running.ended(again.name)).version == "models/default/versions/1"
    assert len(script.pids) == 1  # the worker did not have to die for it


@pytest.mark.parametrize("point", ["PUBLISHING", "LEARNED"])
async def test_while_publishing(running: Running, script: Script, point: str) -> None:
    script.hold(point)
    task = await running.learn({"a": [png()]})
    await script.reached(point)
    with fails("FAILED_PRECONDITION", "WRONG_STATE", "name"):
        await cancel(running, task.name)
    script.release(point)
    assert (await running.ended(task.name)).state == pb.TASK_STATE_PUBLISHED


async def test_after_the_end(running: Running, script: Script) -> None:
    script.then("MERGING", do="fail", reason="PARITY", message="they differ", field="")
    failed = await running.ended((await running.learn({"a": [png()]})).name)
    published = await running.ended((await running.learn({"a": [png()]})).name)
    for task in (failed, published):
        with fails("FAILED_PRECONDITION", "WRONG_STATE", "name"):
            await cancel(running, task.name)
        assert await running.get(task.name) == task


async def test_while_no_worker_is_up(running: Running, script: Script) -> None:
    script.hold("START")
    task = await running.learn({"a": [png()]})
    assert task.state == pb.TASK_STATE_QUEUED
    assert (await cancel(running, task.name)).state == pb.TASK_STATE_CANCELLED


async def test_a_worker_that_dies_of_it(running: Running, script: Script) -> None:
    script.hold("TRAINING")
    task = await running.learn({"a": [png()]})
    await script.reached("TRAINING")
    script.pass_from_now_on("TRAINING")
    script.kill(signal.SIGSTOP)  # it cannot hear
    cancelling = asyncio.create_task(
        running.server.tasks.cancel(task.name.split("/")[-1], "a test")
    )
    await asyncio.sleep(0)  # the worker is told
    script.kill(signal.SIGKILL)
    assert (await cancelling).task.state == "CANCELLED"
    assert (await running.get(task.name)).state == pb.TASK_STATE_CANCELLED
    again = await running.learn({"a": [png()]})
    assert (await running.ended(again.name)).state == pb.TASK_STATE_PUBLISHED
