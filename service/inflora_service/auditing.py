"""What a server writes into the audit log, and when; see ``inflora_core.audit``."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection, Iterator

from inflora_core.audit import MOVES, SERVER, UNKNOWN, AuditLog, Entry, Event
from inflora_core.errors import DamagedError, InfloraError, NotFoundError
from inflora_core.model import Task, TaskKind, TaskState, Version
from inflora_core.store import Store
from inflora_service.aio import unbroken
from inflora_service.records import TaskRecords

log = logging.getLogger(__name__)

RETRY_SECONDS = 2.0
"""Between attempts to write an entry that the disk does not take."""

ENDINGS = {
    TaskState.PUBLISHED: Event.PUBLISHED,
    TaskState.FAILED: Event.FAILED,
    TaskState.CANCELLED: Event.CANCELLED,
    TaskState.HELD_BACK: Event.HELD_BACK,
    TaskState.SET_ASIDE: Event.SET_ASIDE,
}
"""What the log calls the end of a task."""


class AuditTrail:
    """Reports what happens, each step once it is durable and before anyone is told.

    Args:
        audit: Where to.
        store: What is reported on.
        records: Likewise.
    """

    def __init__(self, audit: AuditLog, store: Store, records: TaskRecords) -> None:
        self._audit = audit
        self._store = store
        self._records = records
        self.history = audit.reading.history
        self.was_current = list(self.history.current)
        """Versions that were current at some time, in that order."""
        self._retired = set(self.history.retired)
        self._forgotten = set(self.history.forgotten)
        self._purged = set(self.history.purged)
        # What the disk did not take at the start: it comes before anything else.
        self._backlog: list[Entry] = []
        self._turn = asyncio.Lock()
        self.lost_tasks: frozenset[str] = frozenset()
        """Tasks that were accepted and have not ended, and have no record."""

    async def begin(self) -> None:
        """Add what a crash kept out of the log, and that a server starts.

        A disk that takes nothing does not keep the server from answering: the entries go first
        when it does.
        """
        missing = await asyncio.to_thread(self._missing)
        for entry in missing:
            if entry.event in MOVES and entry.version_to is not None:
                self.was_current.append(entry.version_to)
            elif entry.event == Event.RETIRED and entry.version_to is not None:
                self._retired.add(entry.version_to)
        self._backlog = [*missing, Entry(Event.STARTED, SERVER)]
        try:
            await self._append()
        except InfloraError as error:
            log.warning("the start is not in the audit log yet: %s", error)
        self.note_head()

    def note_head(self) -> None:
        """Write the log's head to the server's own log, where it shows what is cut off later."""
        log.info("audit log: %d entries, the last has sha256 %s", *self._audit.head)

    async def accepted(self, task: Task) -> None:
        """Report a task that is durable, and that nobody was told of.

        Raises:
            InfloraError: the disk does not take it. The task has to be withdrawn.
        """
        await self._append(_acceptance(task))

    async def ended(self, task: Task, who: str) -> None:
        """Report a task whose end is durable."""
        await self._write(lambda: self._ending(task, who))

    async def retried(self, task: Task, who: str) -> None:
        """Report that a task that was set aside is in the queue again."""
        await self._write(lambda: _retrial(task, who))

    async def moved(self, version: Version, who: str) -> None:
        """Report that a version is current, and not any more what was by the last report.

        Args:
            version: The version.
            who: Who asked for it.
        """
        before = self.was_current[-1] if self.was_current else None
        await self._write(lambda: self._move(before, version.number, who))
        self.was_current.append(version.number)

    async def pinned(self, number: int, who: str) -> None:
        """Report that a version is pinned."""
        await self._write(lambda: Entry(Event.PINNED, who, version_to=number))

    async def unpinned(self, number: int, who: str) -> None:
        """Report that a version is going to be unpinned: a pin that is in the log is not lost."""
        await self._write(lambda: Entry(Event.UNPINNED, who, version_to=number))

    async def retired(self, number: int) -> None:
        """Report that the data of a version are deleted, once."""
        if number not in self._retired:
            await self._write(lambda: Entry(Event.RETIRED, SERVER, version_to=number))
            self._retired.add(number)

    async def forgotten(self, version: Version) -> None:
        """Report that what a version forgets is forgotten."""
        await self._once(Event.FORGOTTEN, version, self._forgotten)

    async def purged(self, version: Version) -> None:
        """Report that the data of what a version forgets are deleted."""
        await self._once(Event.PURGED, version, self._purged)

    async def fell_back(self, current: int, version: int, reason: str) -> None:
        """Report that a version answers in place of the current one, which is damaged."""
        entry = Entry(
            Event.FELL_BACK, SERVER, version_from=current, version_to=version, reason=reason
        )
        await self._write(lambda: entry)

    async def _once(self, event: Event, version: Version, known: set[str]) -> None:
        keys = [key for key in version.forgets if key not in known]
        if keys:
            entry = Entry(
                event,
                SERVER,
                task=version.task,
                version_to=version.number,
                classes=tuple(keys),
            )
            await self._write(lambda: entry)
            known.update(keys)

    async def _write(self, make: Callable[[], Entry]) -> None:
        """Make and append an entry, as often as it takes: what it reports is done already."""
        while True:
            try:
                return await self._append(await asyncio.to_thread(make))
            except (InfloraError, OSError, MemoryError) as error:
                log.warning("cannot write to the audit log, trying on: %s", error)
                await asyncio.sleep(RETRY_SECONDS)

    async def _append(self, *entries: Entry) -> None:
        def append() -> None:
            self._audit.append(*self._backlog, *entries)
            self._backlog.clear()

        async with self._turn:
            await unbroken(asyncio.to_thread(append))

    # -- from the store -----------------------------------------------------------------------

    def _missing(self) -> list[Entry]:
        """Return the entries of what is durable and not in the log, in an order that fits."""
        known, entries = self.history, []
        recorded = dict(self._records.states())
        for task_id, state in recorded.items():
            new = task_id not in known.accepted
            aside = state is TaskState.SET_ASIDE
            over = state.ended and task_id not in (known.set_aside if aside else known.ended)
            again = not state.ended and task_id in known.set_aside
            if new or over or again:
                try:
                    task = self._records.get(task_id).task
                except DamagedError as error:
                    log.warning("passing over task %s: %s", task_id, error)
                    continue
                if new:
                    entries.append(_acceptance(task, recovered=True))
                if again:
                    entries.append(_retrial(task, UNKNOWN, recovered=True))
                if over:
                    who = UNKNOWN if state is TaskState.CANCELLED else SERVER
                    entries.append(self._ending(task, who, recovered=True))
        self.lost_tasks = known.accepted - known.ended - recorded.keys()
        for task_id in sorted(self.lost_tasks):
            log.critical("task %s was accepted, and its record is lost", task_id)
        forgotten = self._store.forgotten()
        entries += self._keys(Event.FORGOTTEN, forgotten.keys, self._forgotten)
        if not self._store.unpurged():
            entries += self._keys(Event.PURGED, forgotten.purged, self._purged)
        entries += self._unreported_marks()
        entries += self._unreported_move(recorded)
        if entries:
            log.warning("%d events are added to the audit log", len(entries))
        return entries

    def _keys(self, event: Event, found: Collection[str], known: set[str]) -> list[Entry]:
        keys = tuple(sorted(set(found) - known))
        known.update(keys)
        return [Entry(event, UNKNOWN, classes=keys, recovered=True)] if keys else []

    def _unreported_marks(self) -> Iterator[Entry]:
        pinned, retired = self._store.marked()
        for event, numbers in (
            (Event.PINNED, pinned - self.history.pinned),
            (Event.RETIRED, retired - self.history.retired),
        ):
            for number in sorted(numbers):
                yield Entry(event, UNKNOWN, version_to=number, recovered=True)

    def _unreported_move(self, recorded: dict[str, TaskState]) -> list[Entry]:
        last = self.history.current[-1] if self.history.current else None
        try:
            current = self._store.current()
            if current is None or current == last:
                return []
            task = self._store.manifest(current).task
        except (DamagedError, NotFoundError):
            return []
        # A task that is being published moves it; else somebody asked for it.
        state = recorded.get(task)
        who = SERVER if state is not None and not state.ended else UNKNOWN
        return [self._move(last, current, who, recovered=True)]

    def _ending(self, task: Task, who: str, *, recovered: bool = False) -> Entry:
        parent = None
        if task.version is not None:
            with contextlib.suppress(DamagedError, NotFoundError):
                parent = self._store.manifest(task.version).parent
        return Entry(
            ENDINGS[task.state],
            who,
            task=task.id,
            data_sha256=_data(task),
            version_from=parent,
            version_to=task.version,
            reason=task.failure.reason if task.failure else "",
            recovered=recovered,
        )

    def _move(self, before: int | None, after: int, who: str, *, recovered: bool = False) -> Entry:
        onward = before is None or before in self._store.ancestors(after, self.history.parents)
        event = Event.PROMOTED if onward else Event.ROLLED_BACK
        return Entry(event, who, version_from=before, version_to=after, recovered=recovered)


def _acceptance(task: Task, *, recovered: bool = False) -> Entry:
    return Entry(
        Event.ACCEPTED,
        task.who or UNKNOWN,
        task=task.id,
        data_sha256=_data(task),
        recovered=recovered,
    )


def _retrial(task: Task, who: str, *, recovered: bool = False) -> Entry:
    return Entry(Event.RETRIED, who, task=task.id, recovered=recovered)


def _data(task: Task) -> str:
    """Return the hash of what was taught; of a few names it would soon be guessed what they are."""
    return task.content_sha256 if task.kind is TaskKind.LEARN else ""
