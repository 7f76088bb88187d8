"""A real server in this process, a real worker process that follows a script, and a client."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from PIL import Image

from inflora.oip.v2 import open_inference_pb2_grpc
from inflora.v1 import (
    evaluator_service_pb2_grpc,
    learner_service_pb2_grpc,
    model_service_pb2_grpc,
    predictor_service_pb2_grpc,
)
from inflora.v1 import learner_service_pb2 as learner_pb
from inflora.v1 import task_pb2 as pb
from inflora_core.config import Limits
from inflora_core.errors import InfloraError
from inflora_core.store import Store
from inflora_service.server import Server, Settings
from tests.service.mean_colour import make_backbone, publish_task

WORKER = Path(__file__).parent / "scripted_worker.py"
ROOT = Path(__file__).parents[2]

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
BLACK = (0, 0, 0)
"""What the publish gate holds back; see ``mean_colour``."""


def png(colour: tuple[int, int, int] = RED, size: tuple[int, int] = (16, 12)) -> bytes:
    """Return an image of one colour."""
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


@dataclass(frozen=True)
class Fault:
    """What a client is told when a call fails."""

    code: grpc.StatusCode
    reason: str
    field: str
    message: str


@contextlib.contextmanager
def fails(code: str, reason: str, field: str = "") -> Any:
    """Expect a call to fail with just this status and details."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        yield
    found = fault_of(caught.value)
    assert (found.code.name, found.reason, found.field) == (code, reason, field), found


def fault_of(error: grpc.aio.AioRpcError) -> Fault:
    """Return what ``error`` carries."""
    call = _Call(error)
    status = rpc_status.from_call(call)
    assert status is not None, f"{error.code()} without details: {error.details()}"
    info, field = error_details_pb2.ErrorInfo(), ""
    for detail in status.details:
        request = error_details_pb2.BadRequest()
        if detail.Is(info.DESCRIPTOR):
            detail.Unpack(info)
        elif detail.Is(request.DESCRIPTOR):
            detail.Unpack(request)
            (violation,) = request.field_violations
            field = violation.field
    assert info.domain == "inflora"
    return Fault(error.code(), info.reason, field, status.message)


class _Call:
    """An ``AioRpcError`` as ``rpc_status`` wants a call."""

    def __init__(self, error: grpc.aio.AioRpcError) -> None:
        self.code, self.details = error.code, error.details
        metadata = error.trailing_metadata()
        self.trailing_metadata = lambda: list(metadata or ())


class Script:
    """Tells the worker what to do, and the test where the worker is."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.pids: list[int] = []
        self.visits: list[tuple[str, str | None]] = []
        self.commands: list[dict[str, Any]] = []
        self._held: set[str] = set()
        self._answers: dict[str, list[dict[str, Any]]] = {}
        self._waiting: dict[str, tuple[asyncio.StreamWriter, Callable[[dict[str, Any]], None]]] = {}
        self._arrival = asyncio.Condition()

    async def serve(self) -> asyncio.Server:
        return await asyncio.start_unix_server(self._talk, self.path)

    def hold(self, *points: str) -> None:
        """Have the worker wait whenever it reaches one of ``points``."""
        self._held.update(points)

    def then(self, point: str, **answer: Any) -> None:
        """Have the worker do something else, the next time it reaches ``point``."""
        self._answers.setdefault(point, []).append(answer)

    async def reached(self, point: str) -> None:
        """Wait until the worker waits at ``point``."""
        async with self._arrival:
            await self._arrival.wait_for(lambda: point in self._waiting)

    def pass_from_now_on(self, point: str) -> None:
        """Hold no worker at ``point`` any more, but leave the one that waits there."""
        self._held.discard(point)

    def release(self, point: str, **answer: Any) -> None:
        """Let the worker go on from ``point``, where it waits, and pass from now on."""
        self.pass_from_now_on(point)
        _, go_on = self._waiting.pop(point)
        go_on(answer or {"do": "go"})

    async def let_pass(self, point: str) -> None:
        """Wait until a worker waits at ``point``, and let it go on, and all that come."""
        # One that was killed with its server may seem to wait, and be gone when this is told.
        while point not in self._waiting:
            await self.reached(point)
        self.release(point)

    def waiting_at(self, point: str | None) -> object:
        """Return what tells the worker that waits at ``point`` from the next one that will."""
        return self._waiting.get(point) if point is not None else None

    def leave(self, point: str, before: object) -> None:
        """Let go of a worker that was told by the server to give up what it waits for.

        Not by an answer, which it might hear first. Should it have come by again, it goes on.
        """
        self.pass_from_now_on(point)
        again = self._waiting.pop(point, None)
        if again is not None and again is not before:
            again[1]({"do": "go"})

    def gone(self) -> None:
        """The worker has ended with its server: it waits nowhere."""
        self._waiting.clear()

    def kill(self, number: signal.Signals) -> None:
        """Send the worker a signal, wherever it is."""
        self._waiting.clear()
        os.kill(self.pids[-1], number)

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(ConnectionError):
            while line := await reader.readline():
                await self._on_question(json.loads(line), writer)
        # A worker that is gone waits nowhere; the next may be there already.
        self._waiting = {at: wait for at, wait in self._waiting.items() if wait[0] is not writer}

    async def _on_question(self, question: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        point = question["at"]
        if question["pid"] not in self.pids:
            self.pids.append(question["pid"])
        self.visits.append((point, question["command"].get("task")))
        self.commands.append(question["command"])
        result = _work(question)

        def answer(how: dict[str, Any]) -> None:
            content = {**how, **result, "number": question["number"]}
            writer.write(json.dumps(content).encode() + b"\n")

        if self._answers.get(point):
            answer(self._answers[point].pop(0))
        elif point in self._held:
            async with self._arrival:
                self._waiting[point] = writer, answer
                self._arrival.notify_all()
        else:
            answer({"do": "go"})


def _work(question: dict[str, Any]) -> dict[str, Any]:
    """Do for the worker what is done when it reaches a point; see ``scripted_worker``."""
    match question["at"]:
        case "PREPARE":
            make_backbone(Store.open(question["store"]))
        case "LEARNED":
            store = Store.open(question["store"])
            try:
                return {"version": publish_task(store, question["command"])}
            except InfloraError as error:
                fault = {"reason": error.reason, "message": error.message, "field": error.field}
                return {"do": "fail", **fault}
    return {}


class Running:
    """A server that runs, and a client of it."""

    def __init__(self, server: Server, channel: grpc.aio.Channel, settings: Settings) -> None:
        self.server = server
        self.settings = settings
        self.channel = channel
        self.learner = learner_service_pb2_grpc.LearnerServiceStub(channel)
        self.predictor = predictor_service_pb2_grpc.PredictorServiceStub(channel)
        self.evaluator = evaluator_service_pb2_grpc.EvaluatorServiceStub(channel)
        self.model = model_service_pb2_grpc.ModelServiceStub(channel)
        self.oip = open_inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        self.health = health_pb2_grpc.HealthStub(channel)

    @property
    def store(self) -> Store:
        return Store.open(self.settings.store)

    async def learn(self, classes: Mapping[str, Iterable[bytes]], **spec: Any) -> pb.Task:
        """Upload a task."""
        while True:
            try:
                response = await self.learner.LearnTask(upload(classes, **spec))
                return response.task
            except grpc.aio.AioRpcError as error:
                # grpc/grpc#36066: grpc.aio loses the status of a call that is refused while it
                # still writes. Nothing was accepted, so it can be asked again.
                if error.details() != "Internal error from Core":
                    raise

    async def watched(self, name: str) -> list[pb.Task]:
        """Return all that a watcher of a task is sent."""
        stream = self.learner.WatchTask(learner_pb.WatchTaskRequest(name=name))
        return [response.task async for response in stream]

    async def ended(self, name: str) -> pb.Task:
        """Return a task once it has ended."""
        return (await self.watched(name))[-1]

    async def get(self, name: str) -> pb.Task:
        response = await self.learner.GetTask(learner_pb.GetTaskRequest(name=name))
        return response.task

    async def serving(self, service: str = "") -> str:
        """Return what the server says about the health of a service."""
        response = await self.health.Check(health_pb2.HealthCheckRequest(service=service))
        return health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)


def upload(
    classes: Mapping[str, Iterable[bytes]], **spec: Any
) -> list[learner_pb.LearnTaskRequest]:
    """Return the messages of an upload."""
    examples = [
        pb.Example(image=image, label=label)
        for label, images in classes.items()
        for image in images
    ]
    return [
        learner_pb.LearnTaskRequest(spec=pb.TaskSpec(**spec)),
        learner_pb.LearnTaskRequest(examples=pb.ExampleBatch(examples=examples)),
        learner_pb.LearnTaskRequest(end=learner_pb.UploadEnd(example_count=len(examples))),
    ]


@pytest.fixture(scope="session")
def prepared_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a backbone and no version."""
    path = tmp_path_factory.mktemp("prepared") / "store"
    make_backbone(Store.open(path))
    return path


@pytest.fixture
async def script(tmp_path: Path) -> AsyncIterator[Script]:
    """What the worker asks."""
    script = Script(tmp_path / "script")
    async with await script.serve():
        yield script


@pytest.fixture
def settings(tmp_path: Path, prepared_store: Path, script: Script, monkeypatch: Any) -> Settings:
    """Settings of a server on a store of its own."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *sys.path]))
    shutil.copytree(prepared_store, tmp_path / "store")
    return Settings(
        store=tmp_path / "store",
        port=0,
        http_port=0,
        limits=Limits(
            message_bytes=2**20, predict_images=4, task_images=100, queued_tasks=3, reserve_bytes=0
        ),
        predict_threads=1,
        drain_seconds=5.0,
        worker=(sys.executable, str(WORKER), "--script", str(script.path)),
    )


@pytest.fixture
async def start(settings: Settings) -> AsyncIterator[Callable[..., Any]]:
    """Starts servers; those that still run are stopped at the end of the test."""
    async with AsyncExitStack() as stack:

        async def begin(**changes: Any) -> Running:
            chosen = replace(settings, **changes)
            server = Server(chosen)
            await server.start()
            stack.push_async_callback(server.stop)
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(server.address))
            return Running(server, channel, chosen)

        yield begin


@pytest.fixture
async def running(start: Callable[..., Any]) -> Running:
    """A server that runs."""
    running: Running = await start()
    return running
