"""kill -9 of the learning worker in every stage: only its task notices, and the next succeeds."""

from __future__ import annotations

import itertools
import os
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from inflora_client import Client, Task, TaskStage, TaskState
from inflora_core.store import Store
from tests.core import tiny
from tests.e2e.conftest import Start, connect, examples, images
from tests.e2e.predicting import Predicting
from tests.running_server import RunningServer

STAGES = (
    TaskStage.DECODING,
    TaskStage.DESIGNING,
    TaskStage.TRAINING,
    TaskStage.EXTENDING,
    TaskStage.MERGING,
    TaskStage.EXPORTING,
    TaskStage.CHECKING,
)
LONG_STAGES = STAGES[:4]
"""They go image by image, so that a kill can be aimed at them. The others are over in an instant:
there it lands in the stage or after it."""
ATTEMPTS = 8

_names = itertools.count()


def new_classes(number: int) -> list[str]:
    """Return names of classes that were never used before."""
    return [f"{tiny.COLOURS[i]} {next(_names)}" for i in range(number)]


@pytest.fixture(scope="module")
def server(start: Start) -> RunningServer:
    return start("--set", "held_out_share=0.5", "--task-attempts", "1")


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[Client]:
    with connect(server) as client:
        client.wait(client.learn(examples("red", "green", each=4)))
        yield client


@pytest.mark.parametrize("stage", STAGES, ids=str)
def test_killed_in_a_stage(server: RunningServer, client: Client, stage: TaskStage) -> None:
    with Predicting(server, images("red", "green")) as predicting:
        for _ in range(ATTEMPTS):
            death = kill_in(stage, server, client, predicting)
            if death is not None and (death.stage is stage or stage not in LONG_STAGES):
                break
        else:
            pytest.fail(f"in {ATTEMPTS} attempts the worker never died in {stage}")
    assert death.stage is None or STAGES.index(death.stage) >= STAGES.index(stage)
    assert predicting.failures == []
    (answers,) = predicting.by_client
    versions = [answer.version for answer in answers]
    assert versions == sorted(versions)


@dataclass(frozen=True)
class Death:
    """How a worker that was killed left its task.

    Attributes:
        stage: Where it died according to the server; None if the version was durable already.
    """

    stage: TaskStage | None


def kill_in(
    stage: TaskStage, server: RunningServer, client: Client, predicting: Predicting
) -> Death | None:
    """Kill the worker as soon as a task is seen in ``stage`` or later, and learn another.

    Returns:
        None if the task had ended before it was seen there.
    """
    known = {version.number for version in client.versions()}
    accepted = client.learn(examples(*new_classes(2), each=30), batch_size=2)
    pid = server.worker_pid()
    task = accepted
    killed = False
    for task in client.watch(accepted):
        order = [*STAGES, TaskStage.PUBLISHING]
        if not killed and task.stage in order[order.index(stage) :]:
            os.kill(pid, signal.SIGKILL)
            killed = True
            predicting.wait_for_more()
    if not killed:
        assert task.state is TaskState.PUBLISHED
        return None
    death = how_it_ended(task, server, known)

    following = client.wait(client.learn(examples(*new_classes(2), each=4)))
    assert following.state is TaskState.PUBLISHED
    if death.stage is not None:
        # The same images, on top of what was learned meanwhile.
        assert client.wait(client.retry(task)).state is TaskState.PUBLISHED
        made = [version for version in client.versions() if version.task == task.name]
        assert len(made) == 1
    number = int(following.version.rpartition("/")[2])
    predicting.wait_until(lambda: number in predicting.versions)
    assert server.worker_pid() != pid
    return death


def how_it_ended(task: Task, server: RunningServer, known: set[int]) -> Death:
    """Check that the task is reported as it is in the store."""
    store = Store.open(server.store)
    number = store.version_of_task(task.id)
    if task.state is TaskState.PUBLISHED:
        assert number is not None
        assert number not in known
        assert task.version == f"models/default/versions/{number}"
        store.verify(number)
        return Death(None)
    assert task.state is TaskState.SET_ASIDE
    assert number is None
    assert set(store.numbers()) == known
    assert task.version == ""
    assert task.error is not None
    assert task.error.reason == "LEARNER_CRASHED"
    found = re.search(r"killed by SIGKILL.* at stage (\w+)", task.error.message)
    assert found is not None, task.error.message
    return Death(TaskStage(found[1]))
