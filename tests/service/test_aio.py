"""``in_order``: results come in the items' order, and whoever sends too fast is slowed down."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inflora_service.aio import in_order


class Desk:
    """Items that end when they are told to.

    Attributes:
        taken: How many were taken.
        at_work: Items that have begun and not ended.
    """

    def __init__(self, count: int, fault: Exception | None = None) -> None:
        self.taken = 0
        self.at_work: dict[int, asyncio.Future[int]] = {}
        self._count = count
        self._fault = fault

    async def items(self) -> AsyncIterator[int]:
        for number in range(self._count):
            self.taken += 1
            yield number
        if self._fault is not None:
            raise self._fault

    async def work(self, number: int) -> int:
        self.at_work[number] = asyncio.get_running_loop().create_future()
        try:
            return await self.at_work[number]
        finally:
            del self.at_work[number]


async def settle() -> None:
    """Let everything go on as far as it can."""
    for _ in range(20):
        await asyncio.sleep(0)


@given(st.integers(0, 12), st.integers(1, 5), st.data())
def test_whatever_ends_first(count: int, ahead: int, data: st.DataObject) -> None:
    async def run() -> list[int]:
        desk, yielded = Desk(count), list[int]()

        async def consume() -> None:
            async for result in in_order(desk.items(), desk.work, ahead):
                yielded.append(result)

        consuming = asyncio.create_task(consume())
        await settle()
        while desk.at_work:
            assert desk.taken == min(count, len(yielded) + ahead)
            number = data.draw(st.sampled_from(sorted(desk.at_work)))
            desk.at_work[number].set_result(number)
            await settle()
        await consuming
        return yielded

    assert asyncio.run(run()) == list(range(count))


async def test_what_nobody_takes_keeps_its_place() -> None:
    desk = Desk(10)

    async def work(number: int) -> int:
        return number

    async with aclosing(in_order(desk.items(), work, 3)) as results:
        assert await anext(results) == 0
        await settle()
        assert desk.taken == 3
        assert await anext(results) == 1
        await settle()
        assert desk.taken == 4


@pytest.mark.parametrize("at", [0, 1, 2])
async def test_an_error_ends_it_after_what_came_before(at: int) -> None:
    desk, found = Desk(5), list[int]()
    results = in_order(desk.items(), desk.work, 3)

    async def consume() -> None:
        async for result in results:
            found.append(result)

    consuming = asyncio.create_task(consume())
    await settle()
    for number in (2, 1, 0):
        if number == at:
            desk.at_work[number].set_exception(ValueError("broken"))
        else:
            desk.at_work[number].set_result(number)
    with pytest.raises(ValueError, match="broken"):
        await consuming
    assert found == list(range(at))
    assert not desk.at_work


async def test_an_error_of_the_items_comes_after_all_results() -> None:
    desk, found = Desk(2, ConnectionError("gone")), list[int]()

    async def consume() -> None:
        async for result in in_order(desk.items(), desk.work, 3):
            found.append(result)

    consuming = asyncio.create_task(consume())
    await settle()
    for number in (1, 0):
        desk.at_work[number].set_result(number)
    with pytest.raises(ConnectionError, match="gone"):
        await consuming
    assert found == [0, 1]


async def test_given_up_it_leaves_nothing_at_work() -> None:
    desk = Desk(10)

    async def consume() -> None:
        async with aclosing(in_order(desk.items(), desk.work, 3)) as results:
            async for _ in results:
                pass

    consuming = asyncio.create_task(consume())
    await settle()
    assert len(desk.at_work) == 3
    consuming.cancel()
    with pytest.raises(asyncio.CancelledError):
        await consuming
    assert not desk.at_work
