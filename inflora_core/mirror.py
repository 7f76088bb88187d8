"""What a learner does to a shared store: claims it, and has it be as its own is. No torch."""

from __future__ import annotations

import json
import logging
import platform
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from inflora_core import durable
from inflora_core.errors import DamagedError, NotFoundError, StateError, UnavailableError
from inflora_core.model import now
from inflora_core.replica import Replica
from inflora_core.shared import (
    Index,
    IndexedVersion,
    Root,
    Seen,
    SharedStore,
    dump_index,
    sha256_of,
)
from inflora_core.store import BACKBONE_SOURCE, ONNX_FILE, Store, StoredVersion

log = logging.getLogger(__name__)

FILE = "LEARNER"
"""Holds the id that the learner of a store has in shared stores, and where it has published."""

FETCHING = "FETCHING"
"""Is there as long as a learner that takes over has not fetched everything."""


def learner_id(root: Path) -> str:
    """Return the id of the learner of a store, made now if it has none."""
    return _identity(root)[0]


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
        UnavailableError: the shared store cannot be reached, or is gone.
        NotFoundError, DamagedError: something in it is.
    """
    (writer, places), seen = _identity(store.root), shared.root()
    if seen is None:
        if shared.url in places:
            # A folder that is not mounted is empty, too: everything would be put below it.
            raise UnavailableError(
                f"the shared store {shared.url} is empty, but this learner has published there: is "
                f"it mounted? Delete {store.root / FILE} to begin anew",
                field="shared",
            )
        first = Index()
        root = Root(writer, platform.node(), 1, 0, None, shared.put(dump_index(first)), now())
        seen = shared.move(root, None)
        _remember(store.root, writer, {*places, shared.url})
        return Mirror(store, shared, seen, first)
    if seen.root.writer != writer and not take_over:
        raise shared.fenced(seen)
    index = _index(shared, seen.root, writer)
    fetching = store.root / FETCHING
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
    seen = shared.move(root, seen)
    _remember(store.root, writer, {*places, shared.url})
    # Only now: whoever was too late to move it has to fetch again.
    fetching.unlink(missing_ok=True)
    durable.sync_folder(store.root)
    return Mirror(store, shared, seen, index)


def _index(shared: SharedStore, root: Root, writer: str) -> Index:
    try:
        return shared.index(root)
    except (NotFoundError, DamagedError) as error:
        if root.writer != writer:
            raise
        log.warning("everything is published anew: %s", error)
        return Index()


@dataclass
class Mirror:
    """Keeps a shared store as a learner's own is. Not safe for several threads.

    Attributes:
        store: The learner's own.
        shared: The other.
        seen: What is published.
        index: What that names.
        stopping: Set by another thread, has ``publish`` give up before the next file.
    """

    store: Store
    shared: SharedStore
    seen: Seen
    index: Index
    stopping: bool = False
    _sizes: dict[str, int] | None = None
    """What is there, by name; looked at once, so that what was lost or cut short is put again."""
    _unsure: bool = False
    """Whether something may be published for all that is known: no answer came."""

    def sweep(self) -> None:
        """Delete what nothing names: what a learner left that was ended while it published.

        Raises:
            FencedError: another learner has taken over.
            UnavailableError: the shared store cannot be reached.
        """
        # In this order: who takes over puts files only after it has moved the root.
        unnamed = set(self.shared.sizes()) - self.index.objects() - {self.seen.root.index}
        self._delete(unnamed)

    def publish(self) -> bool:
        """Have the shared store be as the learner's own is; return whether it was not.

        It can be called again, should it fail; then what was to be deleted is left to ``sweep``.

        Raises:
            FencedError: another learner has taken over.
            UnavailableError: the shared store cannot be reached, or it is ``stopping``.
            DamagedError: something of the own store cannot be read.
            OSError: likewise.
        """
        if self._unsure:
            self._look_again()
        if self._sizes is None:
            self._sizes = self.shared.sizes()
        # First, so that a version that is made current meanwhile is among those that are read next.
        current = self.store.current()
        index = replace(
            self._backbone(),
            forgotten=self._put(self.store.forgotten_list()),
            versions=dict(self._versions()),
        )
        if current is not None and current not in index.versions:
            raise DamagedError(f"version {current} is current, and cannot be read")
        before = self.seen.root
        name = self._put(dump_index(index))
        if (name, current) == (before.index, before.current):
            self.index = index
            return False
        root = replace(before, serial=before.serial + 1, current=current, index=name, time=now())
        unwanted = (self.index.objects() | {before.index}) - index.objects() - {name}
        self._unsure = True
        self.seen, self.index = self.shared.move(root, self.seen), index
        self._unsure = False
        self._delete(unwanted)
        return True

    def _look_again(self) -> None:
        """Find out whether an attempt that no answer came to has moved the root."""
        found = self.shared.root()
        mine = self.seen.root
        if found is None or (found.root.writer, found.root.epoch) != (mine.writer, mine.epoch):
            raise self.shared.fenced(found)
        if found.root != mine:
            self.seen, self.index = found, self.shared.index(found.root)
        self._unsure = False

    def _delete(self, names: set[str]) -> None:
        """Delete files, unless they are another learner's by now."""
        if not names:
            return
        found = self.shared.root()
        if found is None or found.root != self.seen.root:
            raise self.shared.fenced(found)
        self.shared.delete(names)
        for name in names:
            (self._sizes or {}).pop(name, None)

    def _backbone(self) -> Index:
        """Return an index of the backbone alone."""
        if not self.store.has_backbone():
            return Index()
        name, paths = self.store.stored_backbone()
        known = self.index.backbone_files if name == self.index.backbone else {}
        source = self.store.root / BACKBONE_SOURCE
        return Index(
            backbone=name,
            backbone_files={
                key: self._put(path, known.get(key, "")) for key, path in paths.items()
            },
            source=self._put(source.read_bytes()) if source.exists() else "",
        )

    def _versions(self) -> Iterator[tuple[int, IndexedVersion]]:
        for number, version in self.store.stored_versions():
            if version is not None:
                yield number, self._version(version)
            elif number in self.index.versions:
                # What the learner's disk has lost is not taken from others.
                log.error("version %d cannot be read, and stays published as it was", number)
                yield number, self.index.versions[number]

    def _version(self, version: StoredVersion) -> IndexedVersion:
        before = self.index.versions.get(version.number)
        files = {}
        for entry, path in version.files:
            if entry.name == ONNX_FILE and not path.exists():
                continue  # it is not kept of every version
            try:
                files[entry.name] = self._put(path, entry.sha256)
            except (DamagedError, FileNotFoundError) as error:
                log.warning("version %d: %s", version.number, error)
                if before is not None and before.files.get(entry.name) == entry.sha256:
                    files[entry.name] = entry.sha256  # the good copy is not taken from others
        manifest = self._put(version.manifest)
        return IndexedVersion(manifest, files, version.pinned, version.retired)

    def _put(self, content: bytes | Path, sha256: str = "") -> str:
        """Put a file unless it is there, whole; return its name."""
        sizes = self._sizes if self._sizes is not None else {}
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        if sha256 and sizes.get(sha256) == size:
            return sha256
        if self.stopping:
            raise UnavailableError("the server is stopping")
        found = sha256_of(content)
        if sha256 and found != sha256:
            raise DamagedError(f"{content!s} does not have the checksum in its manifest")
        if sizes.get(found) != size:
            self.shared.put(content, found)
            sizes[found] = size
        return found


def _identity(root: Path) -> tuple[str, set[str]]:
    """Return a learner's id, made now if it has none, and where it has published."""
    path = root / FILE
    if not path.exists():
        _remember(root, uuid.uuid4().hex, set())
    try:
        said = json.loads(path.read_bytes())
        return str(said["id"]), set(said["published"])
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{path} cannot be read: {error}") from error


def _remember(root: Path, writer: str, places: set[str]) -> None:
    content = json.dumps({"id": writer, "published": sorted(places)}, indent=1).encode() + b"\n"
    if not (root / FILE).exists() or (root / FILE).read_bytes() != content:
        durable.replace(root / FILE, content)
