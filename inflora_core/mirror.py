"""What a learner does to a shared store: claims it, and has it be as its own is. No torch."""

from __future__ import annotations

import hashlib
import logging
import platform
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from inflora_core import durable
from inflora_core.errors import DamagedError, StateError
from inflora_core.model import now
from inflora_core.replica import Replica
from inflora_core.shared import Index, IndexedVersion, Root, Seen, SharedStore, dump_index
from inflora_core.store import Store

log = logging.getLogger(__name__)

FILE = "LEARNER"
"""Holds the id that the learner of a store has in shared stores."""

_SOURCE = "backbone-source.json"
_FETCHING = "FETCHING"
"""Is there as long as a learner that takes over has not fetched everything."""


def learner_id(root: Path) -> str:
    """Return the id of the learner of a store, made now if it has none."""
    path = root / FILE
    if not path.exists():
        durable.replace(path, f"{uuid.uuid4().hex}\n".encode())
    return path.read_text().strip()


def claim(store: Store, shared: SharedStore, *, take_over: bool = False) -> Mirror:
    """Become the one learner that publishes to a shared store, and have what was published.

    Args:
        store: The learner's own. If it is new, and takes another's place, it gets all that the
            shared one has.
        shared: Where to publish.
        take_over: Whether to take the place of another learner, which cannot publish any more then.

    Raises:
        FencedError: another learner publishes there.
        StateError: the shared store has versions that the learner's own lacks.
        UnavailableError: the shared store cannot be reached.
        DamagedError: something in it is damaged.
    """
    writer, seen = learner_id(store.root), shared.root()
    if seen is None:
        first = Index()
        root = Root(writer, platform.node(), 1, 0, None, shared.put(dump_index(first)), now())
        return Mirror(store, shared, shared.move(root, None), first)
    if seen.root.writer != writer and not take_over:
        raise shared.fenced(seen)
    index = shared.index(seen.root)
    fetching = store.root / _FETCHING
    missing = sorted(set(index.versions) - set(store.numbers()))
    if missing or fetching.exists():
        if store.has_backbone() and not fetching.exists():
            raise StateError(
                f"the shared store {shared.url} has version {missing[0]}, which {store.root} lacks:"
                " that is of an older backup, or of another learner; begin with an empty folder, "
                "and --take-over"
            )
        log.info("fetching %d versions from %s", len(index.versions), shared.url)
        durable.replace(fetching, b"")
        copy = Replica.into(shared, store.root)
        copy.take_all(index)
        if seen.root.current is not None:
            copy.set_current(seen.root.current)
        fetching.unlink()
        durable.sync_folder(store.root)
    root = replace(
        seen.root,
        writer=writer,
        host=platform.node(),
        epoch=seen.root.epoch + 1,
        serial=seen.root.serial + 1,
        time=now(),
    )
    if seen.root.writer != writer:
        log.warning("taking the place of learner %s on %s", seen.root.writer, seen.root.host)
    return Mirror(store, shared, shared.move(root, seen), index)


@dataclass
class Mirror:
    """Keeps a shared store as a learner's own is. Not safe for several threads.

    Attributes:
        store: The learner's own.
        shared: The other.
        seen: What is published.
        index: What that names.
    """

    store: Store
    shared: SharedStore
    seen: Seen
    index: Index
    _tried: tuple[Root, Index] | None = None
    """What may be published, for all that is known: no answer came."""

    def sweep(self) -> None:
        """Delete what nothing names: what a learner left that was ended while it published.

        Raises:
            UnavailableError: the shared store cannot be reached.
        """
        self.shared.delete(self.shared.names() - self.index.objects() - {self.seen.root.index})

    def publish(self) -> bool:
        """Have the shared store be as the learner's own is; return whether it was not.

        It can be called again, should it fail.

        Raises:
            FencedError: another learner has taken over.
            UnavailableError: the shared store cannot be reached.
            DamagedError: something of the own store cannot be read.
            OSError: likewise.
        """
        if self._tried is not None and (now_there := self.shared.root()) is not None:
            if now_there.root == self._tried[0]:
                self.seen, self.index = now_there, self._tried[1]
            self._tried = None
        # First, so that a version that is made current meanwhile is among those that are read next.
        current = self.store.current()
        there = self.index.objects()
        index = replace(
            self._backbone(there),
            forgotten=self._put(self.store.forgotten_list(), there),
            versions=dict(self._versions(there)),
        )
        if current is not None and current not in index.versions:
            raise DamagedError(f"version {current} is current, and cannot be read")
        before = self.seen.root
        if index == self.index and current == before.current:
            return False
        name = self.shared.put(dump_index(index))
        root = replace(before, serial=before.serial + 1, current=current, index=name, time=now())
        wanted = index.objects() | {name}
        unwanted = (there | {before.index}) - wanted
        self._tried = root, index
        self.seen, self.index = self.shared.move(root, self.seen), index
        self._tried = None
        # What an attempt that failed has put, and what it has not deleted, goes at the next start.
        self.shared.delete(unwanted)
        return True

    def _backbone(self, there: set[str]) -> Index:
        """Return an index of the backbone alone."""
        if not self.store.has_backbone():
            return Index()
        name, paths = self.store.stored_backbone()
        files = self.index.backbone_files if name == self.index.backbone else {}
        source = self.store.root / _SOURCE
        return Index(
            backbone=name,
            backbone_files=files or {key: self._put(paths[key], there) for key in paths},
            source=self._put(source.read_bytes(), there) if source.exists() else "",
        )

    def _versions(self, there: set[str]) -> Iterator[tuple[int, IndexedVersion]]:
        for version in self.store.stored_versions():
            files = {}
            for entry, path in version.files:
                try:
                    files[entry.name] = self._put(path, there, entry.sha256)
                except (DamagedError, FileNotFoundError) as error:
                    log.warning("not published: %s", error)
            yield (
                version.number,
                IndexedVersion(
                    self._put(version.manifest, there), files, version.pinned, version.retired
                ),
            )

    def _put(self, content: bytes | Path, there: set[str], sha256: str = "") -> str:
        """Put a file unless it is there; return its name."""
        if sha256 in there:
            return sha256
        found = _sha256(content)
        if sha256 and found != sha256:
            raise DamagedError(f"{content!s} does not have the checksum in its manifest")
        return found if found in there else self.shared.put(content, found)


def _sha256(content: bytes | Path) -> str:
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with content.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
