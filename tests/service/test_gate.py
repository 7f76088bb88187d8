"""Versions that the publish gate holds back: candidates."""

from __future__ import annotations

import asyncio
import errno
import signal
from collections.abc import Callable
from typing import Any

import pytest
from google.rpc import code_pb2, error_details_pb2

from inflora.v1 import learner_service_pb2 as learner_pb
from inflora.v1 import model_service_pb2 as model_pb
from inflora.v1 import predictor_service_pb2 as predictor_pb
from inflora.v1 import task_pb2 as pb
from inflora_core import canary, failpoints
from inflora_core.config import Gate
from inflora_core.errors import InvalidInputError
from inflora_service import __main__, tasks
from tests.service.conftest import BLACK, GREEN, RED, Running, Script, fails, png
from tests.service.test_restarting import killed_at
from tests.service.test_versions import get, name_of


async def teach(running: Running, **colours: tuple[int, int, int]) -> pb.Task:
    """Return a task of one image a class, once it has ended."""
    classes = {label: [png(colour)] for label, colour in colours.items()}
    return await running.ended((await running.learn(classes)).name)


async def promote(running: Running, number: int, force: bool = False) -> model_pb.Version:
    request = model_pb.PromoteVersionRequest(name=name_of(number), force=force)
    return (await running.model.PromoteVersion(request)).version


async def answer(running: Running, colour: tuple[int, int, int]) -> tuple[str, str]:
    """Return which version says what of an image of one colour."""
    request = predictor_pb.PredictRequest(images=[png(colour)])
    response = await running.predictor.Predict(request)
    return response.version, response.predictions[0].scores[0].label


def reason_of(task: pb.Task) -> str:
    info = error_details_pb2.ErrorInfo()
    task.error.details[0].Unpack(info)
    return info.reason


async def test_a_version_that_fails_a_check_is_kept_but_does_not_answer(running: Running) -> None:
    assert (await teach(running, red=RED)).state == pb.TASK_STATE_PUBLISHED
    held_back = await teach(running, black=BLACK)
    assert held_back.state == pb.TASK_STATE_HELD_BACK
    assert (held_back.version, held_back.fraction_done) == (name_of(2), 1.0)
    assert {c.name: c.passed for c in held_back.report.checks} == {
        "not_finite": True,
        "leak": True,
        "accuracy": True,
        "canary": True,
        "interference": False,
    }
    assert not [c for c in held_back.report.checks if c.name == "canary" and c.HasField("value")]
    (failed,) = (check for check in held_back.report.checks if not check.passed)
    assert (failed.value, failed.limit) == (1.0, 0.5)
    assert held_back.error.code == code_pb2.FAILED_PRECONDITION
    assert reason_of(held_back) == "GATE"
    assert held_back.error.message == f"version 2 is held back: {failed.message}"
    assert "interference of a layer is 1.00, and at most 0.50 is allowed" in failed.message

    candidate = await get(running, 2)
    assert candidate.candidate
    assert list(candidate.failed_checks) == [failed]
    assert (candidate.current, candidate.parent) == (False, name_of(1))
    assert not (await get(running, 1)).candidate
    assert await answer(running, BLACK) == (name_of(1), "red")
    assert not list((running.settings.store / "spool").iterdir())
    # Whoever asks for the candidate gets it: it can be looked at.
    request = predictor_pb.PredictRequest(images=[png(BLACK)], version=name_of(2))
    assert (await running.predictor.Predict(request)).predictions[0].scores[0].label == "black"


async def test_later_tasks_do_not_build_on_a_candidate(running: Running) -> None:
    await teach(running, red=RED)
    await teach(running, black=BLACK)
    assert (await teach(running, green=GREEN)).version == name_of(3)
    version = await get(running, 3)
    assert (version.current, version.parent) == (True, name_of(1))
    assert [c.label for c in version.classes] == ["red", "green"]
    edit = learner_pb.UpdateClassRequest(label="red", new_label="rouge")
    renamed = await running.ended((await running.learner.UpdateClass(edit)).task.name)
    assert renamed.state == pb.TASK_STATE_PUBLISHED
    assert (await get(running, 4)).parent == name_of(3)


async def test_only_force_makes_a_candidate_current(running: Running) -> None:
    await teach(running, red=RED)
    await teach(running, black=BLACK)
    with fails("FAILED_PRECONDITION", "GATE", field="force"):
        await promote(running, 2)
    assert running.store.current() == 1
    for force in (True, False):  # once it is current, nothing is left to be forced
        forced = await promote(running, 2, force)
        assert (forced.current, forced.candidate) == (True, True)
    assert await answer(running, BLACK) == (name_of(2), "black")
    assert not (await promote(running, 1, force=True)).candidate
    # That it was forced once does not make it sound.
    with fails("FAILED_PRECONDITION", "GATE", field="force"):
        await promote(running, 2)
    await promote(running, 2, force=True)
    # What is learned on it is judged by itself, and edits are not judged at all.
    task = await teach(running, green=GREEN)
    assert (task.state, (await get(running, 3)).parent) == (pb.TASK_STATE_PUBLISHED, name_of(2))
    forget = learner_pb.ForgetClassesRequest(labels=["black"])
    ended = await running.ended((await running.learner.ForgetClasses(forget)).task.name)
    assert ended.state == pb.TASK_STATE_PUBLISHED
    assert not (await get(running, 4)).candidate


async def test_a_first_version_that_is_held_back_answers_nothing(
    running: Running, start: Callable[..., Any]
) -> None:
    held_back = await teach(running, black=BLACK)
    assert held_back.state == pb.TASK_STATE_HELD_BACK
    with fails("FAILED_PRECONDITION", "WRONG_STATE"):
        await answer(running, BLACK)
    assert await running.serving("inflora.v1.PredictorService") == "NOT_SERVING"
    await running.server.stop()
    again = await start()
    assert await again.get(held_back.name) == held_back
    assert again.store.current() is None
    await promote(again, 1, force=True)
    assert await answer(again, RED) == (name_of(1), "black")
    await again.server.stop()
    assert await answer(await start(), RED) == (name_of(1), "black")


async def test_a_candidate_that_was_durable_when_the_server_died_stays_one(
    start: Callable[..., Any], settings: Any, script: Script
) -> None:
    async with killed_at("LEARNED", settings, script, BLACK) as name:
        starting = asyncio.create_task(start())
        script.kill(signal.SIGCONT)
        running = await starting
        ended = await running.ended(name)
        assert (ended.state, ended.version) == (pb.TASK_STATE_HELD_BACK, name_of(1))
        assert reason_of(ended) == "GATE"
        assert [c.name for c in ended.report.checks if not c.passed] == ["interference"]
        assert running.store.current() is None


async def test_a_task_that_was_held_back_has_ended(running: Running) -> None:
    held_back = await teach(running, black=BLACK)
    with fails("FAILED_PRECONDITION", "WRONG_STATE", field="name"):
        await running.learner.CancelTask(learner_pb.CancelTaskRequest(name=held_back.name))


async def test_classes_that_only_a_candidate_knows_can_be_forgotten(running: Running) -> None:
    await teach(running, red=RED)
    await teach(running, black=BLACK)
    forget = learner_pb.ForgetClassesRequest(labels=["black"], purge=True)
    ended = await running.ended((await running.learner.ForgetClasses(forget)).task.name)
    assert ended.state == pb.TASK_STATE_PUBLISHED
    assert (await get(running, 2)).purged
    with fails("FAILED_PRECONDITION", "WRONG_STATE", field="name"):
        await promote(running, 2, force=True)
    assert (await get(running, "current")).name == name_of(3)


async def test_what_only_a_candidate_knows_stays_as_long_as_there_is_nothing_else(
    running: Running,
) -> None:
    """A version without a class cannot be, and it is better said at once."""
    await teach(running, black=BLACK)
    forget = learner_pb.ForgetClassesRequest(labels=["black"], purge=True)
    with fails("FAILED_PRECONDITION", "WRONG_STATE", field="labels"):
        await running.learner.ForgetClasses(forget)
    await teach(running, red=RED)
    ended = await running.ended((await running.learner.ForgetClasses(forget)).task.name)
    assert ended.state == pb.TASK_STATE_PUBLISHED


async def test_a_check_can_be_switched_off(start: Callable[..., Any]) -> None:
    running = await start(gate=Gate(interference=None, canary=None))
    task = await teach(running, black=BLACK)
    assert task.state == pb.TASK_STATE_PUBLISHED
    assert {c.name for c in task.report.checks} == {"not_finite", "leak", "accuracy"}
    await running.server.stop()
    # Limits judge what is learned under them: what is published stays so.
    running = await start(gate=Gate(leak=0.0))
    assert (await get(running, "current")).name == name_of(1)
    task = await teach(running, red=RED)
    assert [c.name for c in task.report.checks if not c.passed] == ["leak"]


def test_limits_come_from_the_command_line() -> None:
    def gate_of(*options: str) -> Gate:
        arguments = __main__._parser().parse_args(["--store", "s", *options])
        return __main__._settings(arguments).gate

    assert gate_of() == Gate()
    assert set(__main__._GATE_OPTIONS) == set(Gate.model_fields)
    off = [part for name in Gate.model_fields for part in (option_of(name), "off")]
    assert gate_of(*off) == Gate(**dict.fromkeys(Gate.model_fields))
    assert gate_of("--gate-accuracy", "0.3", "--gate-distinct", "0.6") == Gate(
        accuracy=0.3, distinct=0.6
    )
    for name in Gate.model_fields:
        for value in ("-1", "nan", "much"):
            with pytest.raises(InvalidInputError, match=f"{option_of(name)}: .*, or off"):
                gate_of(f"{option_of(name)}={value}")


@pytest.mark.parametrize("value", ["-1", "many", "1.5"])
def test_a_number_of_canary_images_is_one(capsys: pytest.CaptureFixture[str], value: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        __main__._parser().parse_args([f"--canary-images={value}"])
    assert "--canary-images" in capsys.readouterr().err


# -- canary images ---------------------------------------------------------------------------------


def kept(running: Running) -> dict[str, int]:
    """Return how many images are kept of each class, by its key."""
    root = running.settings.store
    return {key: len(canary.read(root, key)) for key in sorted(canary.keys(root))}


async def test_some_images_of_each_new_class_are_kept(start: Callable[..., Any]) -> None:
    running = await start(canary_images=2)
    shades = [png((250 - i, 0, 0)) for i in range(7)]
    first = await running.ended((await running.learn({"red": shades, "green": [png(GREEN)]})).name)
    task = first.name.rpartition("/")[2]
    root = running.settings.store
    assert kept(running) == {f"{task}.0": 2, f"{task}.1": 1}
    assert canary.read(root, f"{task}.0") == [shades[0], shades[4]]
    # Of a class that is known already, no more; of one that is held back, as of any other.
    ended = await running.ended((await running.learn({"red": shades, "black": [png(BLACK)]})).name)
    assert ended.state == pb.TASK_STATE_HELD_BACK
    candidate = f"{ended.name.rpartition('/')[2]}.0"
    assert kept(running) == {f"{task}.0": 2, f"{task}.1": 1, candidate: 1}
    await running.server.stop()
    running = await start(canary_images=1)
    assert kept(running) == {f"{task}.0": 2, f"{task}.1": 1, candidate: 1}
    await running.server.stop()
    assert kept(await start()) == {}


@pytest.mark.parametrize("purge", [False, True])
async def test_images_of_forgotten_classes_are_not_kept(
    start: Callable[..., Any], purge: bool
) -> None:
    running = await start(canary_images=5)
    await teach(running, red=RED, green=GREEN)
    red, _ = kept(running)
    await teach(running, black=BLACK)
    assert len(kept(running)) == 3
    forget = learner_pb.ForgetClassesRequest(labels=["green", "black"], purge=purge)
    ended = await running.ended((await running.learner.ForgetClasses(forget)).task.name)
    assert ended.state == pb.TASK_STATE_PUBLISHED
    assert kept(running) == {red: 1}


async def test_images_that_nobody_asks_for_are_removed_at_the_start(
    start: Callable[..., Any],
) -> None:
    running = await start(canary_images=5)
    await teach(running, red=RED, green=GREEN)
    red, green = kept(running)
    await running.server.stop()
    store = running.store
    canary.keep(store.root, "nobody.0", [png()])
    (store.root / "canary" / ".draft.half").mkdir()
    images = canary.read(store.root, green)
    store.forget([green])
    canary.keep(store.root, green, images)  # as if the server had died before they were deleted
    running = await start(canary_images=5)
    assert kept(running) == {red: 1}


async def test_a_disk_that_takes_no_canary_images_fails_no_task(
    start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = await start(canary_images=5)
    monkeypatch.setattr(failpoints, "reach", full_at("canary.rename"))
    assert (await teach(running, red=RED)).state == pb.TASK_STATE_PUBLISHED
    assert kept(running) == {}
    monkeypatch.undo()
    assert (await teach(running, green=GREEN)).state == pb.TASK_STATE_PUBLISHED
    assert list(kept(running).values()) == [1]


async def test_a_task_whose_images_were_kept_when_the_server_stopped_ends_once(
    start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = await start(canary_images=5)
    monkeypatch.setattr(tasks, "RETRY_SECONDS", 3600.0)
    loop, reached = asyncio.get_running_loop(), asyncio.Event()

    def full_once_kept(name: str) -> None:
        if name == "record.update" and canary.keys(running.settings.store):
            loop.call_soon_threadsafe(reached.set)
            raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(failpoints, "reach", full_once_kept)
    task = await running.learn({"red": [png()]})
    await reached.wait()
    await running.server.stop()
    before = kept(running)
    monkeypatch.undo()
    running = await start(canary_images=5)
    assert (await running.ended(task.name)).state == pb.TASK_STATE_PUBLISHED
    assert kept(running) == before
    assert list(before.values()) == [1]


def full_at(point: str) -> Callable[[str], None]:
    """Return what a failpoint does where the disk is full."""

    def reach(name: str) -> None:
        if name == point:
            raise OSError(errno.ENOSPC, "full")

    return reach


def option_of(name: str) -> str:
    return f"--gate-{name.replace('_', '-')}"
