"""How long examples are kept, and that a purge finds those that are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from inflora.v1 import learner_service_pb2 as learner_pb
from inflora.v1 import model_service_pb2 as model_pb
from inflora.v1 import task_pb2 as pb
from inflora_core.config import Retention
from inflora_core.model import MARK, Task, TaskState, now
from inflora_core.spool import read_spool
from inflora_service.examples import Fate, fate
from inflora_service.server import Settings
from tests.service.conftest import BLACK, BLUE, GREEN, RED, WHITE, Running, Script, png


def task(state: TaskState, *labels: str) -> Task:
    return Task("t", "", "", "", labels, (1,) * len(labels), 1, {}, now(), state=state)


@pytest.mark.parametrize("state", TaskState)
def test_what_becomes_of_examples(state: TaskState) -> None:
    found = task(state, "a", "b")
    if not state.ended or state is TaskState.SET_ASIDE:
        assert fate(found, "never") is fate(found, "always") is Fate.STAY
        return
    assert fate(found, "never") is Fate.GO
    assert fate(found, "always") is Fate.KEEP
    waits = state is TaskState.HELD_BACK
    assert fate(found, "until-promoted") is (Fate.KEEP if waits else Fate.GO)
    assert fate(replace(found, labels=("a", MARK)), "always") is Fate.GO


def kept(settings: Settings) -> dict[str, list[tuple[bytes, str]]]:
    folder = settings.store / "examples"
    return {path.name: list(read_spool(path)) for path in folder.iterdir()}


def name(task: pb.Task) -> str:
    return task.name.rpartition("/")[2]


async def learn(running: Running, **classes: tuple[int, int, int]) -> pb.Task:
    task = await running.learn({label: [png(colour)] for label, colour in classes.items()})
    return await running.ended(task.name)


async def edited(running: Running, response: Any) -> pb.Task:
    ended = await running.ended((await response).task.name)
    assert ended.state == pb.TASK_STATE_PUBLISHED, ended
    return ended


async def test_examples_are_kept_where_that_is_asked_for(
    start: Callable[..., Any], script: Script, settings: Settings
) -> None:
    running = await start(keep_examples="always")
    published = await learn(running, a=RED, b=GREEN)
    script.then("TRAINING", do="fail", reason="INTERNAL", message="no", field="")
    failed = await learn(running, c=BLUE)
    assert failed.state == pb.TASK_STATE_FAILED
    assert kept(settings) == {
        name(published): [(png(RED), "a"), (png(GREEN), "b")],
        name(failed): [(png(BLUE), "c")],
    }
    assert not list((settings.store / "spool").iterdir())
    await running.server.stop()

    running = await start()  # from now on, none are: those that are there stay
    await learn(running, d=WHITE)
    assert set(kept(settings)) == {name(published), name(failed)}


async def test_examples_of_a_candidate_are_kept_until_it_is_promoted(
    start: Callable[..., Any], settings: Settings
) -> None:
    running = await start(keep_examples="until-promoted")
    await learn(running, a=RED)
    held_back = await learn(running, b=BLACK)
    assert held_back.state == pb.TASK_STATE_HELD_BACK
    await running.server.tasks.sweep()
    assert set(kept(settings)) == {name(held_back)}
    promote = model_pb.PromoteVersionRequest(name=held_back.version, force=True)
    await running.model.PromoteVersion(promote)
    await running.server.tasks.sweep()
    assert kept(settings) == {}


async def test_examples_of_a_candidate_that_is_retired_go(
    start: Callable[..., Any], settings: Settings
) -> None:
    """It can never be promoted."""
    running = await start(keep_examples="until-promoted", retention=Retention(versions=2))
    await learn(running, a=RED)
    held_back = await learn(running, b=BLACK)
    await learn(running, c=BLUE)
    await running.server.tasks.sweep()
    assert set(kept(settings)) == {name(held_back)}
    await learn(running, d=WHITE)
    await running.server.tasks.sweep()
    assert kept(settings) == {}


@pytest.mark.parametrize("request_id", ["", "mine"])
async def test_what_a_crash_kept_from_being_moved_is_moved_later(
    start: Callable[..., Any], settings: Settings, request_id: str
) -> None:
    """With a request id, too, under which an upload could be continued."""
    running = await start(keep_examples="always")
    published = await running.ended(
        (await running.learn({"a": [png(RED)]}, request_id=request_id)).name
    )
    await running.server.stop()
    spool = settings.store / "spool" / name(published)
    (settings.store / "examples" / name(published)).rename(spool)
    running = await start(keep_examples="always")
    assert set(kept(settings)) == {name(published)}
    assert not spool.exists()


async def test_a_purge_deletes_kept_examples(
    start: Callable[..., Any], script: Script, settings: Settings
) -> None:
    running = await start(keep_examples="always")
    script.then("TRAINING", do="fail", reason="INTERNAL", message="no", field="")
    failed = await learn(running, cat=RED)
    first = await learn(running, cat=RED, dog=GREEN)
    second = await learn(running, bird=BLUE)
    update = learner_pb.UpdateClassRequest(label="cat", new_label="feline", add_aliases=["puss"])
    await edited(running, running.learner.UpdateClass(update))
    aliased = await learn(running, puss=RED, fish=WHITE)
    again = await learn(running, cat=BLUE)  # another class of a name that the first one had
    everything = {name(task) for task in (failed, first, second, aliased, again)}
    assert set(kept(settings)) == everything

    request = learner_pb.ForgetClassesRequest(labels=["feline"])
    await edited(running, running.learner.ForgetClasses(request))
    assert set(kept(settings)) == everything, "only a purge deletes"
    request = learner_pb.ForgetClassesRequest(labels=["feline"], purge=True)
    await edited(running, running.learner.ForgetClasses(request))
    # That of a task without a version, too: nothing says which class it meant.
    assert set(kept(settings)) == {name(second), name(again)}


async def test_a_purge_deletes_what_cannot_be_read(
    start: Callable[..., Any], settings: Settings
) -> None:
    running = await start(keep_examples="always")
    await learn(running, cat=RED, dog=GREEN)
    other = await learn(running, bird=BLUE)
    index = settings.store / "examples" / name(other) / "examples.jsonl"
    index.write_bytes(index.read_bytes()[:-5])
    request = learner_pb.ForgetClassesRequest(labels=["cat"], purge=True)
    await edited(running, running.learner.ForgetClasses(request))
    assert not list((settings.store / "examples").iterdir())
