"""``python -m inflora_service.doctor STORE``: checks a store, and repairs what can be repaired.

The server must be stopped. Needs neither torch nor onnxruntime. What is found has a severity:
DAMAGE is what a server cannot do without, or what shows that something was lost; a WARNING is what
is left over, or what the next start puts in order; a NOTE is no fault.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from pathlib import Path

from inflora_core import audit, canary, durable
from inflora_core.audit import AuditLog, Entry, Event, History
from inflora_core.errors import (
    DamagedError,
    InfloraError,
    NotFoundError,
    StateError,
    UnavailableError,
)
from inflora_core.model import Forget, Task, TaskKind, TaskState, Version
from inflora_core.spool import ORIGIN, check_spool
from inflora_core.store import MODEL, ONNX_FILE, Forgotten, Store
from inflora_service import backbone_source, records
from inflora_service.examples import Fate, fate
from inflora_service.records import TaskRecords, task_content
from inflora_service.store_lock import StoreLock

log = logging.getLogger(__name__)

WHO = "doctor"
"""Who repaired something, in the audit log."""

SOUND, DAMAGED, CANNOT_LOOK = 0, 1, 2
"""Exit statuses."""

_KEY = re.compile(rb'"([^"\s]+\.\d+)"')
"""A class's key in a damaged list of forgotten classes."""
_SUM = re.compile(rb"([0-9a-f]{64}  manifest\.json\n){1,2}")
_ROUNDS = 5
"""Of repairs: one can make another possible."""


class Severity(StrEnum):
    """How bad it is."""

    NOTE = "note"
    WARNING = "warning"
    DAMAGE = "damage"


@dataclass(frozen=True)
class Finding:
    """Something about a store that is not as it should be.

    Attributes:
        severity: How bad it is.
        path: The file or folder at fault, relative to the store.
        problem: What is wrong with it.
        remedy: What can be done.
        repair: Puts it right, if that can be done here.
    """

    severity: Severity
    path: str
    problem: str
    remedy: str
    repair: Callable[[], object] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Diagnosis:
    """What was found, and what of it is repaired."""

    found: tuple[Finding, ...]
    repaired: tuple[Finding, ...] = ()

    @property
    def sound(self) -> bool:
        """Whether no damage is left."""
        return not any(finding.severity is Severity.DAMAGE for finding in self.found)


def examine(root: Path, *, repair: bool = False, read_only: bool = False) -> Diagnosis:
    """Check the store in folder ``root``.

    Args:
        root: The store.
        repair: Repair what can be repaired, and check again.
        read_only: Look without the lock, and write nothing: a server may be at work, so what it
            may be about to finish is no more than a note.

    Raises:
        NotFoundError: there is no store.
        StoreFormatError: another release wrote it.
        UnavailableError: a server uses it, or it cannot be read.
        OSError: what was repaired cannot be entered in the audit log.
    """
    if not (root / "models").is_dir():
        Store.existing(root)
        raise NotFoundError(f"{root} is not a store, or nothing is left of it")
    with ExitStack() as stack:
        if not read_only:
            stack.callback(StoreLock(root).release)
        found = tuple(_Examination(root, settled=not read_only).findings())
        repaired: list[Finding] = []
        for _ in range(_ROUNDS if repair else 0):
            tried = [_repaired(finding) for finding in found]
            if not any(tried):
                break
            after = tuple(_Examination(root, settled=True).findings())
            repaired += [finding for finding in found if finding not in after]
            found = after
        if repaired:
            AuditLog(root).append(Entry(Event.REPAIRED, WHO))
        return Diagnosis(found, tuple(repaired))


def _repaired(finding: Finding) -> bool:
    """Try to repair something; return whether anything was done."""
    if finding.repair is None:
        return False
    try:
        finding.repair()
    except (InfloraError, OSError) as error:
        log.warning("%s cannot be repaired: %s", finding.path, error)
        return False
    return True


class _Examination:
    """One look at a store.

    Args:
        root: The store.
        settled: Whether no server is at work, so that what is half done stays so.
    """

    def __init__(self, root: Path, *, settled: bool) -> None:
        self._root = root
        self._settled = settled
        self._store = Store(root)
        self._model = root / "models" / MODEL
        self._numbers: list[int] = []
        self._manifests: dict[int, Version] = {}
        self._unreadable: dict[int, DamagedError] = {}
        self._forgotten: Forgotten | None = None
        self._tasks: dict[str, Task] | None = None
        self._states: dict[str, TaskState] = {}
        self._reading = audit.Reading()
        self._history = History.of(())

    def findings(self) -> Iterator[Finding]:
        """Yield what is found; what can be repaired first comes first."""
        try:
            Store.existing(self._root)
            known = True
        except (DamagedError, NotFoundError) as error:
            known = False
            yield _damage(
                "FORMAT",
                error.message,
                "write it again, as any store of the same release has it; until then nothing else "
                "is repaired",
            )
        for finding in self._all():
            # In a store of who knows which format nothing may be touched.
            yield finding if known else _unrepairable(finding)

    def _all(self) -> Iterator[Finding]:
        yield from self._audit()
        self._read_manifests()
        yield from self._lost_log()
        yield from self._records()
        yield from self._backbone()
        yield from self._forgotten_classes()
        yield from self._versions()
        yield from self._marks()
        yield from self._current()
        yield from self._published()
        yield from self._spools()
        yield from self._kept_examples()
        yield from self._canaries()
        yield from self._leftovers()

    # -- the audit log ------------------------------------------------------------------------

    def _audit(self) -> Iterator[Finding]:
        try:
            self._reading = audit.verify(self._root)
        except OSError as error:
            yield _damage(audit.FILE, f"it cannot be read: {error}", "restore it from a backup")
            return
        self._history = self._reading.history
        for fault in self._reading.faults:
            yield _damage(
                audit.FILE,
                f"line {fault.line}: {fault.problem}",
                "compare it with a backup; to begin a new log, move it away, and keep it",
            )
        if self._reading.torn:
            yield self._unsettled(
                audit.FILE,
                f"its last {self._reading.torn} bytes are no whole line, as a power cut leaves it",
                "they can be set aside; what they said is added at the next start",
                lambda: _open_log(self._root),
            )

    def _lost_log(self) -> Iterator[Finding]:
        # Records would miss it, too: but they may be lost with it.
        # Repairs and starts alone are no history: what they follow is gone.
        if self._numbers and not (self._history.accepted or self._history.parents):
            yield _damage(
                audit.FILE,
                f"there are {len(self._numbers)} versions, and not a line about them",
                "restore it from a backup; the next start begins a new one with what records say",
            )

    # -- records ------------------------------------------------------------------------------

    def _records(self) -> Iterator[Finding]:
        remedy = "restore it from a backup; versions do not need it"
        path = records.FILE
        if not (self._root / path).exists():
            if self._history.accepted or self._manifests:
                yield _damage(path, "it is lost, and with it what became of which task", remedy)
                self._states, self._tasks = {}, None
            else:
                self._tasks = {}
            return
        with tempfile.TemporaryDirectory() as folder:
            try:
                yield from self._read_records(Path(folder), remedy)
            except (InfloraError, sqlite3.Error, OSError) as error:
                self._tasks = None
                problem = str(error).replace(folder, str(self._root))
                yield _damage(path, f"it cannot be read: {problem}", remedy)
                return
        if self._tasks is None:
            return
        lost = sorted(self._history.accepted - self._states.keys())
        for task in lost:
            yield _damage(path, f"task {task} was accepted, and has no record", remedy)
        for task, state in self._states.items():
            if task in self._history.ended and not state.ended:
                yield _damage(path, f"task {task} has ended, and its record is older", remedy)
        known = self._history
        missing = [task for task in self._states if task not in known.accepted]
        missing += [
            task
            for task, state in self._states.items()
            if state.ended
            and task not in (known.set_aside if state is TaskState.SET_ASIDE else known.ended)
        ]
        if missing:
            yield self._unsettled(
                audit.FILE,
                f"it lacks what became of {len(set(missing))} tasks",
                "the next start adds it, unless somebody cut it off: compare it with a backup",
            )
        if lost:
            self._tasks = None  # nothing may be taken for dangling

    def _read_records(self, copies: Path, remedy: str) -> Iterator[Finding]:
        records.copy(self._root, copies)
        reader = TaskRecords(copies)
        try:
            for problem in reader.problems():
                yield _damage(records.FILE, problem, remedy)
            self._states = dict(reader.states())
            tasks: dict[str, Task] | None = {}
            for name, state in self._states.items():
                try:
                    task = reader.get(name).task
                except DamagedError:
                    yield _damage(records.FILE, f"the record of task {name} is damaged", remedy)
                    tasks = None
                    continue
                if (task.id, task.state) != (name, state):
                    yield _damage(records.FILE, f"the record of task {name} is another's", remedy)
                if tasks is not None:
                    tasks[name] = task
            self._tasks = tasks
        finally:
            reader.close()

    # -- the backbone -------------------------------------------------------------------------

    def _backbone(self) -> Iterator[Finding]:
        pointer = self._model / "backbone"
        named = {version.backbone for version in self._manifests.values()}
        if not pointer.exists() and not named:
            yield _note(_relative(pointer, self._root), "there is none yet", "start a server")
            return
        try:
            written = pointer.read_bytes().decode(errors="replace").strip()
        except FileNotFoundError:
            written = ""
        name = next(iter(named)) if len(named) == 1 else written
        folder = self._root / "backbones" / name
        if written != name:
            yield _damage(
                _relative(pointer, self._root),
                "it does not name the backbone that the versions were made with",
                "it can be written again: all of them say which one it is",
                lambda: durable.replace(pointer, f"{name}\n".encode()),
            )
        remedy = f"{_RESTORE}, or from another store with the same backbone"
        try:
            for path, error in self._store.backbone_damage(name):
                yield _damage(_relative(path, self._root), error.message, remedy)
        except (DamagedError, StateError) as error:
            if folder.parent != self._root / "backbones" or not folder.is_dir():
                yield _damage("backbones", error.message, remedy)
            else:
                where = _relative(folder, self._root)
                file, problem = self._bad_manifest(where, error)
                yield _damage(f"{where}/{file}", problem, remedy)
        try:
            backbone_source.read(self._root)
        except DamagedError as error:
            yield _warning(backbone_source.FILE, error.message, "remove it: it is only a note")

    # -- versions -----------------------------------------------------------------------------

    def _read_manifests(self) -> None:
        if (self._model / "versions").is_dir():
            self._numbers = self._store.numbers()
        for number in self._numbers:
            try:
                self._manifests[number] = self._store.manifest(number)
            except DamagedError as error:
                self._unreadable[number] = error

    def _versions(self) -> Iterator[Finding]:
        for number in self._numbers:
            folder = self._folder(number)
            if (error := self._unreadable.get(number)) is not None:
                name, problem = self._bad_manifest(folder, error)
                yield _damage(f"{folder}/{name}", problem, f"{_RESTORE}{self._children(number)}")
                continue
            version = self._manifests[number]
            if version.parent is not None and version.parent not in self._numbers:
                yield _damage(
                    f"{_folder_of(version.parent)}",
                    f"it is lost; version {number} was made from it, and cannot be learned on",
                    _RESTORE,
                )
            yield from self._files(number, version)

    def _marks(self) -> Iterator[Finding]:
        """Compare which versions are pinned or retired with what the audit log says."""
        pinned, retired = self._store.marked()
        gone = self._history.retired | retired
        for number in sorted(self._history.retired - retired):
            if number in self._manifests and not self._store.is_stripped(number):
                yield _note(
                    self._folder(number),
                    "it was retired, by the audit log, and is whole: restored from a backup?",
                    "nothing needs to be done: it can be used",
                )
            elif number in self._manifests:
                yield _damage(
                    self._folder(number),
                    "it was retired, by the audit log, and nothing in it says so",
                    "it can be marked again; the next start does it, too",
                    partial(self._store.retire, number),
                )
        for number in sorted(self._history.pinned - pinned - gone):
            if number in self._manifests:
                yield _damage(
                    self._folder(number),
                    "its pin is lost: the audit log says that it is pinned",
                    "it can be pinned again; the next start does it, too",
                    partial(self._store.pin, number),
                )
        for number in self._store.half_retired():
            yield self._unsettled(
                self._folder(number),
                "its retirement is not finished",
                "it can be finished; the next start does it, too",
                partial(self._store.retire, number),
            )

    def _files(self, number: int, version: Version) -> Iterator[Finding]:
        if self._forgotten is not None:
            version = self._store.version(number)
        damage = dict(self._store.damage(version))
        for entry, error in damage.items():
            path = f"{self._folder(number)}/{entry.name}"
            if entry.name == ONNX_FILE:
                whole = len(damage) == 1 and self._forgotten is not None
                yield _damage(
                    path,
                    error.message,
                    "it can be made again, if all that it is made from is sound",
                    (lambda: self._store.rebuild_onnx(number)) if whole else None,
                )
            else:
                yield _damage(path, error.message, f"{_RESTORE}{self._children(number)}")

    def _bad_manifest(self, folder: str, error: InfloraError) -> tuple[str, str]:
        """Return which file is to blame for a manifest that cannot be read, and why.

        Args:
            folder: Of both files.
            error: What reading it came to.
        """
        for name in ("manifest.json", "manifest.sha256"):
            path = self._root / folder / name
            if not path.is_file():
                return name, "it is lost"
            if name == "manifest.sha256" and not _SUM.fullmatch(path.read_bytes()):
                return name, "it is no checksum"
        return "manifest.json", error.message

    def _children(self, number: int) -> str:
        children = [
            child
            for child in self._numbers
            if number in self._store.ancestors(child, self._history.parents)
        ]
        if not children:
            return ""
        which = ", ".join(map(str, children))
        return f"; until then nothing can be learned on what was made from it: version {which}"

    def _folder(self, number: int) -> str:
        return _folder_of(number)

    # -- what is forgotten --------------------------------------------------------------------

    def _forgotten_classes(self) -> Iterator[Finding]:
        path = self._model / "forgotten.json"
        name = _relative(path, self._root)
        try:
            self._forgotten = self._store.forgotten()
        except DamagedError as error:
            yield _damage(
                name,
                error.message,
                "it can be made again, of manifests, records and the audit log",
                lambda: self._store.recover_forgotten(self._known_forgotten(path)),
            )
            return
        known = self._known_forgotten(None)
        back = sorted(known.keys - self._forgotten.keys)
        whole = sorted(known.purged - self._forgotten.purged)
        if back or whole:
            yield _damage(
                name,
                f"it lacks {len(back)} forgotten and {len(whole)} purged classes",
                "they can be added",
                lambda: self._store.recover_forgotten(
                    Forgotten(
                        known.keys | self._listed().keys, known.purged | self._listed().purged
                    )
                ),
            )
            return
        for number in self._store.unpurged():
            yield self._unsettled(
                self._folder(number),
                "a purge of it is not finished",
                "it can be finished; the next start does it, too",
                lambda: self._store.purge(()),
            )

    def _listed(self) -> Forgotten:
        return self._forgotten or Forgotten()

    def _known_forgotten(self, damaged: Path | None) -> Forgotten:
        """Return what is forgotten, by all that can be read but the list.

        Args:
            damaged: The list, to take from it what can be read, where nothing else is complete. A
                changed key could be another class's: that is forgotten for good rather than have
                one come back that was forgotten.
        """
        keys, purged = set(self._history.forgotten), set(self._history.purged)
        for task in (self._tasks or {}).values():
            version = self._manifests.get(task.version or 0)
            if isinstance(task.edit, Forget) and task.state is TaskState.PUBLISHED and version:
                keys.update(version.forgets)
                if task.edit.purge:
                    purged.update(version.forgets)
        logged = bool(self._reading.lines) and not self._reading.faults and not self._reading.torn
        complete = logged or len(self._manifests) == len(self._numbers)
        if damaged is not None and damaged.is_file() and not complete:
            keys.update(key.decode(errors="replace") for key in _KEY.findall(damaged.read_bytes()))
        return Forgotten(frozenset(keys | purged), frozenset(purged))

    # -- the current version ------------------------------------------------------------------

    def _current(self) -> Iterator[Finding]:
        name = _relative(self._model / "CURRENT", self._root)
        reported = self._history.current[-1] if self._history.current else None
        fault = ""
        try:
            current = self._store.current()
        except (DamagedError, OSError) as error:
            current, fault = None, str(error)
        if current is None and not fault:
            published = any(state is TaskState.PUBLISHED for state in self._states.values())
            if reported is None and not published:
                return
            fault = "it is lost, and with it which version is current"
        elif current is not None and current not in self._numbers:
            fault = f"there is no version {current}"
        elif current is not None and self._is_stripped(current):
            fault = f"the data of version {current} are deleted"
        if fault:
            chosen = self._newest_sound()
            yield _damage(
                name,
                fault,
                f"version {chosen} was current, and is sound" if chosen else "promote a version",
                (lambda: self._set_current(chosen)) if chosen else None,
            )
        elif reported is not None and current != reported:
            yield self._unsettled(
                name,
                f"it names version {current}, and the audit log has {reported}: the server was "
                "killed in between, or it was changed",
                "see which one is right, and promote that",
            )

    def _is_stripped(self, number: int) -> bool:
        try:
            return self._store.version(number).state.stripped
        except DamagedError:
            return False  # which is reported elsewhere

    def _newest_sound(self) -> int | None:
        """Return the version that was current last, of those that can still be."""
        published = [
            task.version
            for task in (self._tasks or {}).values()
            if task.state is TaskState.PUBLISHED and task.version is not None
        ]
        for number in (*reversed(self._history.current), *reversed(published)):
            try:
                version = self._store.version(number)
            except (DamagedError, NotFoundError):
                continue
            usable = not version.state.stripped and version.classes
            if usable and not any(
                entry.name != ONNX_FILE for entry, _ in self._store.damage(version)
            ):
                return number
        return None

    def _set_current(self, number: int) -> None:
        self._store.set_current(number)
        if self._history.current[-1:] != (number,):
            AuditLog(self._root).append(Entry(Event.PROMOTED, WHO, version_to=number))

    # -- what came of tasks -------------------------------------------------------------------

    def _published(self) -> Iterator[Finding]:
        for number in sorted({*self._history.parents, *self._history.current}):
            if number not in self._numbers:
                yield _damage(self._folder(number), "the version is lost", _RESTORE)
        if self._tasks is None:
            return
        yield from self._made_by_tasks(self._tasks)
        for task in self._tasks.values():
            if task.state not in (TaskState.PUBLISHED, TaskState.HELD_BACK):
                continue
            version = self._manifests.get(task.version or 0)
            if task.version not in self._numbers:
                where = self._folder(task.version) if task.version else records.FILE
                yield _damage(where, f"the version of task {task.id} is lost", _RESTORE)
            elif version is not None and version.task != task.id:
                yield _damage(
                    self._folder(version.number),
                    f"task {task.id} made it, by its record, and task {version.task} by its "
                    "manifest",
                    _RESTORE,
                )
        for number, version in self._manifests.items():
            if version.task not in self._states:
                yield _warning(
                    self._folder(number),
                    f"its task {version.task} has no record",
                    "nothing needs to be done: a version does not need one",
                )

    def _made_by_tasks(self, tasks: Mapping[str, Task]) -> Iterator[Finding]:
        """Compare which versions a task made with what its record says."""
        made: dict[str, list[int]] = {}
        for number, version in self._manifests.items():
            made.setdefault(version.task, []).append(number)
        for name, numbers in made.items():
            task = tasks.get(name)
            if len(numbers) > 1:
                yield _damage(
                    self._folder(numbers[-1]),
                    f"versions {', '.join(map(str, numbers))} are all of task {name}",
                    "a task makes one version: remove those that were copied here",
                )
            elif task is not None and task.state.ended and task.version is None:
                yield _warning(
                    self._folder(numbers[0]),
                    f"its task {name} is {task.state}, by its record",
                    "look at the version, and promote it if it is wanted",
                )

    # -- what is under way, or was --------------------------------------------------------------

    def _spools(self) -> Iterator[Finding]:
        spools, tasks = self._root / "spool", self._tasks
        if tasks is None:
            yield from self._anybodys_spools(spools)
            return
        for folder in sorted(spools.iterdir()) if spools.is_dir() else ():
            task = tasks.get(folder.name)
            if task is None and (folder / ORIGIN).exists():
                yield _note(
                    f"spool/{folder.name}",
                    "an upload broke off, and can be continued",
                    "the server removes it when its time is over",
                )
            elif task is None or fate(task, "never") is not Fate.STAY:
                yield self._unsettled(
                    f"spool/{folder.name}",
                    "its task has ended" if task else "no task has these examples",
                    "it can be removed; the next start does it, too",
                    _removing(folder),
                )
        for task in tasks.values():
            if task.kind is TaskKind.LEARN and fate(task, "never") is Fate.STAY:
                yield from self._spool(task, spools / task.id)

    def _anybodys_spools(self, spools: Path) -> Iterator[Finding]:
        """Look at examples of which no record says whose they are."""
        for folder in sorted(spools.iterdir()) if spools.is_dir() else ():
            if (folder / ORIGIN).exists():
                continue  # it broke off, and need not be whole
            try:
                check_spool(folder)
            except DamagedError as error:
                yield _warning(
                    f"spool/{folder.name}",
                    error.message,
                    "nothing says whether a task still needs them: restore the records first",
                )

    def _spool(self, task: Task, folder: Path) -> Iterator[Finding]:
        try:
            summary = check_spool(folder)
        except DamagedError as error:
            problem = error.message
        else:
            content = task_content(task.display_name, task.settings, summary.sha256)
            if content == task.content_sha256:
                return
            problem = "the examples are not those of its task"
        if any(version.task == task.id for version in self._manifests.values()):
            return  # it has a version already, and needs them no more
        yield _damage(
            f"spool/{task.id}",
            problem,
            f"cancel task {task.id}, which would fail, and send its examples again",
        )

    def _kept_examples(self) -> Iterator[Finding]:
        kept = self._root / "examples"
        for folder in sorted(kept.iterdir()) if kept.is_dir() else ():
            where = f"examples/{folder.name}"
            try:
                check_spool(folder)
            except DamagedError as error:
                yield _warning(where, error.message, f"{_RESTORE}, or remove it")
            if self._tasks is not None and folder.name not in self._tasks:
                yield _warning(
                    where, "no task has these examples", "remove them if nobody needs them"
                )

    def _canaries(self) -> Iterator[Finding]:
        forgotten = self._listed().keys
        for key in sorted(canary.keys(self._root)):
            where = f"{canary.FOLDER}/{key}"
            if canary.is_draft(key) or key in forgotten:
                yield self._unsettled(
                    where,
                    "its class is forgotten"
                    if key in forgotten
                    else "it was not written to its end",
                    "it can be removed; the next start does it, too",
                    _removing(self._root / where),
                )
                continue
            try:
                canary.read(self._root, key)
            except DamagedError as error:
                yield _warning(where, error.message, "remove it: its class is not looked at then")

    def _leftovers(self) -> Iterator[Finding]:
        drafts = self._root / "drafts"
        for path in sorted(drafts.iterdir()) if drafts.is_dir() else ():
            yield self._unsettled(
                f"drafts/{path.name}",
                "a version was being written when its writer ended",
                "it can be removed; the next start does it, too",
                _removing(path),
            )
        for path in self._store.half_replaced():
            yield self._unsettled(
                _relative(path, self._root),
                "a file was being replaced when its writer ended",
                "it can be removed; the next start does it, too",
                _removing(path),
            )
        for path in sorted(self._root.glob("audit.torn-*")):
            yield _note(
                path.name,
                "a power cut left it of an entry in the audit log",
                "look at it, and remove it; what it was about is in the log",
            )

    def _unsettled(
        self, path: str, problem: str, remedy: str, repair: Callable[[], object] | None = None
    ) -> Finding:
        """Return what is half done: a fault, unless a server may be at it."""
        severity = Severity.WARNING if self._settled else Severity.NOTE
        return Finding(severity, path, problem, remedy, repair)


_RESTORE = "restore it from a backup"


def _damage(
    path: str, problem: str, remedy: str, repair: Callable[[], object] | None = None
) -> Finding:
    return Finding(Severity.DAMAGE, path, problem, remedy, repair)


def _warning(path: str, problem: str, remedy: str) -> Finding:
    return Finding(Severity.WARNING, path, problem, remedy)


def _note(path: str, problem: str, remedy: str) -> Finding:
    return Finding(Severity.NOTE, path, problem, remedy)


def _unrepairable(finding: Finding) -> Finding:
    return Finding(finding.severity, finding.path, finding.problem, finding.remedy)


def _folder_of(number: int) -> str:
    return f"models/{MODEL}/versions/{number:08d}"


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _open_log(root: Path) -> None:
    AuditLog(root)


def _removing(path: Path) -> Callable[[], None]:
    def remove() -> None:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()

    return remove


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="inflora doctor",
        description="Check a store whose server is stopped.",
        epilog="Exit status: 0 sound, 1 damage is left, 2 the store cannot be looked at. "
        "Example: inflora doctor --repair inflora-store",
    )
    parser.add_argument("store", type=Path, help="folder of the store")
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--repair",
        action="store_true",
        help="repair what can be repaired; nothing that a version needs is removed",
    )
    group.add_argument(
        "--read-only",
        action="store_true",
        help="write nothing, not even the lock: also while a server runs",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _as_json(store: Path, diagnosis: Diagnosis) -> str:
    def fields(finding: Finding) -> dict[str, str]:
        return {name: getattr(finding, name) for name in ("severity", "path", "problem", "remedy")}

    return json.dumps(
        {
            "store": str(store),
            "sound": diagnosis.sound,
            "found": [fields(finding) for finding in diagnosis.found],
            "repaired": [fields(finding) for finding in diagnosis.repaired],
        }
    )


def _as_text(store: Path, diagnosis: Diagnosis) -> str:
    lines = [f"repaired: {each.path}: {each.problem}" for each in diagnosis.repaired]
    lines += [
        f"{each.severity}: {each.path}: {each.problem}\n    {each.remedy}"
        for each in diagnosis.found
    ]
    return "\n".join([*lines, f"{store} is {'sound' if diagnosis.sound else 'damaged'}"])


def main() -> int:
    """Examine a store; return the exit status."""
    arguments = _parser().parse_args()
    logging.basicConfig(level="WARNING", format="%(levelname)s %(name)s: %(message)s")
    # What it says of a store is what it finds, not what else is logged on the way.
    logging.getLogger("inflora_core").setLevel(logging.ERROR)
    try:
        diagnosis = examine(arguments.store, repair=arguments.repair, read_only=arguments.read_only)
    except (InfloraError, OSError) as error:
        hint = "; --read-only looks all the same" if isinstance(error, UnavailableError) else ""
        sys.stderr.write(f"inflora doctor: error: {error}{hint}\n")
        return CANNOT_LOOK
    show = _as_json if arguments.json else _as_text
    # A name on the disk need not be text.
    shown = show(arguments.store, diagnosis).encode(errors="backslashreplace").decode()
    sys.stdout.write(f"{shown}\n")
    return SOUND if diagnosis.sound else DAMAGED


if __name__ == "__main__":
    sys.exit(main())
