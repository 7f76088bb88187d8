"""The id of a request: taken over or made, given back, and in whatever is logged of the call."""

from __future__ import annotations

import json
import logging
from typing import Any

import grpc
import pytest

from inflora.v1 import learner_service_pb2 as learner_pb
from inflora.v1 import predictor_service_pb2 as pb
from inflora_core.logs import JsonFormatter
from inflora_service.errors import REQUEST_ID
from tests.service.conftest import GREEN, Running, fault_of, png, upload


class Lines(logging.Handler):
    """Keeps what is logged, as JSON."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.setFormatter(JsonFormatter("server"))
        self.read: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.read.append(json.loads(self.format(record)))


@pytest.fixture
def lines() -> Any:
    """What is logged from now on."""
    handler, root = Lines(), logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    yield handler.read
    root.removeHandler(handler)
    root.setLevel(level)


async def id_of(call: Any) -> str:
    """Return the id that a call got back, "" if it got none."""
    found = [str(value) for key, value in await call.trailing_metadata() if key == REQUEST_ID]
    assert len(found) <= 1
    return found[0] if found else ""


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("my-id", True),
        ("x" * 128, True),
        ("x" * 129, False),
        ("two words", False),
        ("", False),
        (None, False),
    ],
)
async def test_an_id_is_taken_over_or_made(running: Running, sent: str | None, kept: bool) -> None:
    metadata = [] if sent is None else [(REQUEST_ID, sent)]
    request = learner_pb.ListTasksRequest(parent="models/default")
    call = running.learner.ListTasks(request, metadata=metadata)
    await call
    assert await id_of(call) == (sent if kept else "")
    call = running.learner.ListTasks(learner_pb.ListTasksRequest(parent="?"), metadata=metadata)
    with pytest.raises(grpc.aio.AioRpcError):
        await call
    found = await id_of(call)
    assert found == sent if kept else len(found) == 16


async def test_it_comes_back_with_errors_and_streams(running: Running) -> None:
    request = pb.PredictRequest(images=[])
    call = running.predictor.Predict(request, metadata=[(REQUEST_ID, "mine")])
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert await id_of(call) == "mine"
    assert fault_of(caught.value).reason == "INVALID_INPUT", "with the details beside it"
    watch = learner_pb.WatchTaskRequest(name="models/default/tasks/none")
    stream = running.learner.WatchTask(watch, metadata=[(REQUEST_ID, "other")])
    with pytest.raises(grpc.aio.AioRpcError):
        await stream.read()
    assert await id_of(stream) == "other"


async def test_ids_are_in_the_log(running: Running, lines: list[dict[str, Any]]) -> None:
    call = running.learner.LearnTask(
        upload({"green": [png(GREEN)]}), metadata=[(REQUEST_ID, "mine")]
    )
    task = (await call).task.name.rpartition("/")[2]
    await running.ended(f"models/default/tasks/{task}")
    said = {line["message"].removeprefix(f"task {task} "): line for line in lines}
    accepted = said["accepted: LEARN, 1 classes, 1 images"]
    assert (accepted["request_id"], accepted["task"]) == ("mine", task)
    published = said["is PUBLISHED"]
    assert published["task"] == task
    assert "request_id" not in published, "the call has ended long ago"
    current = said["version 1 is current"]
    assert (current["task"], current["version"]) == (task, 1)
