"""Where the examples of tasks are, and how long they are kept.

    spool/{task}/       of uploads, and of tasks that have not ended
    examples/{task}/    of tasks that have ended, where they are to be kept

Both are spools (``inflora_core.spool``). All methods block.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Collection, Iterable
from enum import Enum, auto
from pathlib import Path
from typing import Literal

from inflora_core import durable, failpoints
from inflora_core.errors import DamagedError
from inflora_core.model import MARK, Task, TaskState, Version, positions_by_label
from inflora_core.spool import read_labels
from inflora_service.names import is_task_id

log = logging.getLogger(__name__)

KeepExamples = Literal["never", "until-promoted", "always"]
"""How long examples are kept once their task has ended. Its version is promoted at once, unless the
publish gate held it back: until somebody promotes it all the same, or it is retired or purged."""


class Fate(Enum):
    """What becomes of a task's examples."""

    STAY = auto()
    """They stay in the spool."""
    GO = auto()
    """They are deleted."""
    KEEP = auto()
    """They are moved out of the spool, and kept."""


def fate(task: Task, keep: KeepExamples) -> Fate:
    """Return what becomes of a task's examples, by the state that it is in.

    The one place that decides.
    """
    if not task.state.ended:
        return Fate.STAY
    if MARK in task.labels:
        return Fate.GO  # a class of it was purged while it waited
    if task.state is TaskState.SET_ASIDE:
        return Fate.STAY  # it can be tried again
    kept = keep == "always" or (keep == "until-promoted" and task.state is TaskState.HELD_BACK)
    return Fate.KEEP if kept else Fate.GO


class Examples:
    """The examples of one store.

    Args:
        root: The store's folder.
        keep: How long they are kept.
    """

    def __init__(self, root: Path, keep: KeepExamples) -> None:
        self.spools = root / "spool"
        self._kept = root / "examples"
        self._keep = keep

    def open(self) -> None:
        """Make the folders, and say in the log what is kept."""
        durable.make_folder(self.spools)
        if self._keep != "never":
            durable.make_folder(self._kept)
        if kept := self.kept():
            log.info("the examples of %d tasks are kept in %s", len(kept), self._kept)

    def spooled(self) -> list[str]:
        """Return the ids of all tasks, or uploads, that have a spool.

        What is named otherwise is nobody's, and left to its operator.
        """
        return [folder.name for folder in self.spools.iterdir() if is_task_id(folder.name)]

    def kept(self) -> list[str]:
        """Return the ids of the tasks whose examples are kept."""
        if not self._kept.exists():
            return []
        return sorted(folder.name for folder in self._kept.iterdir())

    def settle(self, task: Task, *, insist: bool = False) -> None:
        """Do with a task's spool what is to be done in its state; again, it does no harm.

        Args:
            task: The task.
            insist: Raise the ``OSError`` where it cannot be deleted now.
        """
        decided = fate(task, self._keep)
        if decided is Fate.GO:
            self.remove(task.id, insist=insist)
        elif decided is Fate.KEEP and (self.spools / task.id).exists():
            try:
                failpoints.reach("examples.move")
                durable.move(self.spools / task.id, self._kept / task.id)
                failpoints.reach("examples.moved")
            except OSError as error:
                log.warning("the examples of task %s cannot be kept yet: %s", task.id, error)

    def remove(self, spool: str, *, insist: bool = False) -> None:
        """Delete a spool; what cannot be deleted now stays until it is asked for again.

        Args:
            spool: Its name.
            insist: Raise the ``OSError`` where it cannot be deleted now.
        """
        try:
            failpoints.reach("spool.delete")
            shutil.rmtree(self.spools / spool)
            failpoints.reach("spool.deleted")
        except FileNotFoundError:
            pass
        except OSError as error:
            if insist:
                raise
            log.warning("the spool %s stays for now: %s", spool, error)

    def release(self, wanted: Callable[[str], bool]) -> None:
        """Delete kept examples that were kept until their version is promoted.

        Args:
            wanted: Whether a task's version may still be promoted for the first time.

        Raises:
            OSError: not all could be deleted: to be done again.
        """
        if self._keep == "until-promoted":
            for task in self.kept():
                if not wanted(task):
                    self._delete(task)

    def purge(
        self, keys: Collection[str], names: Collection[str], versions: Iterable[Version]
    ) -> None:
        """Delete the kept examples of all tasks that taught one of these classes.

        What a task meant by a label, the class table of its version says. Where that does not, it
        goes by the name alone, and rather deletes too much.

        Args:
            keys: Of the classes.
            names: What else they are called.
            versions: All, with what is forgotten in them.

        Raises:
            OSError: not all could be deleted: to be done again.
        """
        unclear, wanted = set(self.kept()), set(names)
        for version in versions:
            wanted.update(*(entry.names for entry in version.classes if entry.key in keys))
            if version.task in unclear:
                labels, positions = self._labels(version.task), positions_by_label(version.classes)
                if labels and positions.keys() >= labels:
                    unclear.remove(version.task)
                    if any(version.classes[positions[label]].key in keys for label in labels):
                        self._delete(version.task)
        for task in unclear:
            if not (labels := self._labels(task)) or labels & wanted:
                self._delete(task)

    def _labels(self, task: str) -> set[str]:
        """Return the labels of kept examples; none if they cannot be read."""
        try:
            return set(read_labels(self._kept / task))
        except DamagedError as error:
            log.warning("nobody can say what the examples of task %s are of: %s", task, error)
            return set()

    def _delete(self, task: str) -> None:
        failpoints.reach("examples.delete")
        shutil.rmtree(self._kept / task)
        durable.sync_folder(self._kept)
        failpoints.reach("examples.deleted")
        log.info("the examples of task %s are deleted", task)
