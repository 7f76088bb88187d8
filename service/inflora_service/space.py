"""Room on the store's filesystem, looked at before it is needed."""

from __future__ import annotations

import os
from collections import Counter

from inflora_core.config import Limits
from inflora_core.errors import DamagedError, LimitExceededError, NotFoundError
from inflora_core.store import Store

KINDS = ("models", "backbones", "spool", "examples", "canary", "drafts", "records", "other")
"""What takes room in a store: its folders, its task records and the audit log, and the rest."""

_RECORDS = ("tasks.sqlite", "audit.jsonl")
_BLOCK = 512
"""Bytes of the blocks that a file's size on the disk is counted in (``st_blocks``)."""


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
        missing = more + self.needed(versions) - self.free()
        if missing > 0:
            raise LimitExceededError(
                f"the server's disk is short of {missing} bytes; retry when there is room"
            )

    def free(self) -> int:
        """Return the bytes that are free on the store's filesystem. Blocks."""
        disk = os.statvfs(self._store.root)
        return disk.f_bavail * disk.f_frsize

    def needed(self, versions: int = 1) -> int:
        """Return the bytes that have to be free while so many versions are to come. Blocks."""
        return max(self._reserve, versions * self._version_bytes())

    def used(self) -> dict[str, int]:
        """Return the bytes that the store takes on the disk, for each of ``KINDS``. Blocks."""
        root, used = str(self._store.root), Counter(dict.fromkeys(KINDS, 0))
        for folder, _, names in os.walk(root):
            top = os.path.relpath(folder, root).split(os.sep)[0]
            for name in names:
                kind = top
                if top == os.curdir:
                    kind = "records" if name.startswith(_RECORDS) else "other"
                try:
                    blocks = os.lstat(os.path.join(folder, name)).st_blocks
                except FileNotFoundError:
                    continue  # what comes and goes
                used[kind if kind in KINDS else "other"] += blocks * _BLOCK
        return dict(used)

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
