"""The audit log: what was changed, removed or moved is seen, and a power cut loses nothing."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inflora_core import audit
from inflora_core.audit import FILE, FIRST, AuditLog, Entry, Event, Line
from inflora_core.errors import LimitExceededError, UnavailableError

ENTRIES = st.builds(
    Entry,
    event=st.sampled_from(Event),
    who=st.text(max_size=20),
    task=st.sampled_from(["", "t1", "t2"]),
    data_sha256=st.sampled_from(["", "ab" * 32]),
    version_from=st.none() | st.integers(0, 9),
    version_to=st.none() | st.integers(0, 9),
    classes=st.lists(st.sampled_from(["t1.0", "t2.1"]), max_size=2).map(tuple),
    reason=st.sampled_from(["", "DAMAGED"]),
    recovered=st.booleans(),
)
LOGS = st.lists(ENTRIES, min_size=1, max_size=6)


def said(lines: tuple[Line, ...]) -> list[Entry]:
    fields = Entry.__dataclass_fields__
    return [Entry(**{name: getattr(line, name) for name in fields}) for line in lines]


def write(root: Path, entries: list[Entry]) -> list[bytes]:
    """Write a log; return its lines."""
    log = AuditLog(root)
    for entry in entries:
        log.append(entry)
    return (root / FILE).read_bytes().splitlines(keepends=True)


@settings(max_examples=30)
@given(entries=LOGS, restarts=st.integers(1, 3))
def test_what_was_appended_comes_back(entries: list[Entry], restarts: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(restarts):
            write(Path(folder), entries)
        AuditLog(Path(folder)).append(*entries, *entries)
        reading = audit.verify(Path(folder))
        assert (reading.faults, reading.torn) == ((), 0)
        assert said(reading.lines) == entries * (restarts + 2)
        assert [line.seq for line in reading.lines] == [*range(1, len(reading.lines) + 1)]
        lines = (Path(folder) / FILE).read_bytes().splitlines(keepends=True)
        hashes = [FIRST, *(hashlib.sha256(line).hexdigest() for line in lines)]
        assert [line.previous for line in reading.lines] == hashes[:-1]
        assert AuditLog(Path(folder)).head == (
            len(lines),
            hashes[-1] == reading.head and hashes[-1],
        )


@settings(max_examples=150)
@given(entries=LOGS, data=st.data())
def test_a_change_of_any_byte_is_seen(entries: list[Entry], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        content = bytearray(b"".join(write(Path(folder), entries)))
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
        (Path(folder) / FILE).write_bytes(content)
        reading = audit.verify(Path(folder))
        assert reading.faults or reading.torn
        assert set(said(reading.lines)) <= set(entries)


@settings(max_examples=60)
@given(entries=st.lists(ENTRIES, min_size=3, max_size=6), data=st.data())
def test_a_line_that_is_removed_repeated_or_moved_is_seen(
    entries: list[Entry], data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        lines = write(Path(folder), entries)
        at = data.draw(st.integers(0, len(lines) - 2))
        match data.draw(st.sampled_from(["remove", "repeat", "swap"])):
            case "remove":
                del lines[at]
            case "repeat":
                lines.insert(at, lines[at])
            case "swap":
                lines[at : at + 2] = lines[at : at + 2][::-1]
        (Path(folder) / FILE).write_bytes(b"".join(lines))
        assert audit.verify(Path(folder)).faults
        # What is added later does not heal it, and is itself sound.
        AuditLog(Path(folder)).append(Entry(Event.STARTED, "later"))
        reading = audit.verify(Path(folder))
        assert reading.faults
        assert reading.lines[-1].who == "later"


@settings(max_examples=60)
@given(entries=LOGS, data=st.data())
def test_a_torn_line_is_set_aside(entries: list[Entry], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        *whole, last = write(root, entries)
        torn = last[: data.draw(st.integers(1, len(last) - 1))]
        # What was not written by then can be zeros, where the file system had grown the file.
        torn += b"\0" * data.draw(st.integers(0, 20))
        (root / FILE).write_bytes(b"".join(whole) + torn)
        reading = audit.verify(root)
        assert (reading.faults, reading.torn) == ((), len(torn))
        AuditLog(root).append(Entry(Event.STARTED, "server"))
        assert (root / "audit.torn-1").read_bytes() == torn
        reading = audit.verify(root)
        assert (reading.faults, reading.torn) == ((), 0)
        assert said(reading.lines) == [*entries[:-1], Entry(Event.STARTED, "server")]


@settings(max_examples=30)
@given(entries=LOGS, cut=st.integers(0, 6))
def test_what_is_cut_off_at_the_end_shows_in_the_head_alone(entries: list[Entry], cut: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        lines = write(Path(folder), entries)
        before = AuditLog(Path(folder)).head
        (Path(folder) / FILE).write_bytes(b"".join(lines[:-cut] if cut else lines))
        assert not audit.verify(Path(folder)).faults
        assert (AuditLog(Path(folder)).head == before) == (cut == 0)


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, LimitExceededError), (errno.EIO, UnavailableError)]
)
@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_what_the_disk_does_not_take_is_not_in_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    kind: type[Exception],
    call: str,
) -> None:
    log = AuditLog(tmp_path)
    log.append(Entry(Event.STARTED, "first"))
    before = (tmp_path / FILE).read_bytes()
    pwrite = os.pwrite

    def fail(descriptor: int, *rest: Any) -> Any:
        if rest:
            pwrite(descriptor, rest[0][:10], rest[1])  # a part of it
        raise OSError(number, "the disk does not take it")

    with monkeypatch.context() as broken:
        broken.setattr(os, call, fail)
        with pytest.raises(kind):
            log.append(Entry(Event.STARTED, "lost"))
    assert (tmp_path / FILE).read_bytes() == before
    log.append(Entry(Event.STARTED, "second"))
    assert [line.who for line in audit.verify(tmp_path).lines] == ["first", "second"]


def test_a_log_that_somebody_cuts_goes_on_from_what_is_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = AuditLog(tmp_path)
    for who in "abc":
        log.append(Entry(Event.STARTED, who))
    lines = (tmp_path / FILE).read_bytes().splitlines(keepends=True)
    (tmp_path / FILE).write_bytes(lines[0] + lines[1][:9])
    log.append(Entry(Event.STARTED, "d"))
    assert "cut by somebody else" in caplog.text
    assert [line.who for line in audit.verify(tmp_path).lines] == ["a", "d"]
    assert not audit.verify(tmp_path).faults


def test_the_clock_has_no_say_in_the_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, now = AuditLog(tmp_path), audit.now
    for days in (5, 3, 9, 1):
        moment = now().replace(day=days)
        monkeypatch.setattr(audit, "now", lambda moment=moment: moment)
        log.append(Entry(Event.STARTED, str(days)))
    reading = audit.verify(tmp_path)
    assert [(line.seq, line.who, line.time.day) for line in reading.lines] == [
        *((1, "5", 5), (2, "3", 3), (3, "9", 9), (4, "1", 1))
    ]


def test_history() -> None:
    def line(seq: int, event: Event, **more: Any) -> Line:
        return Line(event, "x", **more, seq=seq, time=audit.now(), previous="")

    make: list[Callable[[int], Line]] = [
        lambda n: line(n, Event.ACCEPTED, task="a"),
        lambda n: line(n, Event.ACCEPTED, task="b"),
        lambda n: line(n, Event.PROMOTED, version_to=1),
        lambda n: line(n, Event.PUBLISHED, task="a", version_to=1),
        lambda n: line(n, Event.PROMOTED, version_from=1, version_to=2),
        lambda n: line(n, Event.FORGOTTEN, classes=("a.0",)),
        lambda n: line(n, Event.ROLLED_BACK, version_from=2, version_to=1),
        lambda n: line(n, Event.FELL_BACK, version_from=1, version_to=7),
        lambda n: line(n, Event.PURGED, classes=("a.1",)),
    ]
    found = audit.History.of(function(number) for number, function in enumerate(make, 1))
    assert (found.accepted, found.ended) == ({"a", "b"}, {"a"})
    assert (found.forgotten, found.purged) == ({"a.0", "a.1"}, {"a.1"})
    assert (found.current, found.parents) == ((1, 2, 1), {1: None})
