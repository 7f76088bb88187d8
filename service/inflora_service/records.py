"""Task records in SQLite: what was acknowledged outlives a power cut.

    tasks(seq, id, request_id, state, record)
    scores(version, task, images, accuracy, answering, time)

``record`` is a ``Snapshot`` as JSON; the other columns are copies of its task's fields to search
by. ``scores`` has the figures of evaluations, by task and never by class: none names one. Older
releases pass over it. All methods block: call them through ``asyncio.to_thread``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
import sqlite3
import threading
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from inflora_core import durable, failpoints
from inflora_core.errors import (
    DamagedError,
    LimitExceededError,
    NotFoundError,
    StoreFormatError,
    UnavailableError,
)
from inflora_core.model import Progress, Task, TaskState

log = logging.getLogger(__name__)

FORMAT = 1
FILE = "tasks.sqlite"


@dataclass(frozen=True)
class Snapshot:
    """A task at one moment; ``progress`` is the last that the learner reported, if it did."""

    task: Task
    progress: Progress | None = None


_SNAPSHOT = TypeAdapter(Snapshot)


@dataclass(frozen=True)
class Score:
    """How images of a task fared when a version was evaluated last, answering or not.

    Attributes:
        version: Number of the version.
        task: The task that taught the images' classes.
        images: How many there were.
        accuracy: Share of right answers, all classes competing.
        answering: Whether the version answered calls that name none.
        time: When that was.
    """

    version: int
    task: str
    images: int
    accuracy: float
    answering: bool
    time: datetime


def content_hash(content: Any) -> str:
    """Return the hash of something that JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def task_content(display_name: str, settings: dict[str, Any], spool_sha256: str) -> str:
    """Return ``Task.content_sha256`` of a task that learns: equal for equal requests."""
    return content_hash([display_name, settings, spool_sha256])


_SCHEMA = f"""
    CREATE TABLE IF NOT EXISTS tasks (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        request_id TEXT NOT NULL,
        state TEXT NOT NULL,
        record TEXT NOT NULL
    ) STRICT;
    CREATE UNIQUE INDEX IF NOT EXISTS tasks_request_id ON tasks (request_id)
        WHERE request_id <> '';
    CREATE INDEX IF NOT EXISTS tasks_state ON tasks (state);
    PRAGMA user_version = {FORMAT};
"""

_SCORES = """
    CREATE TABLE IF NOT EXISTS scores (
        version INTEGER NOT NULL,
        task TEXT NOT NULL,
        images INTEGER NOT NULL,
        accuracy REAL NOT NULL,
        answering INTEGER NOT NULL,
        time TEXT NOT NULL,
        PRIMARY KEY (version, task, answering)
    ) STRICT, WITHOUT ROWID
"""
"""Of no format of its own: an older release that finds it goes on as if it were not there."""

_UNFINISHED = [state.value for state in TaskState if not state.ended]


class TaskRecords:
    """The records of one store. Safe for many threads of one process."""

    def __init__(self, folder: Path) -> None:
        """Open the records in ``folder``, made if there are none.

        Raises:
            StoreFormatError: a newer release wrote them.
            DamagedError: the file is not what SQLite wrote.
        """
        self._path = folder / FILE
        self._lock = threading.Lock()
        with self._translated():
            self._connection = sqlite3.connect(
                self._path, isolation_level=None, check_same_thread=False
            )
        try:
            self._prepare()
        except BaseException:
            self._connection.close()
            raise

    def _prepare(self) -> None:
        with self._translated():
            self._connection.execute("PRAGMA journal_mode = WAL")
            # In WAL mode only FULL makes a commit outlive a power cut.
            self._connection.execute("PRAGMA synchronous = FULL")
            # What is forgotten must not linger in free pages.
            self._connection.execute("PRAGMA secure_delete = ON")
            (number,) = self._connection.execute("PRAGMA user_version").fetchone()
            if number > FORMAT:
                raise StoreFormatError(
                    f"{self._path} has format {number}; this release reads up to {FORMAT}"
                )
            if number < FORMAT:
                self._connection.executescript(_SCHEMA)
            self._connection.execute(_SCORES)

    def close(self) -> None:
        """Close the file; no method may be called afterwards."""
        with self._lock:
            self._connection.close()

    def insert(self, task: Task) -> None:
        """Add the record of a new task, durably.

        Raises:
            LimitExceededError: the disk is full.
            UnavailableError: the disk cannot be used.
        """
        with self._translated():
            failpoints.reach("accept.insert")
        self._execute(
            "INSERT INTO tasks (id, request_id, state, record) VALUES (?, ?, ?, ?)",
            (task.id, task.request_id, task.state.value, _encode(Snapshot(task))),
        )
        failpoints.reach("accept.inserted")

    def delete(self, task: str) -> None:
        """Remove the record of a task that nobody was told of, durably; none is no error.

        Raises:
            LimitExceededError: the disk is full.
            UnavailableError: the disk cannot be used.
        """
        self._execute("DELETE FROM tasks WHERE id = ?", (task,))

    def update(self, snapshot: Snapshot) -> None:
        """Replace the record of a task, durably.

        Raises:
            LimitExceededError: the disk is full.
            UnavailableError: the disk cannot be used.
        """
        with self._translated():
            failpoints.reach("record.update")
        self._execute(
            "UPDATE tasks SET state = ?, record = ? WHERE id = ?",
            (snapshot.task.state.value, _encode(snapshot), snapshot.task.id),
        )
        failpoints.reach("record.updated")

    def get(self, task: str) -> Snapshot:
        """Return the record of a task.

        Raises:
            NotFoundError: there is none.
        """
        rows = self._execute("SELECT record FROM tasks WHERE id = ?", (task,))
        if not rows:
            raise NotFoundError(f"there is no task {task!r}", field="name")
        return self._decode(rows[0][0])

    def states(self) -> list[tuple[str, TaskState]]:
        """Return id and state of every task, in the order of their arrival.

        Raises:
            DamagedError: the file is not what SQLite wrote.
        """
        rows = self._execute("SELECT id, state FROM tasks ORDER BY seq", ())
        try:
            return [(task, TaskState(state)) for task, state in rows]
        except ValueError as error:
            raise DamagedError(f"{self._path} cannot be read: {error}") from error

    def counts(self) -> dict[TaskState, int]:
        """Return how many tasks are in each state that any is in.

        Raises:
            DamagedError: the file is not what SQLite wrote.
        """
        rows = self._execute("SELECT state, COUNT(*) FROM tasks GROUP BY state", ())
        return {TaskState(state): count for state, count in rows}

    def problems(self) -> list[str]:
        """Return what SQLite finds wrong with the file.

        Raises:
            DamagedError: it is not what SQLite wrote.
        """
        rows = self._execute("PRAGMA integrity_check", ())
        return [text for (text,) in rows if text != "ok"]

    def by_request_id(self, request_id: str) -> Task | None:
        """Return the task that was made under ``request_id`` (not ""), or None."""
        rows = self._execute(
            "SELECT record FROM tasks WHERE request_id = ? AND request_id <> ''", (request_id,)
        )
        return self._decode(rows[0][0]).task if rows else None

    def page(self, before: int | None, size: int) -> list[tuple[int, Snapshot]]:
        """Return up to ``size`` tasks, newest first, with the number each has in the order.

        Args:
            before: Only tasks with a smaller number; None for the newest.
            size: Most tasks to return.
        """
        rows = self._execute(
            "SELECT seq, record FROM tasks WHERE seq < ? ORDER BY seq DESC LIMIT ?",
            (2**63 - 1 if before is None else before, size),
        )
        return [(number, self._decode(record)) for number, record in rows]

    def unfinished(self) -> list[Task]:
        """Return the tasks that have not ended, in the order of their arrival."""
        marks = ", ".join("?" * len(_UNFINISHED))
        rows = self._execute(
            f"SELECT record FROM tasks WHERE state IN ({marks}) ORDER BY seq", _UNFINISHED
        )
        return [self._decode(record).task for (record,) in rows]

    def scores(self) -> list[Score]:
        """Return the figures of evaluations, oldest first.

        Raises:
            DamagedError: the file is not what SQLite wrote.
        """
        rows = self._execute(
            "SELECT version, task, images, accuracy, answering, time FROM scores ORDER BY time", ()
        )
        try:
            return [
                Score(version, task, images, share, bool(answering), datetime.fromisoformat(time))
                for version, task, images, share, answering, time in rows
            ]
        except ValueError as error:
            raise DamagedError(f"{self._path} cannot be read: {error}") from error

    def keep_scores(self, scores: Sequence[Score], versions: int) -> None:
        """Replace the figures of an evaluation, and let those of other versions go.

        Args:
            scores: Of each task that was measured.
            versions: Of how many versions figures are kept: those that were evaluated last.

        Raises:
            LimitExceededError: the disk is full.
            UnavailableError: the disk cannot be used.
        """
        rows = [
            (each.version, each.task, each.images, each.accuracy, each.answering, str(each.time))
            for each in scores
        ]
        with self._lock, self._translated(), self._connection as transaction:
            transaction.execute("BEGIN IMMEDIATE")
            transaction.executemany("REPLACE INTO scores VALUES (?, ?, ?, ?, ?, ?)", rows)
            transaction.execute(
                "DELETE FROM scores WHERE version NOT IN "
                "(SELECT version FROM scores GROUP BY version "
                "ORDER BY version = ? DESC, MAX(time) DESC LIMIT ?)",
                # First what is new, also where the clock was set back.
                (scores[-1].version, versions),
            )

    def drop_scores(self, tasks: Collection[str]) -> None:
        """Let the figures of some tasks go; what is left of them in the file, ``scrub`` takes.

        Raises:
            LimitExceededError: the disk is full.
            UnavailableError: the disk cannot be used.
        """
        with self._lock, self._translated(), self._connection as transaction:
            transaction.execute("BEGIN IMMEDIATE")
            transaction.executemany(
                "DELETE FROM scores WHERE task = ?", [(task,) for task in tasks]
            )

    def redact(self, names: Collection[str], task: str) -> None:
        """Take names of classes out of the records of all tasks that have ended, and of ``task``.

        The file holds no copy of them then, but in records of tasks that have not ended: those are
        told to leave them out (``Task.withheld``). Doing it again does no harm.

        Raises:
            LimitExceededError: the disk is full.
            UnavailableError: the disk cannot be used.
        """
        for (number,) in self._execute("SELECT seq FROM tasks", ()):
            # Again where it was written meanwhile, by a task that goes on or ends.
            while not self._redact(number, names, task):
                pass
        self.scrub()

    def scrub(self) -> None:
        """Empty the log of changes, where what was overwritten stays until then.

        Raises:
            UnavailableError: somebody else reads the records, and needs it.
        """
        ((busy, _, _),) = self._execute("PRAGMA wal_checkpoint(TRUNCATE)", ())
        if busy:
            raise UnavailableError("another program reads the task records; retry later")

    def _redact(self, number: int, names: Collection[str], own: str) -> bool:
        """Take names out of one record; return False if it was written meanwhile."""
        ((record,),) = self._execute("SELECT record FROM tasks WHERE seq = ?", (number,))
        try:
            before = self._decode(record)
        except DamagedError as error:
            log.warning("passing over what cannot be read: %s", error)
            return True
        task = before.task
        if task.state.ended or task.id == own:
            after = replace(before, task=task.without_classes(names))
        else:
            after = replace(before, task=task.withholding(names))
        if after == before:
            return True
        changed = self._execute(
            "UPDATE tasks SET record = ? WHERE seq = ? AND record = ? RETURNING seq",
            (_encode(after), number, record),
        )
        return bool(changed)

    def _execute(self, statement: str, values: tuple[object, ...] | list[str]) -> list[Any]:
        with self._lock, self._translated():
            return self._connection.execute(statement, values).fetchall()

    def _decode(self, record: str) -> Snapshot:
        try:
            return _SNAPSHOT.validate_json(record)
        except ValidationError as error:
            raise DamagedError(f"a record in {self._path} cannot be read: {error}") from error

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
                raise LimitExceededError("the server's disk is full; retry later") from error
            raise UnavailableError(f"the task records cannot be used: {error}") from error
        except OSError as error:
            log.warning("the task records cannot be written: %s", error)
            raise durable.shortage(error) or UnavailableError(
                f"the task records cannot be written: {error}"
            ) from error
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.IntegrityError):
                raise
            raise DamagedError(f"{self._path} cannot be read: {error}") from error


def copy(root: Path, folder: Path) -> None:
    """Copy the records of a store: to open those of a server that was killed is to write to them.

    Args:
        root: The store's folder, in which nothing is changed.
        folder: Where the copy goes.

    Raises:
        sqlite3.Error: they cannot be read.
        OSError: likewise.
    """
    path = root / FILE
    if path.with_name(f"{path.name}-shm").exists():
        # A server may be writing, and SQLite knows what belongs together.
        with (
            contextlib.closing(
                sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
            ) as source,
            contextlib.closing(sqlite3.connect(folder / path.name)) as copied,
        ):
            source.backup(copied)
        return
    for name in (path.name, f"{path.name}-wal"):
        if (root / name).exists():
            shutil.copyfile(root / name, folder / name)


def _encode(snapshot: Snapshot) -> str:
    return _SNAPSHOT.dump_json(snapshot).decode()
