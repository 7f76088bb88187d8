"""Room on the disk is looked at before anything is accepted."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from inflora.v1 import learner_service_pb2 as learner_pb
from inflora_core.config import Limits
from inflora_core.errors import LimitExceededError
from inflora_core.store import Store
from inflora_service.server import Settings
from inflora_service.space import Space
from tests.service.conftest import GREEN, RED, Running, fails, fault_of, png
from tests.service.test_bad_input import LIMIT, publish
from tests.service.test_resuming import END, begin, count, messages


def free(path: Path) -> int:
    disk = os.statvfs(path)
    return disk.f_bavail * disk.f_frsize


@pytest.fixture
def short_of(start: Callable[..., Any], settings: Settings) -> Callable[[int], Any]:
    """Starts a server whose reserve is larger than what is free by so many bytes."""

    async def begin_short(missing: int) -> Running:
        reserve = free(settings.store) + missing
        running: Running = await start(limits=Limits(reserve_bytes=reserve))
        return running

    return begin_short


async def test_without_room_nothing_is_accepted(
    short_of: Callable[[int], Any], settings: Settings
) -> None:
    publish(settings.store, red=RED, green=GREEN)
    running = await short_of(2**34)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await running.learner.LearnTask(iter(messages(0, 1, request_id="r")))
    fault = fault_of(caught.value)
    assert (fault.code.name, fault.reason) == LIMIT
    missing = re.search(r"short of (\d+) bytes", fault.message)
    assert missing is not None
    assert int(missing[1]) == pytest.approx(2**34, rel=0.5), "others write here, too"
    forget = learner_pb.ForgetClassesRequest(labels=["red"])
    update = learner_pb.UpdateClassRequest(label="red", new_label="crimson")
    for call, request in (
        (running.learner.ForgetClasses, forget),
        (running.learner.UpdateClass, update),
    ):
        with fails(*LIMIT):
            await call(request)
    assert not list((settings.store / "spool").iterdir())


async def test_a_retry_of_what_was_accepted_needs_no_room(
    start: Callable[..., Any], settings: Settings
) -> None:
    running = await start()
    task = await running.learn({"a": [png()]}, request_id="r")
    await running.server.stop()
    running = await start(limits=Limits(reserve_bytes=free(settings.store) + 2**34))
    found = await running.learner.QueryUpload(learner_pb.QueryUploadRequest(request_id="r"))
    assert found.task == task.name


async def test_room_that_is_taken_while_an_upload_grows(
    start: Callable[..., Any], settings: Settings
) -> None:
    """By something else: what is not ours to see coming."""
    running = await start(limits=Limits(reserve_bytes=2**20))
    space = running.server.tasks._space
    call = await begin(running, messages(0, 2, request_id="r"))
    space._reserve = free(settings.store) + 2**34
    with fails(*LIMIT):
        await call.write(messages(2, 3)[1])
        await call
    assert await count(running, "r") == 0, "it does not take up the room that is missing"
    assert not list((settings.store / "spool").iterdir())
    space._reserve = 0
    task = (await running.learner.LearnTask([*messages(0, 6, request_id="r"), END])).task
    assert task.example_count == 6


def test_a_version_needs_as_much_as_the_last_one(settings: Settings) -> None:
    store = Store.open(settings.store)
    empty = Space(store, Limits(reserve_bytes=0))
    backbone = sum(path.stat().st_size for path in store.root.glob("backbones/*/*"))
    empty.check(versions=1)
    with pytest.raises(LimitExceededError, match="short of"):
        empty.check(versions=2 * free(store.root) // backbone)
    number = publish(settings.store, red=RED)
    size = sum(entry.size for entry in store.version(number).files)
    empty.check(versions=free(store.root) // size // 2)
    with pytest.raises(LimitExceededError, match="short of"):
        empty.check(versions=2 * free(store.root) // size)
    with pytest.raises(LimitExceededError, match="short of"):
        empty.check(more=2 * free(store.root))
