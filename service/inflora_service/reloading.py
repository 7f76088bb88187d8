"""Files that are read anew when they change: certificates, and who may call."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from inflora_core.errors import InfloraError

log = logging.getLogger(__name__)

T = TypeVar("T")

RELOAD_SECONDS = 1.0
"""Between looks at the files. Not at each call: the disk may be slow, and calls would wait."""

_ATTEMPTS = 5
"""To read several files between two changes of them."""


class Watched(Generic[T]):
    """Something that is made of files, and made again when one of them has changed.

    Links are followed, so a folder that is swapped as a whole is noticed, as those of Kubernetes'
    secrets are. What cannot be used is logged, and the last that could be stays.

    Args:
        what: What it is called in the log.
        paths: The files.
        load: Reads them. The log has the result as text.

    Attributes:
        what: What it is called in the log.
        value: The last that could be read.

    Raises:
        InfloraError: what ``load`` raises at first.
    """

    def __init__(self, what: str, paths: Sequence[Path], load: Callable[[], T]) -> None:
        self.what = what
        self._paths = tuple(paths)
        self._load = load
        self._complaint = ""
        self._seen, self.value = self._read()

    def look(self) -> None:
        """Read the files again if they have changed. Blocks."""
        if self._signature() == self._seen:
            return
        complaint = ""
        try:
            self._seen, self.value = self._read()
        except (InfloraError, OSError) as error:
            complaint = str(error)
        if not complaint:
            log.info("what is new of %s is used: %s", self.what, self.value)
        elif complaint != self._complaint:
            # Tried again at every look, and said once: a certificate may become valid with time.
            log.error("what is new of %s is not used, the last stays: %s", self.what, complaint)
        self._complaint = complaint

    def _read(self) -> tuple[Any, T]:
        """Return a value whose files all belong together, with what tells them from others."""
        for attempt in range(_ATTEMPTS):
            before = self._signature()
            try:
                value = self._load()
            except InfloraError:
                # A key may have been read before it was replaced, and its certificate after that.
                if before == self._signature() or attempt == _ATTEMPTS - 1:
                    raise
                continue
            if before == self._signature():
                break
        return before, value

    def _signature(self) -> tuple[object, ...]:
        found: list[object] = []
        for path in self._paths:
            try:
                stat = path.stat()
            except OSError as error:
                found.append(error.errno)
            else:
                found.append((stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns))
        return tuple(found)


async def keep_fresh(watched: Sequence[Watched[Any]], seconds: float) -> None:
    """Look at files for ever, every so many seconds."""
    while True:
        await asyncio.sleep(seconds)
        for each in watched:
            try:
                await asyncio.to_thread(each.look)
            except Exception:
                log.exception("cannot look for what is new, trying on")
