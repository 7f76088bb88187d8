"""One server for a store, and one learning worker: a lock that outlives neither."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from inflora_core.errors import UnavailableError

FILE = "LOCK"

PATIENCE_SECONDS = 5.0
"""How long a worker may need to notice that its server was killed."""

_POLL_SECONDS = 0.05


class StoreLock:
    """Holds the store for this process and for the worker that inherits ``descriptor``.

    With ``flock`` the lock belongs to the open file, so it is free once server and worker are both
    gone: a worker that is still writing a version keeps the next server from starting another.
    """

    def __init__(self, store: Path) -> None:
        """Take the lock. Blocks for up to ``PATIENCE_SECONDS``.

        Raises:
            UnavailableError: another server has it, or it is no file that can be opened.
        """
        try:
            self.descriptor = os.open(store / FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise UnavailableError(f"{store / FILE} cannot be opened: {error}") from error
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    os.close(self.descriptor)
                    raise UnavailableError(
                        f"the store {store} is in use by another server"
                    ) from None
                time.sleep(_POLL_SECONDS)

    def release(self) -> None:
        """Let go of the store."""
        os.close(self.descriptor)
