"""Streams that a client writes to, for asyncio.

When a server ends a call that is still being written to, grpc.aio may lose its status and report
INTERNAL instead (https://github.com/grpc/grpc/issues/36066). An upload that is refused half-way is
just that, so these calls are made by the blocking implementation, in a thread, on a connection of
their own.
"""

from __future__ import annotations

import asyncio
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Iterable,
    Iterator,
)
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar

from inflora_client._sync import Client

P = ParamSpec("P")
T = TypeVar("T")


class Bridge:
    """Runs calls of a blocking client in one thread. Used as an asynchronous context manager.

    Leaving it ends what is still running.

    Args:
        client: The client, closed with the bridge.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="inflora-stream")
        self._sources: list[_Source[Any]] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for source in self._sources:
            source.close()
        self._client.close()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def run(self, function: Callable[[Client], T]) -> T:
        """Call a function with the client, in the thread."""
        return await self._loop.run_in_executor(self._thread, function, self._client)

    async def iterate(self, function: Callable[[Client], Iterator[T]]) -> AsyncGenerator[T, None]:
        """Yield what the iterator made by a function yields, in the thread."""
        items = await self.run(function)
        end = object()
        while (item := await self.run(lambda _: next(items, end))) is not end:
            yield item  # type: ignore[misc]  # it is not the end

    def source(self, items: Iterable[T] | AsyncIterable[T]) -> Iterable[T]:
        """Make asynchronous items iterable in another thread; leave others as they are."""
        if not isinstance(items, AsyncIterable):
            return items
        if isinstance(items, AsyncIterator):
            return self._begin(items)
        return _Repeatable(lambda: self._begin(items))

    def _begin(self, items: AsyncIterable[T]) -> _Source[T]:
        source = _Source(items, self._loop)
        self._sources.append(source)
        return source


class _Repeatable(Iterable[T]):
    """Asynchronous items that can be iterated over again."""

    def __init__(self, begin: Callable[[], Iterator[T]]) -> None:
        self._begin = begin

    def __iter__(self) -> Iterator[T]:
        return self._begin()


class _Source(Iterator[T]):
    """Takes asynchronous items from another thread than the loop's."""

    def __init__(self, items: AsyncIterable[T], loop: asyncio.AbstractEventLoop) -> None:
        self._items = aiter(items)
        self._loop = loop
        self._next: Future[T] | None = None
        self._closed = False

    def __next__(self) -> T:
        # An iteration that was given up must not look complete: half a task would be accepted.
        if self._closed:
            raise CancelledError
        self._next = asyncio.run_coroutine_threadsafe(self._take(), self._loop)
        try:
            return self._next.result()
        except StopAsyncIteration:
            raise StopIteration from None

    async def _take(self) -> T:
        return await anext(self._items)

    def close(self) -> None:
        """Wake the thread that waits for an item; called in the loop's thread."""
        self._closed = True
        if self._next is not None:
            self._next.cancel()
