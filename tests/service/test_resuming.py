"""Uploads that break off are continued, by a client, after a restart, and not for ever."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from inflora.v1 import evaluator_service_pb2 as evaluator_pb
from inflora.v1 import learner_service_pb2 as learner_pb
from inflora.v1 import task_pb2 as pb
from inflora_core.config import Limits
from inflora_core.spool import INDEX
from inflora_core.store import Store
from inflora_service import tasks
from inflora_service.examples import Examples
from inflora_service.resuming import GRACE_SECONDS, Uploads
from inflora_service.server import Settings
from inflora_service.space import Space
from inflora_service.uploads import Example, TaskRequest
from tests.service.conftest import BLUE, GREEN, RED, Running, Script, fails, png
from tests.service.test_bad_input import publish

CLASSES = {"red": [png(RED)] * 3, "green": [png(GREEN)] * 2, "blue": [png(BLUE)]}
FLAT = [(image, label) for label, images in CLASSES.items() for image in images]
PRECONDITION = ("FAILED_PRECONDITION", "WRONG_STATE", "spec.resume_from")
NONE = ("NOT_FOUND", "NOT_FOUND", "request_id")


@pytest.fixture(autouse=True)
def _learner_holds(script: Script) -> None:
    script.hold("DECODING")


def tiny_limits(**changes: Any) -> Limits:
    return Limits(**{"reserve_bytes": 0, **changes})


def messages(first: int, last: int, **spec: Any) -> list[learner_pb.LearnTaskRequest]:
    """Return a spec and the examples from ``first`` to before ``last``, one a message."""
    return [
        learner_pb.LearnTaskRequest(spec=pb.TaskSpec(**spec)),
        *(
            learner_pb.LearnTaskRequest(
                examples=pb.ExampleBatch(examples=[pb.Example(image=image, label=label)])
            )
            for image, label in FLAT[first:last]
        ),
    ]


END = learner_pb.LearnTaskRequest(end=learner_pb.UploadEnd(example_count=len(FLAT)))


async def begin(running: Running, sent: list[learner_pb.LearnTaskRequest]) -> Any:
    """Send messages, and return the call, which goes on, once they have arrived."""
    call = running.learner.LearnTask()
    for message in sent:
        await call.write(message)
    request_id = sent[0].spec.request_id
    # Not `<`: what begins anew counts from 0, and more may be left of what it replaces.
    while (await count(running, request_id)) != sent[0].spec.resume_from + len(sent) - 1:
        pass
    return call


async def broken(running: Running, sent: list[learner_pb.LearnTaskRequest]) -> None:
    """Send messages, and break off."""
    call = await begin(running, sent)
    assert call.cancel()
    while running.server.tasks._uploads._feeding:
        await count(running, sent[0].spec.request_id)  # there is none for a moment, begun anew


async def query(running: Running, request_id: str) -> learner_pb.QueryUploadResponse:
    request = learner_pb.QueryUploadRequest(request_id=request_id)
    response: learner_pb.QueryUploadResponse = await running.learner.QueryUpload(request)
    return response


async def count(running: Running, request_id: str) -> int:
    """Return how many examples of an upload are durable, 0 for none."""
    try:
        return (await query(running, request_id)).example_count
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.NOT_FOUND:
            raise
        return 0


def spools(running: Running) -> list[Path]:
    return sorted((running.settings.store / "spool").iterdir())


async def go_on(running: Running, there: int, **spec: Any) -> pb.Task:
    sent = [*messages(there, len(FLAT), resume_from=there, **spec), END]
    return (await running.learner.LearnTask(sent)).task


@pytest.mark.parametrize("there", [1, 3, len(FLAT)])
async def test_an_upload_that_broke_off_is_continued(running: Running, there: int) -> None:
    spec = {"request_id": "r", "epochs": 3, "display_name": "Käfer"}
    await broken(running, messages(0, there, **spec))
    found = await query(running, "r")
    assert found.example_count == there
    assert found.example_bytes == sum(len(image) for image, _ in FLAT[:there])
    assert not found.task
    left = found.expire_time.ToSeconds() - time.time()
    assert left == pytest.approx(3600, abs=600)

    task = await go_on(running, there, **spec)
    assert [(c.label, c.example_count) for c in task.classes] == [
        (label, len(images)) for label, images in CLASSES.items()
    ]
    found = await query(running, "r")
    assert (found.task, found.example_count) == (task.name, len(FLAT))
    assert not found.HasField("expire_time")
    (spool,) = spools(running)
    assert task.name.endswith(spool.name)
    # As if it had never broken off: the same content, or this would be refused.
    assert (await running.learn(CLASSES, **spec)).name == task.name


async def test_over_and_over(running: Running, start: Callable[..., Any]) -> None:
    """By a client that loses every connection, and a server that stops in between."""
    for there in range(len(FLAT)):
        assert await count(running, "r") == there
        await broken(running, messages(there, there + 1, request_id="r", resume_from=there))
        if there % 2:
            await running.server.stop()
            running = await start()
    task = await go_on(running, len(FLAT), request_id="r")
    assert (await running.learn(CLASSES, request_id="r")).name == task.name


async def test_a_server_that_stops_keeps_what_has_arrived(start: Callable[..., Any]) -> None:
    running = await start(drain_seconds=0.0)
    call = await begin(running, messages(0, 4, request_id="r"))
    await running.server.stop()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    running = await start()
    assert await count(running, "r") == 4
    task = await go_on(running, 4, request_id="r")
    assert task.example_count == len(FLAT)


@pytest.mark.parametrize("cut", ["examples.jsonl", "images.bin"])
async def test_after_a_power_cut_it_goes_on_after_the_last_whole_example(
    start: Callable[..., Any], cut: str
) -> None:
    running = await start()
    await broken(running, messages(0, 5, request_id="r"))
    await running.server.stop()
    (spool,) = spools(running)
    content = (spool / cut).read_bytes()
    (spool / cut).write_bytes(content[:-3])
    running = await start()
    with fails(*PRECONDITION):
        await go_on(running, 5, request_id="r")
    assert await count(running, "r") == 4
    task = await go_on(running, 4, request_id="r")
    assert (await running.learn(CLASSES, request_id="r")).name == task.name


async def test_it_goes_on_from_where_it_is_and_nowhere_else(running: Running) -> None:
    await broken(running, messages(0, 3, request_id="r"))
    for wrong in (1, 2, 4, 2**62):
        with fails(*PRECONDITION):
            await running.learner.LearnTask(messages(0, 0, request_id="r", resume_from=wrong))
    with pytest.raises(grpc.aio.AioRpcError, match="it goes on from 3"):
        await go_on(running, 2, request_id="r")
    for other in ({"epochs": 4}, {"display_name": "other"}):
        with fails("ALREADY_EXISTS", "CONFLICT", "spec"):
            await go_on(running, 3, request_id="r", **other)
    assert await count(running, "r") == 3, "none of this did it any harm"
    await go_on(running, 3, request_id="r")


async def test_without_a_start_it_begins_anew(running: Running) -> None:
    await broken(running, messages(0, 5, request_id="r"))
    await broken(running, messages(0, 2, request_id="r", epochs=4))
    assert await count(running, "r") == 2
    assert len(spools(running)) == 1
    task = await running.learn(CLASSES, request_id="r")
    assert [task.name.rpartition("/")[2]] == [spool.name for spool in spools(running)]


async def test_what_is_refused_is_not_kept(running: Running) -> None:
    bad = learner_pb.LearnTaskRequest(
        examples=pb.ExampleBatch(examples=[pb.Example(image=b"none", label="a")])
    )
    with fails("INVALID_ARGUMENT", "INVALID_IMAGE", "examples[3].image"):
        await running.learner.LearnTask(iter([*messages(0, 3, request_id="r"), bad, END]))
    with fails(*NONE):
        await query(running, "r")
    await broken(running, messages(0, 2, request_id="r"))
    with fails("INVALID_ARGUMENT", "INVALID_INPUT", "end.example_count"):
        await running.learner.LearnTask([*messages(2, 3, request_id="r", resume_from=2), END])
    with fails(*NONE):
        await query(running, "r")
    assert not spools(running)


async def test_the_limits_hold_for_all_parts_together(start: Callable[..., Any]) -> None:
    running = await start(limits=tiny_limits(task_images=4, task_classes=2))
    await broken(running, messages(0, 3, request_id="r"))
    with fails("RESOURCE_EXHAUSTED", "LIMIT_EXCEEDED", "examples"):
        await running.learner.LearnTask(messages(3, 5, request_id="r", resume_from=3))
    await broken(running, messages(0, 4, request_id="r"))
    await broken(running, messages(4, 4, request_id="r", resume_from=4))
    assert await count(running, "r") == 4


async def test_without_a_request_id_nothing_is_kept(running: Running) -> None:
    call = running.learner.LearnTask()
    for message in messages(0, 3):
        await call.write(message)
    while not spools(running):
        await running.serving()
    assert call.cancel()
    while spools(running):
        await running.serving()


async def test_queries_that_make_no_sense(running: Running) -> None:
    with fails(*NONE):
        await query(running, "unknown")
    with fails("INVALID_ARGUMENT", "INVALID_INPUT", "request_id"):
        await query(running, "")
    with fails("INVALID_ARGUMENT", "INVALID_INPUT", "request_id"):
        await query(running, "x" * 129)
    with fails("NOT_FOUND", "NOT_FOUND", "parent"):
        await running.learner.QueryUpload(learner_pb.QueryUploadRequest(parent="models/other"))


# -- two connections ----------------------------------------------------------------------------


async def test_another_connection_takes_over(running: Running) -> None:
    """From one that is half dead: the server has not noticed, and the client is long gone."""
    half_dead = await begin(running, messages(0, 3, request_id="r"))
    task = await go_on(running, 3, request_id="r")
    with fails("ALREADY_EXISTS", "CONFLICT", "spec.request_id"):
        await half_dead
    assert task.example_count == len(FLAT)
    assert len(spools(running)) == 1
    assert (await running.learn(CLASSES, request_id="r")).name == task.name


async def test_of_many_that_take_over_one_gets_it(running: Running) -> None:
    first = await begin(running, messages(0, 3, request_id="r"))
    calls = await asyncio.gather(
        first, *(go_on(running, 3, request_id="r") for _ in range(6)), return_exceptions=True
    )
    names = {call.name for call in calls if isinstance(call, pb.Task)}
    assert len(names) == 1
    for call in calls:
        if isinstance(call, grpc.aio.AioRpcError) and call.details() != "Internal error from Core":
            assert call.code().name in ("ALREADY_EXISTS", "FAILED_PRECONDITION", "CANCELLED")
    assert len(spools(running)) == 1
    assert (await running.learn(CLASSES, request_id="r")).name in names


async def test_another_spec_does_not_take_over(running: Running) -> None:
    call = await begin(running, messages(0, 3, request_id="r"))
    with fails("ALREADY_EXISTS", "CONFLICT", "spec"):
        await go_on(running, 3, request_id="r", epochs=9)
    for message in [*messages(3, len(FLAT))[1:], END]:
        await call.write(message)
    await call.done_writing()
    assert (await call).task.example_count == len(FLAT)


# -- waiting ------------------------------------------------------------------------------------


async def test_an_idle_upload_is_ended_and_kept(start: Callable[..., Any]) -> None:
    running = await start(limits=tiny_limits(upload_idle_seconds=0.3))
    call = running.learner.LearnTask()
    for message in messages(0, 3, request_id="r"):
        await call.write(message)
    with fails("UNAVAILABLE", "UNAVAILABLE"):
        await call
    assert await count(running, "r") == 3
    task = await go_on(running, 3, request_id="r")
    assert task.example_count == len(FLAT)
    with fails("UNAVAILABLE", "UNAVAILABLE"):
        await running.learner.LearnTask()


async def test_an_idle_evaluation_is_ended(start: Callable[..., Any], settings: Settings) -> None:
    publish(settings.store, red=RED)
    running = await start(limits=tiny_limits(upload_idle_seconds=0.3))
    call = running.evaluator.Evaluate()
    await call.write(evaluator_pb.EvaluateRequest(spec=evaluator_pb.EvaluationSpec()))
    with fails("UNAVAILABLE", "UNAVAILABLE"):
        await call


async def test_what_nobody_continues_is_removed(start: Callable[..., Any]) -> None:
    running = await start(limits=tiny_limits(upload_seconds=0.2))
    await broken(running, messages(0, 3, request_id="r"))
    while await count(running, "r"):
        pass
    while spools(running):
        await running.serving()
    with fails(*PRECONDITION):
        await go_on(running, 3, request_id="r")


@pytest.mark.parametrize("limit", [{"partial_uploads": 2}, {"partial_bytes": 2 * len(png())}])
async def test_those_that_waited_longest_make_room(
    start: Callable[..., Any], limit: dict[str, int]
) -> None:
    running = await start(limits=tiny_limits(**limit))
    for request_id in "abc":
        await broken(running, messages(0, 1, request_id=request_id))
    assert [await count(running, request_id) for request_id in "abc"] == [0, 1, 1]
    assert len(spools(running)) == 2


class Desk:
    """Uploads of a store that no server uses, by a clock that the test moves."""

    def __init__(self, settings: Settings, **limits: Any) -> None:
        self.clock = 1000.0
        self.limits = tiny_limits(upload_seconds=600.0, **limits)
        self.examples = Examples(settings.store, "never")
        self.examples.open()
        space = Space(Store.open(settings.store), self.limits)
        self.uploads = Uploads(self.examples, space, self.limits, lambda: self.clock)
        self.uploads.adopt([])

    async def begin(self, request_id: str) -> Path:
        """Have an upload break off; return its spool."""
        with contextlib.suppress(asyncio.CancelledError):
            async with self.uploads.open(TaskRequest("", request_id, {}), request_id) as upload:
                await upload.add([Example(png(), "a")])
                raise asyncio.CancelledError
        return self.examples.spools / request_id

    async def passes(self, seconds: float) -> None:
        self.clock += seconds
        await self.uploads.expire()


async def test_expiry_goes_by_the_clock_that_never_goes_back(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(settings)
    spool = await desk.begin("r")
    monkeypatch.setattr(time, "time", lambda: 0.0)
    await desk.passes(599)
    assert spool.exists()
    await desk.passes(1)
    assert not spool.exists()


async def test_one_that_is_continued_while_another_expires_stays(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is not deleted either when it breaks off again meanwhile."""
    desk = Desk(settings)
    spools = [await desk.begin(name) for name in "ab"]
    loop, removing, go_on = asyncio.get_running_loop(), asyncio.Event(), threading.Event()
    remove = Examples.remove

    def slow(examples: Examples, spool: str, **named: bool) -> None:
        if spool == "a":
            loop.call_soon_threadsafe(removing.set)
            assert go_on.wait(60)
        remove(examples, spool, **named)

    monkeypatch.setattr(Examples, "remove", slow)
    expiring = asyncio.ensure_future(desk.passes(600))
    await removing.wait()
    with contextlib.suppress(asyncio.CancelledError):
        async with desk.uploads.open(TaskRequest("", "b", {}, resume_from=1), "new") as upload:
            await upload.add([Example(png(), "a")])
            raise asyncio.CancelledError
    go_on.set()
    await expiring
    assert [spool.exists() for spool in spools] == [False, True]
    found = await desk.uploads.query("b")
    assert found is not None
    assert found.count == 2


@pytest.mark.parametrize(
    ("age", "kept"),
    [(0.0, 600.0), (400.0, 200.0), (1e9, GRACE_SECONDS), (-1e9, 600.0)],
    ids=["fresh", "older", "the clock went forward", "the clock went back"],
)
async def test_what_is_left_of_the_time_after_a_restart(
    settings: Settings, age: float, kept: float
) -> None:
    spool = await Desk(settings).begin("r")
    then = time.time() - age
    os.utime(spool / INDEX, (then, then))
    desk = Desk(settings)
    await desk.passes(kept - 30)
    found = await desk.uploads.query("r")
    assert found is not None
    assert found.count == 1
    await desk.passes(60)
    assert await desk.uploads.query("r") is None
    assert not spool.exists()


async def test_of_two_that_a_crash_left_the_newer_one_goes_on(settings: Settings) -> None:
    spool = await Desk(settings).begin("r")
    older = spool.rename(spool.with_name("older"))
    os.utime(older / INDEX, (time.time() - 100,) * 2)
    await Desk(settings).begin("r")
    desk = Desk(settings)
    assert desk.uploads.hold("r")
    assert not desk.uploads.hold("older")


@pytest.mark.parametrize("step", [timedelta(days=1), timedelta()], ids=["goes back", "stands"])
async def test_ids_and_order_do_not_depend_on_the_clock(
    start: Callable[..., Any], script: Script, monkeypatch: pytest.MonkeyPatch, step: timedelta
) -> None:
    script.pass_from_now_on("DECODING")
    began, looks = tasks.now(), itertools.count()
    monkeypatch.setattr(tasks, "now", lambda: began - next(looks) * step)
    running = await start()
    learned = [await running.ended((await running.learn({x: [png()]})).name) for x in "abc"]
    assert [task.version for task in learned] == [f"models/default/versions/{n}" for n in (1, 2, 3)]
    assert len({task.name for task in learned}) == 3
    response = await running.learner.ListTasks(learner_pb.ListTasksRequest())
    assert [task.name for task in response.tasks] == [task.name for task in reversed(learned)]
    await running.server.stop()
    running = await start()
    assert [await running.get(task.name) for task in learned] == learned
