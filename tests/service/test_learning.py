"""A task from upload to version, as clients see it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from inflora.v1 import learner_service_pb2 as learner_pb
from inflora.v1 import predictor_service_pb2 as predictor_pb
from inflora.v1 import task_pb2 as pb
from tests.service.conftest import BLUE, GREEN, RED, WHITE, Running, Script, fails, png
from tests.service.scripted_worker import STAGES


async def test_a_task_is_learned_and_its_version_answers(running: Running) -> None:
    spec = {"display_name": "Two", "epochs": 7, "held_out_share": 0.0, "learning_rate": 0.5}
    task = await running.learn({"red": [png(RED)] * 2, "green": [png(GREEN)]}, **spec)
    assert task.state in (pb.TASK_STATE_QUEUED, pb.TASK_STATE_LEARNING)
    assert task.display_name == "Two"
    assert [(c.label, c.example_count) for c in task.classes] == [("red", 2), ("green", 1)]
    assert task.example_count == 3
    assert task.example_bytes == 2 * len(png(RED)) + len(png(GREEN))
    assert task.create_time.ToSeconds()

    ended = await running.ended(task.name)
    assert ended.state == pb.TASK_STATE_PUBLISHED, ended
    assert ended.version == "models/default/versions/1"
    assert ended.stage == pb.TASK_STAGE_UNSPECIFIED
    assert (ended.epoch, ended.epochs, ended.loss) == (2, 2, 0.5)
    assert ended.fraction_done == 1
    assert task.create_time.ToNanoseconds() <= ended.start_time.ToNanoseconds()
    assert ended.start_time.ToNanoseconds() <= ended.end_time.ToNanoseconds()
    report = ended.report
    assert report.settings.epochs == 7
    assert report.settings.learning_rate == 0.5
    assert report.settings.rank == 10  # the server's setting
    assert report.settings.threshold == 0.95
    assert report.layers[0].interference == report.interference == 0.25
    assert report.capacity == 0.75
    assert (report.temperature, report.class_bytes, report.shared_bytes) == (1.0, 100, 1000)
    assert report.held_out_method == pb.HELD_OUT_METHOD_UNSPECIFIED
    assert not report.HasField("tasks_left")
    assert not report.HasField("held_out_accuracy")
    assert report.HasField("parity")
    assert [s.stage for s in report.stage_seconds] == [
        pb.TASK_STAGE_DECODING,
        pb.TASK_STAGE_TRAINING,
    ]
    assert await running.get(task.name) == ended
    assert not list((running.settings.store / "spool").iterdir())

    answer = await running.predictor.Predict(
        predictor_pb.PredictRequest(images=[png(GREEN), png(RED, (40, 30))])
    )
    assert [p.scores[0].label for p in answer.predictions] == ["green", "red"]
    assert answer.version == ended.version


async def test_tasks_are_learned_one_after_the_other(running: Running, script: Script) -> None:
    tasks = [await running.learn({label: [png()]}) for label in "abc"]
    ended = [await running.ended(task.name) for task in tasks]
    assert [task.version for task in ended] == [f"models/default/versions/{n}" for n in (1, 2, 3)]
    began = [task for point, task in script.visits if point == "DECODING"]
    assert began == [task.name.split("/")[-1] for task in tasks]
    for earlier, later in itertools.pairwise(ended):
        assert earlier.end_time.ToNanoseconds() <= later.start_time.ToNanoseconds()


async def test_what_the_learner_reports_ends_the_task(running: Running, script: Script) -> None:
    script.then(
        "TRAINING", do="fail", reason="INVALID_INPUT", message="one class only", field="examples"
    )
    task = await running.learn({"a": [png()]})
    ended = await running.ended(task.name)
    assert ended.state == pb.TASK_STATE_FAILED
    assert (ended.error.code, ended.error.message) == (3, "one class only")
    assert len(ended.error.details) == 2
    assert not ended.version
    assert not ended.HasField("report")
    assert not list((running.settings.store / "spool").iterdir())

    again = await running.learn({"a": [png()]})  # its class is free again
    assert (await running.ended(again.name)).state == pb.TASK_STATE_PUBLISHED


# -- request ids ------------------------------------------------------------------------------


async def test_a_retry_returns_the_task_that_exists(running: Running, script: Script) -> None:
    script.hold("TRAINING")
    classes = {"a": [png(RED)], "b": [png(BLUE)]}
    first = await running.learn(classes, request_id="r-1", epochs=3)
    await script.reached("TRAINING")
    again = await running.learn(classes, request_id="r-1", epochs=3)
    assert again.name == first.name
    assert again.state == pb.TASK_STATE_LEARNING
    assert len(list((running.settings.store / "spool").iterdir())) == 1

    script.release("TRAINING")
    await running.ended(first.name)
    late = await running.learn(classes, request_id="r-1", epochs=3)
    assert (late.name, late.state) == (first.name, pb.TASK_STATE_PUBLISHED)
    response = await running.learner.ListTasks(learner_pb.ListTasksRequest())
    assert len(response.tasks) == 1
    assert not list((running.settings.store / "spool").iterdir())


@pytest.mark.parametrize(
    ("classes", "spec"),
    [
        ({"a": [png(RED)]}, {}),
        ({"a": [png(BLUE)], "b": [png(BLUE)]}, {}),
        ({"b": [png(BLUE)], "a": [png(RED)]}, {}),
        ({"a": [png(RED)], "c": [png(BLUE)]}, {}),
        ({"a": [png(RED)], "b": [png(BLUE)]}, {"epochs": 3}),
        ({"a": [png(RED)], "b": [png(BLUE)]}, {"display_name": "other"}),
    ],
)
async def test_a_request_id_is_for_one_content(
    running: Running, script: Script, classes: dict[str, list[bytes]], spec: dict[str, Any]
) -> None:
    script.hold("DECODING")
    await running.learn({"a": [png(RED)], "b": [png(BLUE)]}, request_id="r-1")
    with fails("ALREADY_EXISTS", "CONFLICT", "spec.request_id"):
        await running.learn(classes, request_id="r-1", **spec)
    assert len(list((running.settings.store / "spool").iterdir())) == 1


async def test_of_equal_requests_at_the_same_time_one_is_accepted(
    running: Running, script: Script
) -> None:
    script.hold("DECODING")
    calls = [running.learn({"a": [png()]}, request_id="r-1") for _ in range(8)]
    tasks = await asyncio.gather(*calls)
    assert len({task.name for task in tasks}) == 1
    assert len(list((running.settings.store / "spool").iterdir())) == 1


async def test_a_class_may_be_in_several_tasks(running: Running, script: Script) -> None:
    """Also in one that is queued, and beside new classes."""
    script.hold("DECODING")
    tasks = [
        await running.learn({"a": [png(RED)]}),
        await running.learn({"b": [png(GREEN)], "a": [png(BLUE)]}),
    ]
    await script.reached("DECODING")
    script.release("DECODING")
    tasks.append(await running.learn({"a": [png(WHITE)], "c": [png(RED)]}))
    ended = [await running.ended(task.name) for task in tasks]
    assert [task.state for task in ended] == [pb.TASK_STATE_PUBLISHED] * 3
    assert [c.label for c in ended[2].classes] == ["a", "c"]
    known = running.store.version(3).classes
    assert [(entry.label, entry.task) for entry in known] == [
        (label, task.name.split("/")[-1]) for label, task in zip("abc", tasks, strict=True)
    ]
    request = predictor_pb.PredictRequest(images=[png(WHITE), png(GREEN), png(RED)])
    answer = await running.predictor.Predict(request)
    assert [p.scores[0].label for p in answer.predictions] == ["a", "b", "c"]


# -- lists ------------------------------------------------------------------------------------


async def test_pages_of_tasks(start: Callable[..., Any], script: Script) -> None:
    running = await start()
    tasks = [await running.learn({label: [png()]}) for label in "abc"]
    await running.ended(tasks[-1].name)
    script.hold("TRAINING")
    tasks.append(await running.learn({"d": [png()]}))
    await script.reached("TRAINING")
    tasks.append(await running.learn({"e": [png()]}))

    seen: list[pb.Task] = []
    request = learner_pb.ListTasksRequest(parent="models/default", page_size=2)
    sizes = []
    while True:
        page = await running.learner.ListTasks(request)
        sizes.append(len(page.tasks))
        seen += page.tasks
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    assert sizes == [2, 2, 1]
    assert [task.name for task in seen] == [task.name for task in reversed(tasks)]
    assert [pb.TaskState.Name(task.state)[11:] for task in seen] == [
        "QUEUED",
        "LEARNING",
        *["PUBLISHED"] * 3,
    ]
    assert seen[1].stage == pb.TASK_STAGE_TRAINING
    assert not any(task.HasField("report") for task in seen)


# -- watching ---------------------------------------------------------------------------------


async def test_a_watcher_sees_every_state_to_the_end(running: Running, script: Script) -> None:
    script.hold("DECODING", *STAGES)
    task = await running.learn({"a": [png()]})
    stream = running.learner.WatchTask(learner_pb.WatchTaskRequest(name=task.name))
    seen: list[pb.Task] = []
    for stage in STAGES:
        await script.reached(stage)
        while True:  # what came before is sent before
            response = await stream.read()
            seen.append(response.task)
            if response.task.stage == pb.TaskStage.Value(f"TASK_STAGE_{stage}"):
                break
        script.release(stage)
    while (response := await stream.read()) is not grpc.aio.EOF:
        seen.append(response.task)

    states = list(dict.fromkeys(task.state for task in seen))
    assert states[-2:] == [pb.TASK_STATE_LEARNING, pb.TASK_STATE_PUBLISHED]
    fractions = [task.fraction_done for task in seen]
    assert fractions == sorted(fractions)
    training = next(task for task in seen if task.stage == pb.TASK_STAGE_TRAINING)
    assert (training.epoch, training.epochs, training.loss) == (1, 5, 0.5)
    assert await running.watched(task.name) == [seen[-1]]  # attached after the end


async def test_a_slow_watcher_gets_the_newest(running: Running, script: Script) -> None:
    script.hold("DECODING")
    task = await running.learn({"a": [png()]})
    await script.reached("DECODING")
    snapshots = running.server.tasks.watch(task.name.split("/")[-1])
    first = await anext(snapshots)
    assert first.progress is None or first.progress.stage == "DECODING"
    script.release("DECODING")
    await running.ended(task.name)  # seven stages and two states go by
    assert [snapshot.task.state async for snapshot in snapshots] == ["PUBLISHED"]


async def test_a_watcher_that_leaves_harms_nothing(running: Running, script: Script) -> None:
    script.hold("DECODING")
    task = await running.learn({"a": [png()]})
    streams = [
        running.learner.WatchTask(learner_pb.WatchTaskRequest(name=task.name)) for _ in range(3)
    ]
    for stream in streams:
        await stream.read()
        stream.cancel()
    await script.reached("DECODING")
    script.release("DECODING")
    assert (await running.ended(task.name)).state == pb.TASK_STATE_PUBLISHED
