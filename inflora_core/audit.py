"""What was done, and by whom: a log in which every line vouches for the one before. No torch.

    audit.jsonl     one JSON object a line, in the order in which things happened:
                    {"seq": 7, "time": "2026-11-02T09:30:00.123456Z", "event": "version promoted",
                     "who": "ipv4:10.0.0.7:51034", "version_from": 3, "version_to": 4, ...,
                     "previous": "...", "sha256": "..."}
    audit.torn-1    what a power cut left of a last line

``previous`` is the sha256 of the line before with its newline, 64 zeros in the first; ``sha256`` is
that of the line's own object without it. What is not known or does not apply is left out. Nothing
that a client calls something is in it, labels least of all: a purge has nothing to take out.

An entry is written after the step that it reports is durable, and before anyone is told of it. So
the log never says what did not happen, and what a crash kept out of it can still be read from the
store, and is added at the next start (``recovered``).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from inflora_core import durable, failpoints
from inflora_core.errors import LimitExceededError, UnavailableError
from inflora_core.model import now

log = logging.getLogger(__name__)

FILE = "audit.jsonl"

FIRST = "0" * 64
"""What the first line has in place of the hash of one before it."""

SERVER = "server"
"""Who did what no caller asked for."""
UNKNOWN = "unknown"
"""Who did what a crash kept out of the log, where nothing else has it."""


class Event(StrEnum):
    """What can be in the log. A reader takes any text: a newer release may know more."""

    STARTED = "server started"
    ACCEPTED = "task accepted"
    PUBLISHED = "task published"
    FAILED = "task failed"
    CANCELLED = "task cancelled"
    HELD_BACK = "version held back"
    SET_ASIDE = "task set aside"
    """It kept ending the worker."""
    RETRIED = "task retried"
    PROMOTED = "version promoted"
    ROLLED_BACK = "version rolled back"
    """Made current, though it is not made from the one that was."""
    FELL_BACK = "fell back"
    """The current version is damaged, and another answers in its place. It stays current."""
    PINNED = "version pinned"
    UNPINNED = "version unpinned"
    RETIRED = "version retired"
    """Deleted but for what later versions are made of, because it was old."""
    FORGOTTEN = "classes forgotten"
    PURGED = "classes purged"
    REPAIRED = "store repaired"


MOVES = frozenset({Event.PROMOTED, Event.ROLLED_BACK})
"""After which another version is current."""
ENDS = frozenset({Event.PUBLISHED, Event.FAILED, Event.CANCELLED, Event.HELD_BACK})
"""After which nothing happens to a task any more."""


@dataclass(frozen=True)
class Entry:
    """Something that happened.

    Attributes:
        event: What; see ``Event``.
        who: Who asked for it: a caller's address (``name@address`` where it had to say who it is),
            ``SERVER``, or ``UNKNOWN``.
        task: Id of the task that it is about.
        data_sha256: Hash of what a task was taught from (``Task.content_sha256``).
        version_from: What a version was made from, or what was current before.
        version_to: The version that was made, or is current now.
        classes: Keys of classes, which are no names.
        reason: Why: ``reason`` of an ``InfloraError``. No message: those quote labels.
        recovered: Added after a crash, and not when it happened.
    """

    event: str
    who: str
    task: str = ""
    data_sha256: str = ""
    version_from: int | None = None
    version_to: int | None = None
    classes: tuple[str, ...] = ()
    reason: str = ""
    recovered: bool = False


@dataclass(frozen=True)
class Line(Entry):
    """An entry in the log.

    Attributes:
        seq: Its number, from 1. The order of events, whatever the clock said.
        time: When it was written.
        previous: Hash of the line before.
    """

    seq: int = field(kw_only=True)
    time: datetime = field(kw_only=True)
    previous: str = field(kw_only=True)


_LINE = TypeAdapter(Line)
_SEALED = re.compile(rb'(\{.*), "sha256": "([0-9a-f]{64})"\}\n')


@dataclass(frozen=True)
class History:
    """What the log says of the store, as far as it can be believed.

    Attributes:
        accepted: Ids of tasks.
        ended: Ids of those that have ended.
        set_aside: Ids of those that wait to be retried, or cancelled.
        forgotten: Keys of classes.
        purged: Keys of those whose data were deleted.
        current: Versions that were made current, oldest first.
        parents: What versions were made from.
        pinned: Versions that are kept however old they are.
        retired: Versions whose data were deleted.
    """

    accepted: frozenset[str]
    ended: frozenset[str]
    set_aside: frozenset[str]
    forgotten: frozenset[str]
    purged: frozenset[str]
    current: tuple[int, ...]
    parents: dict[int, int | None]
    pinned: frozenset[int]
    retired: frozenset[int]

    @classmethod
    def of(cls, lines: Iterable[Line]) -> History:
        """Return what ``lines`` say."""
        accepted: set[str] = set()
        ended: set[str] = set()
        set_aside: set[str] = set()
        forgotten: set[str] = set()
        purged: set[str] = set()
        current: list[int] = []
        parents: dict[int, int | None] = {}
        pinned: set[int] = set()
        retired: set[int] = set()
        for line in lines:
            if line.event == Event.ACCEPTED:
                accepted.add(line.task)
            elif line.event == Event.SET_ASIDE:
                set_aside.add(line.task)
            elif line.event == Event.RETRIED:
                set_aside.discard(line.task)
            elif line.event in ENDS:
                ended.add(line.task)
                set_aside.discard(line.task)
                if line.version_to is not None:
                    parents[line.version_to] = line.version_from
            elif line.event in MOVES and line.version_to is not None:
                current.append(line.version_to)
            elif line.event == Event.PINNED and line.version_to is not None:
                pinned.add(line.version_to)
            elif line.event == Event.UNPINNED and line.version_to is not None:
                pinned.discard(line.version_to)
            elif line.event == Event.RETIRED and line.version_to is not None:
                retired.add(line.version_to)
            elif line.event in (Event.FORGOTTEN, Event.PURGED):
                (forgotten if line.event == Event.FORGOTTEN else purged).update(line.classes)
        return cls(
            frozenset(accepted),
            frozenset(ended),
            frozenset(set_aside),
            frozenset(forgotten | purged),
            frozenset(purged),
            tuple(current),
            parents,
            frozenset(pinned),
            frozenset(retired),
        )


@dataclass(frozen=True)
class Fault:
    """A place where the log is not as it was written; ``line`` counts from 1."""

    line: int
    problem: str


@dataclass(frozen=True)
class Reading:
    """The log as it is on the disk.

    Attributes:
        lines: Those that are as they were written.
        faults: What was changed, removed or moved.
        seq: Number of the last whole line.
        size: Bytes of the whole lines; what follows is torn.
        torn: Bytes of what is no whole line, at the end.
        head: Hash of the last whole line, ``FIRST`` if there is none.
    """

    lines: tuple[Line, ...] = ()
    faults: tuple[Fault, ...] = ()
    seq: int = 0
    size: int = 0
    torn: int = 0
    head: str = FIRST

    @property
    def history(self) -> History:
        """What the sound lines say."""
        return History.of(self.lines)


def verify(root: Path) -> Reading:
    """Read the log of the store in folder ``root``, and check it. Changes nothing.

    Lines that were cut off at the end are not missed: what is left is a sound log. Only who has
    noted the head elsewhere can see that.

    Raises:
        OSError: it cannot be read. No log at all is an empty one.
    """
    lines: list[Line] = []
    faults: list[Fault] = []
    unread: list[Fault] = []
    size, end, seq, last_seq = 0, 0, 0, 0
    head = last = FIRST
    try:
        file = (root / FILE).open("rb")
    except FileNotFoundError:
        return Reading()
    with file:
        for number, content in enumerate(file, 1):
            end += len(content)
            before, last = last, _sha256(content)
            line = _read(content)
            seq += 1
            if line is None:
                # Torn, unless a whole line follows.
                unread.append(Fault(number, "it is not what was written"))
                continue
            faults += unread
            unread.clear()
            if not _is_sealed(content):
                faults.append(Fault(number, "it was changed"))
            else:
                lines.append(line)
                if line.previous != before or line.seq != seq:
                    what = "the line before it was changed, removed or moved"
                    first = "the beginning of the log is missing"
                    faults.append(Fault(number, what if number > 1 else first))
                seq = line.seq
            last_seq, size, head = seq, end, last
    return Reading(tuple(lines), tuple(faults), last_seq, size, end - size, head)


class AuditLog:
    """The log of one store, to be written. Safe for many threads of the process with the lock.

    Args:
        root: The store's folder.

    Attributes:
        reading: The log as it was when it was opened, but for a torn end, which is set aside.

    Raises:
        OSError: it cannot be read, or its torn end cannot be set aside.
    """

    def __init__(self, root: Path) -> None:
        self._path = root / FILE
        self._lock = threading.Lock()
        self._seq, self._size, self._head = 0, 0, FIRST
        self.reading = self._open()

    @property
    def head(self) -> tuple[int, str]:
        """Number and hash of the last line. Noted elsewhere, they show what was cut off."""
        with self._lock:
            return self._seq, self._head

    def append(self, *entries: Entry) -> None:
        """Add entries, and flush them to the disk: all of them or none. Blocks.

        Raises:
            LimitExceededError: the disk is full.
            UnavailableError: the disk cannot be used.
        """
        if not entries:
            return
        try:
            with self._lock:
                self._append(entries)
        except OSError as error:
            kind = LimitExceededError if durable.is_full(error) else UnavailableError
            raise kind(f"the audit log cannot be written: {error}") from error

    def _append(self, entries: Iterable[Entry]) -> None:
        if self._size > (self._path.stat().st_size if self._path.exists() else 0):
            log.critical("%s was cut by somebody else while the server runs", self._path)
            self._open()
        contents, seq, head = [], self._seq, self._head
        for entry in entries:
            seq += 1
            contents.append(_encode(entry, seq, head))
            head = _sha256(contents[-1])
        data = b"".join(contents)
        failpoints.reach("audit.append")
        durable.append(self._path, data, self._size)
        self._seq, self._head, self._size = seq, head, self._size + len(data)
        try:
            failpoints.reach("audit.appended")
        except OSError as error:
            # It is written. Who was told otherwise would take back what it reports.
            log.warning("an entry is in the audit log all the same: %s", error)

    def _open(self) -> Reading:
        reading = verify(self._path.parent)
        for fault in reading.faults:
            log.critical("%s, line %d: %s", self._path, fault.line, fault.problem)
        if reading.torn:
            self._set_aside(reading)
        self._size, self._head, self._seq = reading.size, reading.head, reading.seq
        return reading

    def _set_aside(self, reading: Reading) -> None:
        """Move what a power cut left of a line out of the way; it may say what was under way."""
        torn = self._path.read_bytes()[reading.size :]
        folder, number = self._path.parent, 1
        while (aside := folder / f"audit.torn-{number}").exists() and aside.read_bytes() != torn:
            number += 1
        durable.write(aside, torn)
        durable.sync_folder(folder)
        failpoints.reach("audit.torn")
        with self._path.open("r+b") as file:
            file.truncate(reading.size)
            os.fsync(file.fileno())
        log.warning("the torn end of %s is in %s now", self._path, aside)


def _encode(entry: Entry, seq: int, previous: str) -> bytes:
    fields: dict[str, object] = {"seq": seq, "time": now().isoformat()}
    fields |= {"event": entry.event, "who": entry.who}
    values = {name: getattr(entry, name) for name in Entry.__dataclass_fields__}
    # By identity: 0 would equal False.
    fields |= {
        name: value
        for name, value in values.items()
        if value is not None and value is not False and value not in ("", ())
    }
    body = json.dumps(fields | {"previous": previous}).encode()
    return body[:-1] + f', "sha256": "{_sha256(body)}"}}\n'.encode()


def _read(content: bytes) -> Line | None:
    """Return what a line says, None if it is no whole line."""
    if not content.endswith(b"\n"):
        return None
    try:
        return _LINE.validate_json(content)
    except ValidationError:
        return None


def _is_sealed(content: bytes) -> bool:
    match = _SEALED.fullmatch(content)
    return match is not None and _sha256(match[1] + b"}") == match[2].decode()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
