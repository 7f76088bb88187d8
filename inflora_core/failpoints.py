"""Named places around every durable step, where a test can have the process fail. No torch.

A place does nothing unless the environment variable ``INFLORA_FAILPOINTS`` names it when the
process starts:

    INFLORA_FAILPOINTS="draft.rename=kill@3, record.update=ENOSPC*2"

``kill`` ends the process at once, as SIGKILL does; the name of an error raises that ``OSError``.
``@n`` acts the n-th time that the place is reached and from then on, ``*n`` only n times in all.
Without the variable ``reach`` is a function that does nothing.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass

VARIABLE = "INFLORA_FAILPOINTS"

POINTS = frozenset(
    {
        # The server: an upload becomes a task.
        "spool.create",
        "spool.origin",
        "spool.write",
        "spool.flush",
        "spool.flushed",
        "spool.sync",
        "spool.synced",
        "spool.recover",
        "spool.recovered",
        "accept.insert",
        "accept.inserted",
        # The server: a task's record, what became of it, and what it leaves.
        "record.update",
        "record.updated",
        "forgotten.replace",
        "forgotten.replaced",
        "pointer.replace",
        "pointer.replaced",
        "retire.mark",
        "retire.marked",
        "retire.delete",
        "retire.deleted",
        "onnx.delete",
        "onnx.deleted",
        "purge.delete",
        "purge.deleted",
        "spool.delete",
        "spool.deleted",
        # The server: what it reports.
        "audit.append",
        "audit.appended",
        "audit.torn",
        "examples.move",
        "examples.moved",
        "examples.delete",
        "examples.deleted",
        "canary.write",
        "canary.rename",
        "canary.renamed",
        "canary.delete",
        "canary.deleted",
        # The worker: a version.
        "checkpoint.replace",
        "checkpoint.replaced",
        "draft.write",
        "draft.sync",
        "draft.rename",
        "draft.renamed",
        "draft.published",
        # Whoever writes a file that replaces another.
        "replace.write",
        "replace.rename",
        "replace.renamed",
    }
)
"""All there are; a name that is none of these is refused."""


@dataclass
class Failpoint:
    """What happens at one place.

    Attributes:
        error: Number of the ``OSError`` to raise; None ends the process.
        first: The visit, from 1, at which it begins to act.
        times: Visits at which it acts; None for all from then on.
    """

    error: int | None
    first: int = 1
    times: int | None = None
    visits: int = 0

    def visit(self, name: str) -> None:
        """Do what is to be done at this visit."""
        self.visits += 1
        acted = self.visits - self.first
        if acted < 0 or (self.times is not None and acted >= self.times):
            return
        if self.error is None:
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            raise OSError(self.error, f"{os.strerror(self.error)} (failpoint {name})")


_SPEC = re.compile(r"([a-z.]+)=(kill|E[A-Z]+)(?:@(\d+))?(?:\*(\d+))?")


def parse(text: str) -> dict[str, Failpoint]:
    """Return the failpoints that ``text`` describes, by name.

    Raises:
        ValueError: it does not; the message says which part.
    """
    found = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = _SPEC.fullmatch(part)
        number = match and getattr(errno, match[2], None)
        if not match or match[1] not in POINTS or (number is None and match[2] != "kill"):
            raise ValueError(f"{VARIABLE}: {part!r} is no failpoint")
        found[match[1]] = Failpoint(number, int(match[3] or 1), int(match[4]) if match[4] else None)
    return found


def _nothing(name: str) -> None:
    pass


def _reaching(armed: dict[str, Failpoint]) -> Callable[[str], None]:
    lock = threading.Lock()

    def reached(name: str) -> None:
        assert name in POINTS, name
        if name in armed:
            with lock:
                armed[name].visit(name)

    return reached


reach: Callable[[str], None] = _nothing
"""Called with the name of a place; call it as ``failpoints.reach``, since it may be replaced."""

if os.environ.get(VARIABLE):
    reach = _reaching(parse(os.environ[VARIABLE]))
