"""What hostile inputs and flipped bytes are tried on: a store with a past, and a server on it."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import grpc

from inflora.v1 import learner_service_pb2 as learner_pb
from inflora.v1 import task_pb2 as pb
from inflora_client import Client, RetryPolicy
from inflora_core.config import Limits
from inflora_service.server import Server, Settings
from tests.core import tiny
from tests.running_server import running_server
from tests.service.conftest import ROOT, WORKER, Running, Script

OPTIONS = ("--epochs", "1", "--batch-size", "8", "--learn-threads", "1", "--predict-threads", "1")
OPTIONS += ("--gate-accuracy", "off", "--gate-distinct", "off", "--gate-interference", "off")
OPTIONS += ("--reserve-bytes", "0")

DEADLINE = 60.0
"""Seconds that a call, or a look at a store, may take. What takes longer is a hang."""

VERSIONS = "models/default/versions"
IMAGE = tiny.png("red", 77)
"""What a sound server is asked about."""


class HangError(Exception):
    """Something did not come to its end in time."""


@contextmanager
def in_time(seconds: float = DEADLINE) -> Iterator[None]:
    """Raise ``HangError`` in the block once it has taken so long. For the main thread only."""

    def over(number: int, frame: object) -> None:
        raise HangError(f"it has taken more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, over)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *timer)  # that of a test that has a timeout


def examples(*labels: str, each: int = 4) -> list[tuple[bytes, str]]:
    """Return labelled images that are learned in no time; a label begins with a colour."""
    return [(tiny.png(label, i), label) for label in labels for i in range(each)]


def lead_a_life(folder: Path) -> Path:
    """Make a store in which everything is that can be in one, and return its folder.

    Versions 1, 3, 4 and 6 are whole, 2 is purged, 5 is without a class, 6 is current. Two tasks
    wait, and an upload broke off.
    """
    made = folder / "life"
    final = folder / "store"
    if final.exists():
        return final
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    backbone = ("--backbone", str(tiny.write_backbone(made)))
    with (
        running_server(made, (*OPTIONS, *backbone)) as server,
        Client(server.address, retry=RetryPolicy(max_attempts=1)) as client,
    ):
        client.wait(client.learn(examples("red", "blue")))
        client.wait(client.learn(examples("green")))
        client.wait(client.forget(["green"], purge=True))
        client.wait(client.learn(examples("yellow", "cyan")))
        client.wait(client.learn(examples("magenta secret")))
        client.wait(client.forget(["magenta secret"]))
        for label in ("white", "black"):
            client.learn(examples(label), request_id=label, epochs=10_000)
        with grpc.insecure_channel(server.address) as channel:
            broken_off(channel)
    os.rename(made / "store", final)
    return final


def broken_off(channel: grpc.Channel) -> None:
    """Leave an upload that could be continued."""
    learn = channel.stream_unary(
        "/inflora.v1.LearnerService/LearnTask",
        request_serializer=learner_pb.LearnTaskRequest.SerializeToString,
    )
    batch = [pb.Example(image=image, label=label) for image, label in examples("red")]
    messages = [
        learner_pb.LearnTaskRequest(spec=pb.TaskSpec(request_id="broken-off")),
        learner_pb.LearnTaskRequest(examples=pb.ExampleBatch(examples=batch)),
    ]
    try:
        learn(iter(messages), timeout=DEADLINE)
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.INVALID_ARGUMENT:
            raise


@asynccontextmanager
async def serving(store: Path, folder: Path, **changes: Any) -> AsyncIterator[Running]:
    """A server on ``store`` in this process, whose worker waits before it learns anything.

    Args:
        store: Folder of the store.
        folder: For the socket of the worker's script.
        **changes: Of its settings.
    """
    path = folder / "script"
    path.unlink(missing_ok=True)
    script = Script(path)
    script.hold("DECODING")
    settings = Settings(
        store=store,
        port=0,
        http_port="off",
        limits=Limits(reserve_bytes=0),
        predict_threads=1,
        drain_seconds=5.0,
        worker=(sys.executable, str(WORKER), "--script", str(path)),
        **changes,
    )
    async with await script.serve():
        server = Server(settings)
        await server.start()
        try:
            async with grpc.aio.insecure_channel(server.address) as channel:
                yield Running(server, channel, settings)
        finally:
            await server.stop()


def give_roots_to_workers(put: Callable[[str, str], None] = os.environ.__setitem__) -> None:
    """Let worker processes find what this process imports.

    Args:
        put: Sets a variable of the environment.
    """
    put("PYTHONPATH", os.pathsep.join([str(ROOT), *sys.path]))
