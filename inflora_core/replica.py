"""A copy of what a shared store has published, as far as it was needed. No torch.

It is a store like any other, but its files come when they are asked for, and go when there are too
many. Manifests, marks and the list of forgotten classes are always those of the index taken last.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Self

from inflora_core import durable
from inflora_core.errors import (
    DamagedError,
    InvalidInputError,
    NotFoundError,
    UnavailableError,
)
from inflora_core.model import FileEntry, Version
from inflora_core.shared import Index, IndexedVersion, SharedStore
from inflora_core.store import ONNX_FILE, Store

log = logging.getLogger(__name__)

FILE = "FOLLOWS"
"""Says which shared store a folder is a copy of; without it, it is a store of its own."""


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
        marker = root / FILE
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
        replica = cls.open(root)
        if not marker.exists():
            durable.replace(marker, json.dumps({"url": shared.url}).encode() + b"\n")
        replica.clear_drafts()
        for left in replica.half_replaced():
            left.unlink()
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
        self._taken: dict[int, IndexedVersion] = {}
        self._fetching = threading.Lock()

    def take(self, index: Index) -> bool:
        """Know what an index names, and nothing else; return whether other classes are forgotten.

        It can be taken again, should it be interrupted. What is forgotten comes first: nothing that
        is read from then on has it.

        Raises:
            NotFoundError: another index was published meanwhile.
            DamagedError, UnavailableError: as ``SharedStore.get``.
            OSError: the disk does not take it.
        """
        forgotten = bool(index.forgotten) and _sha256(self._forgotten) != index.forgotten
        if forgotten:
            durable.replace(self._forgotten, self.shared.get(index.forgotten))
        if index.backbone and not self.has_backbone():
            manifest = self.shared.get(index.backbone_files["manifest.json"])
            if not (folder := self.root / "backbones" / index.backbone).exists():
                self._commit({}, manifest, folder)
            durable.replace(self._model / "backbone", f"{index.backbone}\n".encode())
        for number, version in index.versions.items():
            if self._taken.get(number) != version:
                self._take_version(number, version)
                self._taken[number] = version
        return forgotten

    def take_all(self, index: Index) -> None:
        """Take an index, and fetch every file that it names.

        Raises:
            As ``take``.
        """
        self.take(index)
        if index.source:
            durable.replace(self.root / "backbone-source.json", self.shared.get(index.source))
        if index.backbone:
            self.backbone()
        for number in index.versions:
            version = self.manifest(number)
            for entry in version.files:
                if entry.name in index.versions[number].files:
                    self._provide(self._folder(number), entry)

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
                if path.suffix in (".onnx", ".safetensors"):
                    files.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        left = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if left <= self.cache_bytes:
                return
            if path.parent not in kept:
                path.unlink(missing_ok=True)
                left -= size

    def _take_version(self, number: int, version: IndexedVersion) -> None:
        folder = self._folder(number)
        manifest = folder / "manifest.json"
        if not manifest.exists():
            shutil.rmtree(folder, ignore_errors=True)
            self._commit({}, self.shared.get(version.manifest), folder)
        elif _sha256(manifest) != version.manifest or not self._is_readable(number):
            self._replace_manifest(folder, self.shared.get(version.manifest))
        for name, wanted in (("PINNED", version.pinned), ("RETIRED", version.retired)):
            if wanted and not (folder / name).exists():
                durable.replace(folder / name, b"")
            elif not wanted:
                (folder / name).unlink(missing_ok=True)
        # Of a purge or a retirement.
        for path in folder.glob("*.*"):
            if path.suffix in (".onnx", ".safetensors") and not self._is_wanted(path, version):
                path.unlink(missing_ok=True)

    def _is_readable(self, number: int) -> bool:
        try:
            self.manifest(number)
        except DamagedError:
            return False
        return True

    def _is_wanted(self, path: Path, version: IndexedVersion) -> bool:
        # model.onnx is let go there to save room, and may be of use here.
        whole = "head.safetensors" in version.files
        return path.name in version.files or (path.name == ONNX_FILE and whole)

    def damage(self, version: Version) -> Iterator[tuple[FileEntry, DamagedError]]:
        """Yield nothing: what is not as it should be is fetched again when it is used."""
        return iter(())

    def _provide(self, folder: Path, entry: FileEntry) -> None:
        path = folder / entry.name
        with self._fetching:
            try:
                os.utime(path)  # for ``trim``
                if path.stat().st_size == entry.size and _sha256(path) == entry.sha256:
                    return
                log.warning("%s is damaged, and fetched again", path)
            except FileNotFoundError:
                pass
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


def is_replica(root: Path) -> bool:
    """Whether a folder is a copy of a shared store."""
    return (root / FILE).exists()


def _url(marker: Path) -> str:
    try:
        return str(json.loads(marker.read_bytes())["url"])
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{marker} cannot be read: {error}") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
