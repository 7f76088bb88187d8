"""A server that follows a shared store: it answers with the version that is current there."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

from inflora_core.config import Limits
from inflora_core.errors import InfloraError
from inflora_core.predictor import RuntimeOptions
from inflora_core.replica import Replica
from inflora_core.shared import Root
from inflora_service.aio import unbroken
from inflora_service.serving import Host

log = logging.getLogger(__name__)

T = TypeVar("T")


class FollowingHost(Host):
    """Predicts with the version that it is told to.

    Args:
        replica: Where versions are.
        options: How onnxruntime runs them.
        limits: What images are refused.
        on_serving: Told once a version can answer.
        on_swap: As for ``Host``.
        on_run: As for ``Batcher``.
    """

    def __init__(
        self,
        replica: Replica,
        options: RuntimeOptions,
        limits: Limits,
        *,
        on_serving: Callable[[], None] = lambda: None,
        on_swap: Callable[[float], None] = lambda seconds: None,
        on_run: Callable[[int, int, float], None] = lambda images, bulk, seconds: None,
    ) -> None:
        super().__init__(
            replica, options, limits, on_serving=on_serving, on_swap=on_swap, on_run=on_run
        )
        self._replica = replica

    async def follow(self, number: int) -> None:
        """Answer with version ``number`` from now on, once it is loaded and warm.

        Where classes were forgotten or versions let go since the last call, none that is loaded
        answers any more.

        Raises:
            NotFoundError, StateError, DamagedError, UnavailableError: it cannot be loaded. What
                answered before goes on.
        """
        async with self._swap:
            began, outdated = time.monotonic(), self._replica.outdated
            if outdated:
                self._drop_pinned()
            # What answers may know what is forgotten: then the same version is read again.
            loaded = await (self._load_in_turn(number) if outdated else self._get(number))
            self._pinned.pop(number, None)
            # Running calls hold the version they began with; it goes when the last of them ends.
            self._current = replace(loaded, generation=self._generation)
            self._on_serving()
            await asyncio.to_thread(self._replica.set_current, number)
            self._replica.outdated = False
            self._on_swap(time.monotonic() - began)

    async def trim(self) -> None:
        """Let files go that do not fit into the cache, but for those of loaded versions."""
        loaded = set(self._pinned)
        if self._current is not None:
            loaded.add(self._current.version.number)
        # Where versions are loaded, so that none is that is just being read.
        await asyncio.get_running_loop().run_in_executor(self._loader, self._replica.trim, loaded)


class Follower:
    """Looks at the shared store, again and again, and has a host answer with what is current there.

    Args:
        replica: The copy that this server has of it.
        host: Answers.
        poll_seconds: From one look to the next.
        on_sound: Told whether what is current there answers here.
    """

    def __init__(
        self,
        replica: Replica,
        host: FollowingHost,
        poll_seconds: float,
        on_sound: Callable[[bool], None] = lambda sound: None,
    ) -> None:
        self._replica = replica
        self._host = host
        self._poll_seconds = poll_seconds
        self._on_sound = on_sound
        self._followed: Root | None = None
        # Its own: others wait in asyncio's for as long as the shared store is slow.
        self._pool = ThreadPoolExecutor(1, "follow")
        self._fault = "nothing was looked at yet"
        self._seen = 0
        self._since = time.monotonic()
        self._turn = asyncio.Lock()
        self._looking: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Answer with what is current there, or was when it was last looked at; then follow it."""
        await self.look()
        if self._followed is None:
            await self._resume()
        self._looking = asyncio.create_task(self._look_on())

    async def stop(self) -> None:
        """Follow no more; what answers goes on."""
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait([self._looking])
        self._pool.shutdown(wait=False, cancel_futures=True)

    @property
    def version(self) -> int:
        """Number of the version that was current there when it was last looked at, 0 before."""
        return self._seen

    @property
    def lag_seconds(self) -> float:
        """For how long what answers is not what is current there, or nobody knows."""
        late = time.monotonic() - self._since
        return late if self._fault or late > 2 * self._poll_seconds else 0.0

    async def look(self) -> None:
        """Look once, and follow; what goes wrong is logged, and tried again by the next call."""
        async with self._turn:
            await self._look()

    async def _look(self) -> None:
        began = time.monotonic()
        try:
            seen = await self._in_thread(self._replica.shared.root)
            if seen is None or seen.root.current is None:
                self._since = began
                self._tell("nothing is published yet")
                return
            self._seen = seen.root.current
            if seen.root != self._followed:
                await unbroken(self._follow(seen.root, seen.root.current))
            await self._host.trim()
            self._since = began
            self._tell("")
        except (InfloraError, OSError) as error:
            self._tell(str(error))
        except Exception as error:
            # Whatever it is, out of memory for example: the next look may find it gone.
            log.exception("cannot follow")
            self._tell(f"{type(error).__name__}: {error}")

    async def _follow(self, root: Root, current: int) -> None:
        index = await self._in_thread(lambda: self._replica.shared.index(root))
        await self._in_thread(lambda: self._replica.take(index))
        await self._host.follow(current)
        self._followed = root
        log.info("version %d is current, by %s on %s", current, root.writer, root.host)

    async def _resume(self) -> None:
        """Answer with what was current when it was last looked at."""
        try:
            number = await asyncio.to_thread(self._replica.current)
            if number is not None:
                await self._host.follow(number)
                log.warning("version %d answers, which was current when last looked at", number)
        except (InfloraError, OSError) as error:
            log.warning("what was current when last looked at cannot answer: %s", error)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def _look_on(self) -> None:
        while True:
            await asyncio.sleep(self._poll_seconds)
            await self.look()

    def _tell(self, fault: str) -> None:
        """Log what keeps it from following, once."""
        if fault and fault != self._fault:
            log.warning("not following: %s", fault)
        elif self._fault and not fault:
            log.info("following again")
        self._fault = fault
        self._on_sound(not fault)
