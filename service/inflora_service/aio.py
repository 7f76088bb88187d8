"""Small tools for asyncio that the standard library lacks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from concurrent.futures import Executor
from typing import Any, TypeVar

A = TypeVar("A")
T = TypeVar("T")


async def unbroken(work: Awaitable[T]) -> T:
    """Await ``work`` to its end even when cancelled meanwhile; raise the cancellation then.

    For work in threads and on the disk, which a cancelled caller would otherwise leave running
    beside its own clean-up.
    """
    task = asyncio.ensure_future(work)
    cancelled = False
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        # Looked at, so that asyncio does not report an error that nobody will ever handle.
        task.cancelled() or task.exception()
        raise asyncio.CancelledError
    return task.result()


async def in_order(
    items: AsyncIterator[A], work: Callable[[A], Coroutine[Any, Any, T]], ahead: int
) -> AsyncGenerator[T]:
    """Yield what ``work`` makes of each item, in the items' order.

    Several are worked on at a time, and no item is taken before there is a place for it: one whose
    result was not asked for yet keeps its place. So whoever sends faster than results are taken is
    slowed down. The first error, of an item or of what follows the last one, ends it.

    Args:
        items: What is worked on.
        work: What is done with each.
        ahead: Most that are taken and not yielded yet.
    """
    room = asyncio.Semaphore(ahead)
    at_work: asyncio.Queue[asyncio.Task[T] | None] = asyncio.Queue()

    async def take() -> None:
        try:
            while True:
                await room.acquire()
                at_work.put_nowait(asyncio.create_task(work(await anext(items))))
        except StopAsyncIteration:
            pass
        finally:
            at_work.put_nowait(None)

    taking = asyncio.create_task(take())
    begun: list[asyncio.Task[Any]] = [taking]
    try:
        while (task := await at_work.get()) is not None:
            begun.append(task)
            yield await task
            begun.remove(task)
            room.release()
        await taking
    finally:
        taking.cancel()
        while not at_work.empty():
            if (task := at_work.get_nowait()) is not None:
                begun.append(task)
        for each in begun:
            each.cancel()
        # None may be left at work by the time that the stream's call has ended.
        await unbroken(asyncio.gather(*begun, return_exceptions=True))


async def map_threads(pool: Executor, function: Callable[[A], T], items: Iterable[A]) -> list[T]:
    """Call ``function`` with every item in ``pool``; return the results in the items' order.

    Of several errors the one of the first item is raised; calls that have not begun are dropped.
    """
    loop = asyncio.get_running_loop()
    futures = [loop.run_in_executor(pool, function, item) for item in items]
    try:
        return [await future for future in futures]
    finally:
        for future in futures:
            if not future.cancel() and not future.cancelled():
                future.exception()  # looked at, as above
