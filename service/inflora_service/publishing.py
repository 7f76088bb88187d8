"""Has a shared store be as the learner's own is, whenever that changes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from inflora_core.errors import FencedError, InfloraError
from inflora_core.mirror import Mirror
from inflora_service.aio import unbroken

log = logging.getLogger(__name__)

RETRY_SECONDS = 1.0
"""From an attempt that failed to the next; twice that after each, up to the longest."""
LONGEST_RETRY_SECONDS = 30.0


class Publisher:
    """Publishes in the background, in order, as often as it takes.

    Args:
        mirror: The shared store, claimed.
        on_fenced: Told why it may not publish any more: another learner does.
    """

    def __init__(self, mirror: Mirror, on_fenced: Callable[[FencedError], None]) -> None:
        self._mirror = mirror
        self._on_fenced = on_fenced
        self._changed = asyncio.Event()
        self._changed.set()
        self._settled = asyncio.Event()
        self._publishing: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Publish what is there, and what follows."""
        self._publishing = asyncio.create_task(self._publish_on())

    async def stop(self) -> None:
        """Publish no more, once what is being published is."""
        if self._publishing is not None:
            self._publishing.cancel()
            await asyncio.wait([self._publishing])

    def notify(self) -> None:
        """Say that the store may have changed."""
        self._changed.set()
        self._settled.clear()

    async def settled(self) -> None:
        """Wait until all that was said to have changed is published."""
        await self._settled.wait()

    async def _publish_on(self) -> None:
        swept, wait = False, RETRY_SECONDS
        while True:
            await self._changed.wait()
            self._changed.clear()
            try:
                if await unbroken(asyncio.to_thread(self._mirror.publish)):
                    root = self._mirror.seen.root
                    log.info("published: version %s, serial %d", root.current, root.serial)
                if not swept:
                    await asyncio.to_thread(self._mirror.sweep)
                swept, wait = True, RETRY_SECONDS
                if not self._changed.is_set():
                    self._settled.set()
            except FencedError as error:
                self._on_fenced(error)
                return
            except (InfloraError, OSError) as error:
                log.warning("not published yet, trying again in %g s: %s", wait, error)
                await asyncio.sleep(wait)
                wait = min(2 * wait, LONGEST_RETRY_SECONDS)
                self._changed.set()
