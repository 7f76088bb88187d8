"""A server whose tasks are learned by two processes, and what becomes of them when one is lost."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from inflora_client import Client, LearnOptions, TaskFailedError, TaskStage, TaskState
from inflora_core.store import Store
from tests.e2e.conftest import Start, connect, examples, images
from tests.e2e.predicting import Predicting
from tests.running_server import RunningServer

TWO = ("--learn-launcher", "torchrun --standalone --nproc-per-node 2")
LONG: LearnOptions = {"epochs": 60, "batch_size": 1}


@pytest.fixture(scope="module")
def server(start: Start) -> RunningServer:
    return start(*TWO)


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[Client]:
    with connect(server) as client:
        assert client.wait(client.learn(examples("red", "green"))).state is TaskState.PUBLISHED
        yield client


def members(server: RunningServer) -> list[int]:
    """Return the processes that learn, those of the launcher."""
    launcher = server.worker_pid()
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [int(child) for child in children]


def rank_of(pid: int) -> int:
    """Return the rank of a process of the group."""
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return int(next(x for x in environment if x.startswith(b"RANK=")).removeprefix(b"RANK="))


def test_two_processes_learn_and_one_publishes(server: RunningServer, client: Client) -> None:
    task = client.wait(client.learn(examples("blue", "white", each=7)))
    assert task.state is TaskState.PUBLISHED
    assert sorted(map(rank_of, members(server))) == [0, 1]
    found = client.predict(images("red", "green", "blue", "white"))
    best = [prediction.label for prediction in found.predictions]
    assert best == [label for label in ("red", "green", "blue", "white") for _ in range(3)]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_lost_process_costs_an_attempt_and_no_task(
    server: RunningServer, client: Client, rank: int
) -> None:
    labels = [f"yellow {rank}", f"cyan {rank}"]
    with Predicting(server, images("red", "green")) as predicting:
        accepted = client.learn(examples(*labels), **LONG)
        killed: set[int] = set()
        for seen in client.watch(accepted):
            if not killed and seen.stage is TaskStage.TRAINING:
                killed = set(members(server))
                os.kill(next(pid for pid in killed if rank_of(pid) == rank), signal.SIGKILL)
            task = seen
        assert killed
        predicting.wait_for_more()
    assert task.state is TaskState.PUBLISHED
    assert not killed & set(members(server)), "a new group took it up"
    assert predicting.failures == []
    store = Store.open(server.store)
    store.verify(store.numbers()[-1])
    assert len([v for v in client.versions() if v.task == accepted.name]) == 1


def test_cancelling_ends_the_group_and_the_next_task_is_learned(
    server: RunningServer, client: Client
) -> None:
    accepted = client.learn(examples("magenta", "black"), **LONG)
    for seen in client.watch(accepted):
        if seen.stage is TaskStage.TRAINING:
            break
    following = client.learn(examples("magenta 2", "black 2"))
    client.cancel(accepted)
    with pytest.raises(TaskFailedError, match="CANCELLED"):
        client.wait(accepted)
    assert client.wait(following).state is TaskState.PUBLISHED


def test_what_is_wrong_with_a_task_is_told_and_the_group_goes_on(start: Start) -> None:
    """Heads as published refuse a known class: every process finds the same."""
    server = start(*TWO, "--set", "head=trained", "--gate-accuracy", "off")
    with connect(server) as client:
        client.wait(client.learn(examples("red", "green")))
        before = members(server)
        with pytest.raises(TaskFailedError, match="known already"):
            client.wait(client.learn(examples("red", "blue")))
        client.wait(client.learn(examples("blue", "white")))
        assert members(server) == before
