"""A copy of what a shared store has published, as far as it was needed. No torch.

It is a store like any other, but its files come when they are asked for, and go when there are too
many. Manifests, marks and the list of forgotten classes are always those of the index taken last.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import threading
from collections import defaultdict
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

from inflora_core import durable
from inflora_core.errors import (
    DamagedError,
    InvalidInputError,
    NotFoundError,
    StateError,
    UnavailableError,
)
from inflora_core.model import FileEntry, Version
from inflora_core.shared import Index, IndexedVersion, SharedStore, sha256_of
from inflora_core.store import BACKBONE_SOURCE, FOLLOWS, ONNX_FILE, Store, check_new

log = logging.getLogger(__name__)

_LARGE = (".onnx", ".safetensors")
_AT_A_TIME = 16
"""Manifests that are fetched at a time: each is small, and a new copy needs all of them."""


class Replica(Store):
    """See the module. One process writes it; safe for several of its threads."""

    shared: SharedStore
    cache_bytes: int = 0

    @classmethod
    def of(cls, shared: SharedStore, root: Path, cache_bytes: int = 0) -> Self:
        """Return the copy in a folder, begun if there is none.

        Args:
            shared: What it is a copy of.
            root: The folder.
            cache_bytes: How much its files may take; 0: any.

        Raises:
            InvalidInputError: it is a store of its own, or a copy of another one.
            DamagedError, StoreFormatError, OSError: as ``Store.open``.
        """
        marker = root / FOLLOWS
        if not marker.exists() and (root / "FORMAT").exists():
            raise InvalidInputError(
                f"{root} is a store of its own, and cannot follow another: use an empty folder",
                field="store",
            )
        if marker.exists() and (followed := _url(marker)) != shared.url:
            raise InvalidInputError(
                f"{root} is a copy of {followed}, not of {shared.url}: use an empty folder",
                field="store",
            )
        if not marker.exists():
            check_new(root)
            durable.make_folder(root)
            durable.replace(marker, json.dumps({"url": shared.url}).encode() + b"\n")
        replica = cls.open(root)
        replica.shared, replica.cache_bytes = shared, cache_bytes
        return replica

    @classmethod
    def into(cls, shared: SharedStore, root: Path) -> Self:
        """Return a copy in the folder of a new store, which has nothing yet; see ``take_all``."""
        replica = cls.existing(root)
        replica.shared = shared
        return replica

    def __init__(self, root: Path) -> None:
        """Use ``Replica.of``."""
        super().__init__(root)
        self.outdated = False
        """Whether classes were forgotten since whoever answers was told: he sets it back."""
        self._taken: dict[int, IndexedVersion] = {}
        self._locks: defaultdict[Path, threading.Lock] = defaultdict(threading.Lock)

    def tidy(self) -> None:
        """Remove what an earlier process left half-done. Only the one that writes may call this."""
        self.clear_drafts()
        for left in self.half_replaced():
            left.unlink()

    def take(self, index: Index) -> None:
        """Know what an index names, and nothing else.

        It can be taken again, should it be interrupted. What is forgotten comes first: nothing that
        is read from then on has it.

        Raises:
            NotFoundError: another index was published meanwhile.
            DamagedError, UnavailableError: as ``SharedStore.get``.
            OSError: the disk does not take it.
        """
        if index.forgotten and sha256_of(self._forgotten) != index.forgotten:
            durable.replace(self._forgotten, self.shared.get(index.forgotten))
            self.outdated = True
        if index.backbone:
            self._take_backbone(index)
        changed = {n: v for n, v in index.versions.items() if self._taken.get(n) != v}
        with ThreadPoolExecutor(_AT_A_TIME, "fetch-manifest") as pool:
            manifests = pool.map(self._manifest_of, changed, changed.values())
            for (number, version), manifest in zip(changed.items(), manifests, strict=True):
                self._take_version(number, version, manifest)
                self._taken[number] = version
        for number in set(self.numbers()) - set(index.versions):
            log.warning("version %d is not published any more", number)
            self._taken.pop(number, None)
            shutil.rmtree(self._folder(number))
            self.outdated = True

    def take_all(self, index: Index) -> None:
        """Take an index, and fetch every file that it names.

        Raises:
            As ``take``.
        """
        self.take(index)
        if index.source:
            durable.replace(self.root / BACKBONE_SOURCE, self.shared.get(index.source))
        if index.backbone:
            self.backbone()
        for number in index.versions:
            version = self.manifest(number)
            for entry in version.files:
                if entry.name in index.versions[number].files:
                    self._provide(self._folder(number), entry)
            durable.sync_folder(self._folder(number))

    def trim(self, keep: Collection[int]) -> None:
        """Delete the files that were not used for longest, until the rest fit into the cache.

        Args:
            keep: Versions whose files stay.
        """
        if not self.cache_bytes:
            return
        kept = {self._folder(number) for number in keep}
        files = []
        for path in self._versions.glob("*/*"):
            with contextlib.suppress(FileNotFoundError):
                if path.suffix in _LARGE:
                    files.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        left = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if left <= self.cache_bytes:
                return
            if path.parent not in kept:
                path.unlink(missing_ok=True)
                left -= size

    def damage(self, version: Version) -> Iterator[tuple[FileEntry, DamagedError]]:
        """Yield nothing: what is not as it should be is fetched again when it is used."""
        return iter(())

    def _take_backbone(self, index: Index) -> None:
        folder = self.root / "backbones" / index.backbone
        if not (folder / "manifest.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            self._commit({}, self.shared.get(index.backbone_files["manifest.json"]), folder)
        name = self._model / "backbone"
        if not name.exists() or name.read_text().strip() != index.backbone:
            durable.replace(name, f"{index.backbone}\n".encode())

    def _manifest_of(self, number: int, version: IndexedVersion) -> bytes | None:
        """Return the manifest of a version, None where that is here, and sound."""
        path = self._folder(number) / "manifest.json"
        if path.exists() and sha256_of(path) == version.manifest:
            with contextlib.suppress(DamagedError):
                self.manifest(number)
                return None
        return self.shared.get(version.manifest)

    def _take_version(self, number: int, version: IndexedVersion, manifest: bytes | None) -> None:
        folder = self._folder(number)
        if manifest is not None and (folder / "manifest.json").exists():
            self._replace_manifest(folder, manifest)
        elif manifest is not None:
            shutil.rmtree(folder, ignore_errors=True)
            self._commit({}, manifest, folder)
        for name, wanted in (("PINNED", version.pinned), ("RETIRED", version.retired)):
            if wanted and not (folder / name).exists():
                durable.replace(folder / name, b"")
                self.outdated |= name == "RETIRED"
            elif not wanted:
                (folder / name).unlink(missing_ok=True)
        if "head.safetensors" in version.files:
            return
        # Of a purge or a retirement. What is being made, or fetched, is not there yet, or not any
        # more: whoever does that looks at the manifest and the marks with the lock.
        with self._rewriting:
            for path in folder.glob("*.*"):
                if path.suffix in _LARGE and path.name not in version.files:
                    with self._locks[path]:
                        path.unlink(missing_ok=True)

    def _provide(self, folder: Path, entry: FileEntry) -> None:
        path = folder / entry.name
        with self._locks[path]:
            try:
                os.utime(path)  # for ``trim``
                if path.stat().st_size == entry.size and sha256_of(path) == entry.sha256:
                    return
                log.warning("%s is damaged, and fetched again", path)
            except FileNotFoundError:
                pass
            self._check_wanted(folder, entry)
            try:
                self.shared.fetch(entry.sha256, path)
            except NotFoundError as error:
                path.unlink(missing_ok=True)
                if entry.name == ONNX_FILE:
                    return  # it can be made of others
                raise DamagedError(f"{error.message}, which is {path}") from error
            except UnavailableError:
                if entry.name != ONNX_FILE:
                    raise
                path.unlink(missing_ok=True)
                log.warning("%s cannot be fetched; trying to make it", path)
            try:
                self._check_wanted(folder, entry)
            except StateError:
                path.unlink(missing_ok=True)
                raise

    def _check_wanted(self, folder: Path, entry: FileEntry) -> None:
        """Refuse a file of a version that was purged or retired meanwhile."""
        if folder.parent != self._versions:
            return
        number = int(folder.name)
        with contextlib.suppress(NotFoundError):
            version = self.version(number)
            stripped = version.state.stripped and entry.name != "factors.safetensors"
            if not stripped and self.manifest(number).file(entry.name) is not None:
                return
        raise StateError(f"{entry.name} of version {number} was let go", field="name")


def is_replica(root: Path) -> bool:
    """Whether a folder is a copy of a shared store."""
    return (root / FOLLOWS).exists()


def _url(marker: Path) -> str:
    try:
        return str(json.loads(marker.read_bytes())["url"])
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{marker} cannot be read: {error}") from error
