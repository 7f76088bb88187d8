"""What versions say of their past, read once each: manifests hold whole class tables."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from datetime import datetime

from inflora_core.model import TaskReport, Version, VersionState
from inflora_core.store import Store


@dataclass(frozen=True)
class Step:
    """A version, as much of it as is told of it later.

    Attributes:
        number: Its number.
        parent: That of the version it was made from; None for the first.
        task: The task that made it.
        create_time: When that was.
        labels: Of the classes that the task taught first, without forgotten ones.
        classes: How many classes it knows.
        report: What the task was learned with; None where only the class table was changed.
        purged: Whether its data were deleted with a class that it knew.
        forgotten: Whether the task taught classes first, and all of them are forgotten.
    """

    number: int
    parent: int | None
    task: str
    create_time: datetime
    labels: tuple[str, ...]
    classes: int
    report: TaskReport | None
    purged: bool
    forgotten: bool = False

    @classmethod
    def of(cls, version: Version, *, forgotten: bool) -> Step:
        """Return what is told of a version.

        Args:
            version: As the store has it now.
            forgotten: As above.
        """
        return cls(
            version.number,
            version.parent,
            version.task,
            version.create_time,
            tuple(entry.label for entry in version.classes if entry.task == version.task),
            len(version.classes),
            version.report,
            version.state is VersionState.PURGED,
            forgotten,
        )

    @property
    def candidate(self) -> bool:
        """Whether the publish gate held it back."""
        return self.report is not None and bool(self.report.failed_checks)


class Lineage:
    """Which version came of which. Safe for many threads.

    Args:
        store: Where versions are.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[int, Step] = {}
        self._forgotten = b""
        self._reading = threading.Lock()

    def step(self, number: int) -> Step:
        """Return what is told of version ``number``.

        Raises:
            NotFoundError: there is no such version.
            DamagedError: its manifest, or the list of forgotten classes, cannot be read.
        """
        with self._reading:
            self._refresh()
            return self._step(number)

    def of(self, number: int) -> list[Step]:
        """Return what version ``number`` came of, the first version first, and itself.

        Raises:
            NotFoundError, DamagedError: as ``step``.
        """
        steps = []
        with self._reading:
            self._refresh()
            following: int | None = number
            while following is not None:
                steps.append(self._step(following))
                following = steps[-1].parent
        return steps[::-1]

    def _refresh(self) -> None:
        """Let go of what has names of classes that were forgotten since."""
        forgotten = self._store.forgotten_list()
        if forgotten != self._forgotten:
            self._known.clear()
            self._forgotten = forgotten

    def _step(self, number: int) -> Step:
        if number not in self._known:
            version = self._store.version(number)
            taught = any(entry.task == version.task for entry in version.classes)
            # Only where nothing is left the whole table is read, too.
            forgotten = not taught and any(
                entry.task == version.task for entry in self._store.manifest(number).classes
            )
            self._known[number] = Step.of(version, forgotten=forgotten)
        return self._known[number]
