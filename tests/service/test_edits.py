"""Forgetting, renaming and aliases, as clients see them."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from inflora.v1 import learner_service_pb2 as learner_pb
from inflora.v1 import model_service_pb2 as model_pb
from inflora.v1 import predictor_service_pb2 as predictor_pb
from inflora.v1 import task_pb2 as pb
from inflora_core import durable
from inflora_core.graph import read_metadata
from inflora_core.store import Store
from inflora_service import tasks
from inflora_service.server import Settings
from tests.service.conftest import BLUE, GREEN, RED, Running, Script, fails, png
from tests.service.test_bad_input import INVALID, LIMIT, NOT_FOUND, STATE, download, publish

CONFLICT = ("ALREADY_EXISTS", "CONFLICT")


def name_of(number: int) -> str:
    return f"models/default/versions/{number}"


async def forget(running: Running, *labels: str, **fields: Any) -> pb.Task:
    request = learner_pb.ForgetClassesRequest(labels=labels, **fields)
    return (await running.learner.ForgetClasses(request)).task


async def update(running: Running, label: str, **fields: Any) -> pb.Task:
    request = learner_pb.UpdateClassRequest(label=label, **fields)
    return (await running.learner.UpdateClass(request)).task


async def published(running: Running, task: pb.Task) -> pb.Task:
    ended = await running.ended(task.name)
    assert ended.state == pb.TASK_STATE_PUBLISHED, ended
    return ended


async def best(running: Running, version: int | None = None) -> tuple[list[str], set[str]]:
    """Return the best class of red, green and blue, and all classes that were named."""
    request = predictor_pb.PredictRequest(
        images=[png(RED), png(GREEN), png(BLUE)], version=name_of(version) if version else ""
    )
    answer = await running.predictor.Predict(request)
    labels = [[score.label for score in p.scores] for p in answer.predictions]
    return [row[0] for row in labels], {label for row in labels for label in row}


async def promote(running: Running, number: int) -> model_pb.Version:
    request = model_pb.PromoteVersionRequest(name=name_of(number))
    return (await running.model.PromoteVersion(request)).version


async def listed(running: Running) -> dict[int, model_pb.Version]:
    response = await running.model.ListVersions(model_pb.ListVersionsRequest())
    return {int(version.name.split("/")[-1]): version for version in response.versions}


async def classes_in_file(running: Running, number: int) -> tuple[str, ...]:
    messages = await download(running, name=name_of(number))
    return read_metadata(b"".join(message.data for message in messages)).classes


@pytest.fixture
async def running(start: Callable[..., Any], settings: Settings) -> Running:
    """A server with three versions: red; and green; and blue."""
    for classes in ({"red": RED}, {"green": GREEN}, {"blue": BLUE}):
        publish(settings.store, **classes)
    running: Running = await start()
    return running


# -- forgetting ---------------------------------------------------------------------------------


async def test_a_forgotten_class_is_not_answered_by_any_version(
    running: Running, start: Callable[..., Any]
) -> None:
    assert (await best(running, 2))[1] == {"red", "green"}  # it is loaded
    task = await forget(running, "green", request_id="r")
    assert (task.kind, task.forget.labels, task.forget.purge) == (
        pb.TASK_KIND_FORGET,
        ["green"],
        False,
    )
    seen = await running.watched(task.name)
    assert seen[-1].state == pb.TASK_STATE_PUBLISHED, seen[-1]
    assert seen[-1].version == name_of(4)
    assert seen[-1].fraction_done == 1
    assert not seen[-1].classes
    assert not seen[-1].HasField("report")
    assert await running.get(task.name) == seen[-1]

    async def nowhere(running: Running) -> None:
        assert (await best(running))[1] == {"red", "blue"}
        for version, labels in ((1, {"red"}), (2, {"red"}), (3, {"red", "blue"})):
            assert (await best(running, version))[1] == labels
        versions = await listed(running)
        assert not any(c.label == "green" for v in versions.values() for c in v.classes)
        assert not any(version.purged for version in versions.values())

    await nowhere(running)
    await promote(running, 3)
    await nowhere(running)
    await running.server.stop()
    running = await start()
    assert (await listed(running))[3].current
    await nowhere(running)

    white = await published(running, await running.learn({"white": [png((255, 255, 255))]}))
    assert white.version == name_of(5)
    version = (await listed(running))[5]
    assert version.parent == name_of(3)
    assert [c.label for c in version.classes] == ["red", "blue", "white"]
    assert await classes_in_file(running, 5) == ("red", "blue", "white")
    # It can be taught again, as another class.
    await published(running, await running.learn({"green": [png(GREEN)]}))
    assert (await best(running))[0] == ["red", "green", "blue"]
    assert "green" not in (await best(running, 2))[1]


async def test_files_that_know_it_are_not_handed_out(running: Running) -> None:
    await published(running, await forget(running, "green"))
    for artifact in ("", "model.onnx", "head.safetensors"):
        with fails(*STATE, field="name"):
            await download(running, name=name_of(2), artifact=artifact)
    for number, artifact in ((2, "factors.safetensors"), (1, "model.onnx"), (4, "model.onnx")):
        assert await download(running, name=name_of(number), artifact=artifact)
    versions = await listed(running)
    assert [a.name for a in versions[2].artifacts] == ["factors.safetensors", "memory.safetensors"]
    assert len(versions[4].artifacts) == len(versions[1].artifacts) == 4


async def test_a_version_of_which_nothing_is_left(running: Running) -> None:
    await published(running, await forget(running, "red"))
    with fails(*STATE, field="name"):
        await promote(running, 1)
    with fails(*STATE, field="version"):
        await best(running, 1)
    with fails(*STATE, field="labels"):
        await forget(running, "green", "blue")
    assert (await best(running))[1] == {"green", "blue"}


class Gate:
    """Where a thread waits, once, until the test lets it pass."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.open = threading.Event()
        self._loop = asyncio.get_running_loop()

    def wait(self) -> None:
        self._loop.call_soon_threadsafe(self.reached.set)
        assert self.open.wait(60)


async def test_a_version_that_is_being_loaded_meanwhile(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read before it was forgotten does not answer after."""
    host = running.server.host
    load, remember = host._load, host._store.forget
    loaded, listing = Gate(), Gate()

    def slow_load(number: int) -> Any:
        version = load(number)
        if number == 2:
            loaded.wait()
        return version

    def slow_forget(keys: Any) -> None:
        listing.wait()
        remember(keys)

    monkeypatch.setattr(host, "_load", slow_load)
    monkeypatch.setattr(host._store, "forget", slow_forget)
    task = await forget(running, "green")
    await listing.reached.wait()
    asking = asyncio.create_task(best(running, 2))
    await loaded.reached.wait()
    listing.open.set()
    await published(running, task)
    loaded.open.set()
    assert (await asking)[1] == {"red"}
    assert (await best(running, 2))[1] == {"red"}


# -- tasks like others --------------------------------------------------------------------------


async def test_edits_take_their_turn(running: Running, script: Script) -> None:
    """What is ahead may teach the class, so that it is not said at once that there is none."""
    script.hold("DECODING")
    first = await running.learn({"white": [png((255, 255, 255))]})
    await script.reached("DECODING")
    rename = await update(running, "white", new_label="snow")
    wrong = await forget(running, "white", "red")
    assert [task.state for task in (rename, wrong)] == [pb.TASK_STATE_QUEUED] * 2
    script.pass_from_now_on("DECODING")
    script.release("DECODING")
    assert (await published(running, first)).version == name_of(4)
    assert (await published(running, rename)).version == name_of(5)
    ended = await running.ended(wrong.name)
    assert ended.state == pb.TASK_STATE_FAILED
    assert ended.error.message == "there is no class 'white'"
    assert b"labels[0]" in ended.error.details[1].value
    assert "snow" in (await best(running))[1]
    response = await running.learner.ListTasks(learner_pb.ListTasksRequest())
    assert [task.name for task in response.tasks] == [wrong.name, rename.name, first.name]
    assert response.tasks[1].update.new_label == "snow"


async def test_an_edit_can_be_cancelled(running: Running, script: Script) -> None:
    script.hold("EXPORTING")
    working, queued = await forget(running, "red"), await forget(running, "green")
    await script.reached("EXPORTING")
    for task in (queued, working):
        request = learner_pb.CancelTaskRequest(name=task.name)
        assert (await running.learner.CancelTask(request)).task.state == pb.TASK_STATE_CANCELLED
    assert (await best(running))[1] == {"red", "green", "blue"}
    assert (await best(running, 1))[1] == {"red"}


async def test_a_retry_returns_the_task_that_exists(running: Running, script: Script) -> None:
    script.hold("EXPORTING")
    task = await forget(running, "green", request_id="r")
    assert (await forget(running, "green", request_id="r")).name == task.name
    for labels, fields in ((["red"], {}), (["green"], {"purge": True})):
        with fails(*CONFLICT, field="request_id"):
            await forget(running, *labels, request_id="r", **fields)
    with fails(*CONFLICT, field="request_id"):
        await update(running, "green", new_label="x", request_id="r")
    with fails(*CONFLICT, field="spec.request_id"):
        await running.learn({"new": [png()]}, request_id="r")
    await script.reached("EXPORTING")
    script.release("EXPORTING")
    await published(running, task)
    again = await forget(running, "green", request_id="r")
    assert (again.name, again.state) == (task.name, pb.TASK_STATE_PUBLISHED)
    renamed = await update(running, "red", new_label="rouge", request_id="u")
    await published(running, renamed)
    again = await update(running, "red", new_label="rouge", request_id="u")
    assert again.name == renamed.name


@pytest.mark.parametrize("point", ["EXPORTING", "PUBLISHING", "LEARNED"])
async def test_what_a_stop_interrupts_is_done_once(
    start: Callable[..., Any], running: Running, script: Script, point: str
) -> None:
    script.hold(point)
    task = await forget(running, "green")
    await script.reached(point)
    await running.server.stop()
    script.pass_from_now_on(point)
    running = await start()
    assert (await published(running, task)).version == name_of(4)
    assert running.store.numbers() == [1, 2, 3, 4]
    assert (await best(running, 2))[1] == {"red"}


async def test_a_worker_killed_when_the_version_is_durable(
    running: Running, script: Script
) -> None:
    script.hold("LEARNED")
    task = await forget(running, "green")
    await script.reached("LEARNED")
    assert (await best(running))[1] == {"red", "green", "blue"}
    script.kill(signal.SIGKILL)
    assert (await published(running, task)).version == name_of(4)
    assert (await best(running, 2))[1] == {"red"}


async def test_between_the_list_and_the_new_version(
    running: Running, start: Callable[..., Any], script: Script
) -> None:
    """A server that was cut off there answers without the class before it has published."""
    script.hold("LEARNED")
    task = await forget(running, "green")
    await script.reached("LEARNED")
    await running.server.stop()
    running.store.forget(running.store.version(4).forgets)
    assert running.store.current() == 3
    running = await start()
    assert (await best(running))[1] == {"red", "blue"}
    assert (await published(running, task)).version == name_of(4)


EDITS: dict[str, tuple[str, dict[str, Any], tuple[str, str], str]] = {
    "no label": ("ForgetClasses", {}, INVALID, "labels"),
    "no possible label": ("ForgetClasses", {"labels": ["red", ""]}, INVALID, "labels[1]"),
    "no such class": ("ForgetClasses", {"labels": ["red", "pink"]}, NOT_FOUND, "labels[1]"),
    "all": ("ForgetClasses", {"labels": ["red", "green", "blue"]}, STATE, "labels"),
    "forget in no model": ("ForgetClasses", {"parent": "x", "labels": ["red"]}, INVALID, "parent"),
    "of another model": (
        "ForgetClasses",
        {"parent": "models/other", "labels": ["red"]},
        NOT_FOUND,
        "parent",
    ),
    "a long id": (
        "ForgetClasses",
        {"labels": ["red"], "request_id": "x" * 129},
        INVALID,
        "request_id",
    ),
    "too much": ("ForgetClasses", {"labels": ["red" * 60] * 10_000}, LIMIT, "labels"),
    "no change": ("UpdateClass", {"label": "red"}, INVALID, "new_label"),
    "an empty name": ("UpdateClass", {"label": "red", "new_label": ""}, INVALID, "new_label"),
    "no such class to update": (
        "UpdateClass",
        {"label": "pink", "new_label": "x"},
        NOT_FOUND,
        "label",
    ),
    "taken": ("UpdateClass", {"label": "red", "new_label": "blue"}, CONFLICT, "new_label"),
    "a taken alias": (
        "UpdateClass",
        {"label": "red", "add_aliases": ["rouge", "blue"]},
        CONFLICT,
        "add_aliases[1]",
    ),
    "no such alias": (
        "UpdateClass",
        {"label": "red", "remove_aliases": ["rouge"]},
        NOT_FOUND,
        "remove_aliases[0]",
    ),
    "too many aliases": (
        "UpdateClass",
        {"label": "red", "add_aliases": [f"red {i}" for i in range(101)]},
        LIMIT,
        "add_aliases",
    ),
}


async def test_edits_that_are_refused(running: Running) -> None:
    for method, fields, status, field in EDITS.values():
        request = getattr(learner_pb, f"{method}Request")(**fields)
        with fails(*status, field=field):
            await getattr(running.learner, method)(request)
    response = await running.learner.ListTasks(learner_pb.ListTasksRequest())
    assert not response.tasks


async def test_without_a_version_there_is_nothing_to_edit(start: Callable[..., Any]) -> None:
    running: Running = await start()
    with fails(*NOT_FOUND, field="labels[0]"):
        await forget(running, "red")
    with fails(*NOT_FOUND, field="label"):
        await update(running, "red", new_label="rouge")


async def test_a_full_queue_takes_no_edit(running: Running, script: Script) -> None:
    script.hold("EXPORTING")
    for label in ("red", "green", "blue", "red"):  # one is worked on, three wait
        await forget(running, label, request_id=label)
        await script.reached("EXPORTING")
    await forget(running, "red")
    with fails(*LIMIT):
        await forget(running, "red")
    assert await forget(running, "red", request_id="red")


# -- names --------------------------------------------------------------------------------------


async def test_names_change_and_the_class_stays(
    running: Running, start: Callable[..., Any]
) -> None:
    change = {"new_label": "rouge", "add_aliases": ["red", "rot"]}
    task = await published(running, await update(running, "red", **change))
    assert task.kind == pb.TASK_KIND_UPDATE_CLASS
    assert (task.update.label, task.update.new_label) == ("red", "rouge")
    assert task.update.add_aliases == ["red", "rot"]
    assert (await best(running))[0] == ["rouge", "green", "blue"]
    assert (await best(running, 3))[0] == ["red", "green", "blue"], "it was published so"
    known = (await listed(running))[4].classes[0]
    assert (known.label, known.aliases) == ("rouge", ["red", "rot"])
    assert known.task == "models/default/tasks/task-1"
    assert await classes_in_file(running, 4) == ("rouge", "green", "blue")
    await published(running, await update(running, "rot", remove_aliases=["red"]))
    await running.server.stop()
    running = await start()
    assert (await listed(running))[5].classes[0].aliases == ["rot"]
    # Whatever it is called, and was: it is one class, and is forgotten as one.
    await published(running, await forget(running, "rot"))
    assert (await best(running, 2))[1] == {"green"}
    assert (await best(running, 4))[1] == {"green", "blue"}


# -- purging ------------------------------------------------------------------------------------


def holding(root: Path, text: str) -> list[Path]:
    """Return the files under ``root`` with this text in them, as any of our files has it."""
    forms = {text.encode(), ascii(text)[1:-1].encode()}
    files = [path for path in root.rglob("*") if path.is_file()]
    return [path for path in files if any(form in path.read_bytes() for form in forms)]


SECRET = "Grün von Ü."


async def teach_secret(running: Running) -> pb.Task:
    """Teach two classes in a task whose record is full of the secret one's name; return it."""
    task = await running.learn({SECRET: [png(GREEN)], "cyan": [png((0, 255, 255))]}, request_id="s")
    return await published(running, task)


async def assert_purged(running: Running, taught: pb.Task, *, by: int) -> None:
    versions = await listed(running)
    assert [number for number, version in versions.items() if version.purged] == [4]
    assert [a.name for a in versions[4].artifacts] == ["factors.safetensors"]
    assert not holding(running.settings.store, SECRET)
    with fails(*STATE, field="name"):
        await promote(running, 4)
    with fails(*STATE, field="version"):
        await best(running, 4)
    for artifact in ("model.onnx", "head.safetensors", "memory.safetensors"):
        with fails(*STATE, field="name"):
            await download(running, name=name_of(4), artifact=artifact)
    found = await running.get(taught.name)
    assert [c.label for c in found.classes] == ["[forgotten]", "cyan"]
    assert [c.example_count for c in found.classes] == [1, 1]
    assert found.state == pb.TASK_STATE_PUBLISHED
    assert versions[by].current
    assert [c.label for c in versions[by].classes] == ["red", "green", "blue", "cyan"]


async def test_a_purge_leaves_no_name_and_no_rows(
    running: Running, start: Callable[..., Any]
) -> None:
    taught = await teach_secret(running)
    wrong = await update(running, "red", add_aliases=["rot"])
    await published(running, await update(running, SECRET, add_aliases=["alias of it"]))
    await published(running, wrong)
    # Later versions know it, too; they go with the others.
    assert holding(running.settings.store, SECRET)
    task = await forget(running, "alias of it", purge=True, request_id="p")
    ended = await published(running, task)
    assert (ended.forget.labels, ended.forget.purge) == (["[forgotten]"], True)
    assert not holding(running.settings.store, SECRET)
    assert not holding(running.settings.store, "alias of it")
    versions = await listed(running)
    assert sorted(number for number, v in versions.items() if v.purged) == [4, 5, 6]
    assert (await best(running, 3))[0] == ["red", "green", "blue"]
    again = await forget(running, "alias of it", purge=True, request_id="p")
    assert (again.name, again.state) == (task.name, pb.TASK_STATE_PUBLISHED)
    with fails(*NOT_FOUND, field="labels[0]"):
        await forget(running, SECRET, purge=True)
    # Its descendants can be loaded, and learned on.
    await running.server.stop()
    running = await start()
    assert (await running.get(taught.name)).classes[0].label == "[forgotten]"
    again = await running.learn({SECRET: [png(GREEN)]})
    assert (await published(running, again)).version == name_of(8)
    known = [c.label for c in (await listed(running))[8].classes]
    assert known == ["red", "green", "blue", "cyan", SECRET]


async def test_a_purge_of_what_was_forgotten_before(running: Running) -> None:
    taught = await teach_secret(running)
    await published(running, await forget(running, SECRET))
    await promote(running, 4)  # without the class, so far
    assert (await best(running, 4))[1] == {"red", "green", "blue", "cyan"}
    with fails(*NOT_FOUND, field="labels[0]"):
        await forget(running, SECRET)
    ended = await published(running, await forget(running, SECRET, purge=True))
    assert ended.version == name_of(6)
    await assert_purged(running, taught, by=6)


@pytest.mark.parametrize("at", ["forgotten.json", "CURRENT", "manifest.json", "manifest.sha256"])
async def test_a_purge_is_tried_until_the_disk_takes_it(
    running: Running, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    taught = await teach_secret(running)
    monkeypatch.setattr(tasks, "RETRY_SECONDS", 0.0)
    replace, failures = durable.replace, 2

    def fail(path: Path, data: bytes) -> None:
        nonlocal failures
        if path.name == at and failures:
            failures -= 1
            raise OSError("the disk is gone")
        replace(path, data)

    monkeypatch.setattr(durable, "replace", fail)
    await published(running, await forget(running, SECRET, purge=True))
    assert not failures
    await assert_purged(running, taught, by=5)


async def test_what_waited_does_not_keep_a_purged_name(running: Running, script: Script) -> None:
    """Neither a task that fails for it, nor one that is given up; one that teaches it anew does."""
    await teach_secret(running)
    script.hold("EXPORTING", "DECODING")
    purge = await forget(running, SECRET, purge=True)
    await script.reached("EXPORTING")
    renaming = await update(running, SECRET, new_label="lime")
    teaching = await running.learn({SECRET: [png(GREEN)]}, display_name=SECRET)
    script.release("EXPORTING")
    await published(running, purge)
    failed = await running.ended(renaming.name)
    assert failed.state == pb.TASK_STATE_FAILED
    assert failed.error.message == "there is no class [forgotten]"
    assert failed.update.label == "[forgotten]"
    await script.reached("DECODING")
    cancel = running.learner.CancelTask(learner_pb.CancelTaskRequest(name=teaching.name))
    script.pass_from_now_on("DECODING")  # where the one that is given up stays
    cancelled = (await cancel).task
    assert cancelled.state == pb.TASK_STATE_CANCELLED
    assert (cancelled.display_name, cancelled.classes[0].label) == ("[forgotten]", "[forgotten]")
    assert not holding(running.settings.store, SECRET)
    again = await published(running, await running.learn({SECRET: [png(GREEN)]}))
    assert again.classes[0].label == SECRET


async def test_an_edit_that_lost_its_names_is_not_tried_again(
    running: Running, script: Script
) -> None:
    """It would give a class the name that stands in place of purged ones."""
    script.hold("EXPORTING")
    await update(running, "blue", add_aliases=["azure"])
    await script.reached("EXPORTING")
    # What is ahead could free the name, so that it is not refused at once.
    edit = await update(running, "red", add_aliases=["green"])
    for _ in range(running.settings.limits.task_attempts):
        script.then("EXPORTING", do="exit", status=3)
    script.release("EXPORTING")
    assert (await running.ended(edit.name)).state == pb.TASK_STATE_SET_ASIDE
    await published(running, await forget(running, "green", purge=True))
    with fails(*STATE, field="name"):
        await running.learner.RetryTask(learner_pb.RetryTaskRequest(name=edit.name))


async def test_a_version_that_is_purged_while_it_loads_is_said_to_be(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    await teach_secret(running)
    await published(running, await forget(running, SECRET))
    loop, purging = asyncio.get_running_loop(), asyncio.Event()
    loading, purged = threading.Event(), threading.Event()
    purge, tensors = Store.purge, Store._tensors

    def slow_purge(store: Store, keys: Any) -> None:
        loop.call_soon_threadsafe(purging.set)
        assert loading.wait(60)
        purge(store, keys)
        purged.set()

    def slow_tensors(store: Store, version: Any, name: str) -> Any:
        if version.number == 4 and purging.is_set():
            loading.set()
            assert purged.wait(60)
        return tensors(store, version, name)

    monkeypatch.setattr(Store, "purge", slow_purge)
    monkeypatch.setattr(Store, "_tensors", slow_tensors)
    task = await forget(running, SECRET, purge=True)
    await purging.wait()
    with fails(*STATE, field="version"):
        await best(running, 4)
    await published(running, task)


async def test_a_purge_that_was_cut_off_is_finished_at_the_next_start(
    running: Running, start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    taught = await teach_secret(running)
    cut = asyncio.Event()
    loop = asyncio.get_running_loop()

    def fail(store: Store, number: int, version: object, purged: object) -> None:
        loop.call_soon_threadsafe(cut.set)
        raise OSError("the power is gone")

    with monkeypatch.context() as broken:
        broken.setattr(Store, "_purge_version", fail)
        task = await forget(running, SECRET, purge=True)
        await cut.wait()
        await running.server.stop()
    assert holding(running.settings.store, SECRET)
    running = await start()
    await published(running, task)
    await assert_purged(running, taught, by=5)
