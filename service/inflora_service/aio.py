"""Small tools for asyncio that the standard library lacks."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import Executor
from typing import TypeVar

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
