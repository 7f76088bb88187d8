"""A server that stops or dies while it learns, and the next one on the same store."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from inflora_client import (
    Client,
    LearnOptions,
    RetryPolicy,
    Task,
    TaskStage,
    TaskState,
    UnavailableError,
)
from tests.e2e.conftest import connect, examples, images, serving
from tests.running_server import RunningServer

LONG: LearnOptions = {"epochs": 60, "batch_size": 1}
"""Longer than it takes to stop a server."""
NAMED: LearnOptions = {**LONG, "request_id": "second"}


@pytest.fixture
def folder(prepared: Path, tmp_path: Path) -> Path:
    """A server's folder whose store has a backbone and no version."""
    shutil.copytree(prepared, tmp_path / "server" / "store")
    return tmp_path / "server"


def learn(client: Client, *labels: str) -> Task:
    return client.wait(client.learn(examples(*labels, each=6)))


def wait_for_training(client: Client, task: Task) -> None:
    for seen in client.watch(task):
        if seen.stage is TaskStage.TRAINING:
            return
    raise AssertionError("the task ended before it was trained")


def test_a_worker_that_notices_nothing_does_not_hold_the_store(folder: Path) -> None:
    """As while it imports torch: longer than the next server waits."""
    with serving(folder, stop=False) as server, connect(server) as client:
        task = client.learn(examples("red", "green", each=6))
        wait_for_training(client, task)
        os.kill(server.worker_pid(), signal.SIGSTOP)
    with serving(folder) as server, connect(server) as client:
        assert client.wait(task).state is TaskState.PUBLISHED


@pytest.mark.parametrize("gently", [True, False], ids=["SIGTERM", "SIGKILL"])
def test_a_task_that_was_being_learned_is_finished_once(folder: Path, gently: bool) -> None:
    """After SIGTERM, ``running_server`` demands the exit status 0."""
    with serving(folder, stop=gently) as server, connect(server) as client:
        first = learn(client, "red", "green")
        second = client.learn(examples("blue", "white", each=6), **NAMED)
        third = client.learn(examples("cyan", each=6))
        wait_for_training(client, second)
        assert client.task(second).state is TaskState.LEARNING
    assert versions_in(folder) == ["00000001"]

    with serving(folder) as server, connect(server) as client:
        answer = client.predict(images("red"))
        assert answer.version == first.version
        assert client.task(first) == first
        again = client.learn(examples("blue", "white", each=6), **NAMED)
        assert again.name == second.name, "it was not forgotten that it was accepted"
        done = [client.wait(task) for task in (second, third)]
        assert [task.version for task in done] == [f"models/default/versions/{n}" for n in (2, 3)]
        assert [task.name for task in client.tasks()] == [
            task.name for task in (third, second, first)
        ]
        assert [version.task for version in client.versions()] == [
            task.name for task in (third, second, first)
        ]
        labels = {score.label for score in client.predict(images("red"), 10).predictions[0].scores}
        assert labels == {"red", "green", "blue", "white", "cyan"}
    assert versions_in(folder) == ["00000001", "00000002", "00000003"]
    assert not list((folder / "store" / "drafts").iterdir())
    assert not list((folder / "store" / "spool").iterdir())


def test_the_worker_lets_predictions_come_first(folder: Path) -> None:
    """Also where Linux weighs sessions, of which the worker has its own, and not processes."""
    with serving(folder, "--learn-nice", "7") as server, connect(server) as client:
        learn(client, "red", "green")
        worker = server.worker_pid()
        priorities = [os.getpriority(os.PRIO_PROCESS, pid) for pid in (server.process.pid, worker)]
        assert priorities[1] - priorities[0] == 7
        group = Path(f"/proc/{worker}/autogroup")
        if group.exists():
            assert group.read_text().split()[-2:] == ["nice", "7"]


def versions_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("store/models/default/versions/*"))


@contextmanager
def torch_that_never_loads(folder: Path) -> Iterator[Path]:
    """Yield a path on which ``import torch`` and ``import timm`` wait for the context's end."""
    pipe = folder / "pipe"
    os.mkfifo(pipe)
    for name in ("torch", "timm", "torchvision"):
        package = folder / "path" / name
        package.mkdir(parents=True)
        package.joinpath("__init__.py").write_text(
            f"open({str(pipe)!r}).read()\nraise SystemExit('{name} was imported')\n"
        )
    # Opened for reading and writing, a pipe never lets the one who opens it wait.
    end = os.open(pipe, os.O_RDWR)
    try:
        yield folder / "path"
    finally:
        os.close(end)


def test_the_server_lives_without_torch(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It starts, answers, accepts and stops while every ``import torch`` hangs."""
    with serving(folder) as server, connect(server) as client:
        published = learn(client, "red", "green")
        assert mapped(server.worker_pid()), "of the worker, torch is found in this way"
        assert not mapped(server.process.pid)

    with torch_that_never_loads(tmp_path) as path:
        monkeypatch.setenv("PYTHONPATH", str(path), prepend=os.pathsep)
        with serving(folder) as server:
            with connect(server) as client:
                use_everything(client, published, tmp_path)
            assert not mapped(server.process.pid)
            assert not mapped(server.worker_pid()), "it hangs in its import"
        assert "was imported" not in without_worker(server)


def use_everything(client: Client, published: Task, folder: Path) -> None:
    """Make a call of every kind."""
    answer = client.predict(images("red", "green", each=1), task=published)
    assert [prediction.label for prediction in answer.predictions] == ["red", "green"]
    assert [len(part.predictions) for part in client.predict_stream([images("red")] * 3)] == [3] * 3
    queued = client.learn(examples("blue"))
    assert client.task(queued).state is TaskState.QUEUED
    assert [task.name for task in client.tasks()] == [queued.name, published.name]
    assert client.cancel(queued).state is TaskState.CANCELLED
    assert client.promote(1).number == client.version("current").number == 1
    assert client.download(1, to=folder / "model.onnx").path.stat().st_size > 0
    assert [version.number for version in client.versions()] == [1]


def mapped(pid: int) -> list[str]:
    """Return what a process has mapped of torch's libraries."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return [line for line in lines if "/torch/" in line or "libtorch" in line]


def without_worker(server: RunningServer) -> str:
    """Return what the server's own process has logged."""
    lines = server.log.read_text().splitlines()
    return "\n".join(line for line in lines if not line.startswith("worker"))


def test_a_watcher_is_told_that_the_server_stops(folder: Path) -> None:
    seen: list[TaskState] = []
    errors: list[UnavailableError] = []
    with serving(folder) as server, connect(server) as client:
        task = client.learn(examples("red", "green", each=6), **LONG)
        wait_for_training(client, task)
        watches = threading.Event()

        def watch() -> None:
            hasty = RetryPolicy(max_attempts=1, patience=0)
            with Client(server.address, retry=hasty) as other:
                try:
                    for now in other.watch(task):
                        seen.append(now.state)
                        watches.set()
                except UnavailableError as error:
                    errors.append(error)

        thread = threading.Thread(target=watch)
        thread.start()
        assert watches.wait(60)
    thread.join()
    assert set(seen) == {TaskState.LEARNING}
    (error,) = errors
    assert error.reason == "UNAVAILABLE", "the server said it, not a broken connection"
