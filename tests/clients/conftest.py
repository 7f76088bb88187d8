"""One peer server for each test, and both clients behind the same, blocking face."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from inflora_client import AsyncClient, Client
from tests.clients.peer import QUICK, Peer


class Blocking:
    """Runs an ``AsyncClient`` to completion, so that one suite tests both clients."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._runner = asyncio.Runner()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            return self._iterate(result) if inspect.isasyncgen(result) else self._run(result)

        return call

    def __exit__(self, *error: object) -> None:
        self._run(self._client.__aexit__(None, None, None))
        self._runner.close()

    def __enter__(self) -> Blocking:
        self._run(self._client.__aenter__())
        return self

    def _run(self, awaitable: Any) -> Any:
        async def main() -> Any:
            return await awaitable

        return self._runner.run(main())

    def _iterate(self, items: AsyncGenerator[Any, None]) -> Iterator[Any]:
        try:
            while True:
                try:
                    yield self._run(anext(items))
                except StopAsyncIteration:
                    return
        finally:
            self._run(items.aclose())


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer()
    yield peer
    peer.stop()


@pytest.fixture(params=["sync", "async"])
def connect(request: pytest.FixtureRequest) -> Iterator[Callable[..., Client]]:
    """Makes clients of either kind; both have the face of the blocking one."""
    with ExitStack() as stack:

        def make(target: str, **options: Any) -> Any:
            options = {"retry": QUICK, **options}
            if request.param == "sync":
                return stack.enter_context(Client(target, **options))
            return stack.enter_context(Blocking(AsyncClient(target, **options)))

        yield make


@pytest.fixture
def client(peer: Peer, connect: Callable[..., Client]) -> Client:
    return connect(peer.address)
