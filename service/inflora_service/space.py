"""Room on the store's filesystem, looked at before it is needed."""

from __future__ import annotations

import os

from inflora_core.config import Limits
from inflora_core.errors import DamagedError, LimitExceededError, NotFoundError
from inflora_core.store import Store


class Space:
    """Refuses what the disk has no room for.

    Args:
        store: Where everything is written.
        limits: What is to stay free.
    """

    def __init__(self, store: Store, limits: Limits) -> None:
        self._store = store
        self._reserve = limits.reserve_bytes
        self._known: tuple[int, int] | None = None

    def check(self, more: int = 0, versions: int = 1) -> None:
        """See that there is room. Blocks.

        Args:
            more: Bytes that are about to be written.
            versions: Versions that are to come. Each takes about as much as the current one.

        Raises:
            LimitExceededError: there is not; the message says how many bytes are missing.
        """
        disk = os.statvfs(self._store.root)
        needed = more + max(self._reserve, versions * self._version_bytes())
        missing = needed - disk.f_bavail * disk.f_frsize
        if missing > 0:
            raise LimitExceededError(
                f"the server's disk is short of {missing} bytes; retry when there is room"
            )

    def _version_bytes(self) -> int:
        """Return what a version takes: as much as the current one, or else as the backbone."""
        try:
            number = self._store.current()
            if number is not None:
                if self._known is None or self._known[0] != number:
                    files = self._store.version(number).files
                    self._known = number, sum(entry.size for entry in files)
                return self._known[1]
        except (DamagedError, NotFoundError):
            pass  # it cannot be told, and what was asked for may not need it
        return sum(path.stat().st_size for path in self._store.root.glob("backbones/*/*"))
