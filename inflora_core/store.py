"""Immutable versions in a directory. No torch.

    FORMAT                               the store's format number
    audit.jsonl                          what was done, and by whom; see ``audit``
    backbones/{sha256}/                  the frozen backbone, once per store
        weights.safetensors              float32; its metadata holds the configuration
        template.onnx                    the graph that every version's file is made from
        manifest.json                    size and sha256 of both
        manifest.sha256                  of manifest.json, as sha256sum writes it
    models/default/
        backbone                         sha256 of the backbone in use
        CURRENT                          number of the current version, and the sha256 of that
        forgotten.json                   keys of forgotten classes, and which of them are purged
        versions/00000001/
            factors.safetensors          A_t and B_t of the version's task
            head.safetensors             weight and bias of all classes, their statistics, novelty
            memory.safetensors           Q, k and C_old of every layer
            model.onnx                   derived: template + merged weights + head; where it is
                                         not kept, it is made again when it is asked for
            manifest.json                a ``Version``: parent, task, classes, report, sha256s
            manifest.sha256
            PINNED                       if it is there, the version is kept however old it is
            RETIRED                      if it is there, only factors and manifest are kept
    drafts/                              what is being written; emptied when a learner opens it
    canary/                              images of old classes, if they are kept: ``canary.py``

Everything is written to ``drafts``, flushed to the disk, and renamed into its place, so that a
reader sees a version whole or not at all. K and V weights are not stored: they are the backbone's
with the factors of the version's ancestors merged in order, rounded to float32 after each.

What is published never changes, but for two things. Versions can be retired: then only the factors
stay, of which later ones are made. And classes can be forgotten. From then on a version
that knew them is read without them, and after a purge it is not read any more: its manifest lists
its factors only, of which later versions are made, and those names no forgotten class.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import threading
import uuid
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Never, Self

import numpy as np
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, load_file, save

from inflora_core import canary, durable, edits, failpoints
from inflora_core.errors import (
    DamagedError,
    InvalidInputError,
    NotFoundError,
    StateError,
    StoreFormatError,
)
from inflora_core.graph import materialise
from inflora_core.merge import merge
from inflora_core.model import (
    MARK,
    Array,
    BackboneConfig,
    Calibration,
    ClassEntry,
    ContinualModel,
    Edit,
    Factors,
    FileEntry,
    Forget,
    Form,
    LayerState,
    Learned,
    Novelty,
    TaskReport,
    Version,
    VersionState,
    now,
)

log = logging.getLogger(__name__)

FORMAT = 2
OLDEST_FORMAT = 2
"""Format 1 was never in a release: its files lack what novelty is made from."""
MODEL = "default"
"""The one model of a server, for now; names leave room for more."""

ONNX_FILE = "model.onnx"

_FACTORS = "factors.safetensors"
_EXPANSION, _REDUCTION = ".expansion", ".reduction"
_HEAD = "head.safetensors"
_MEMORY = "memory.safetensors"
_WITHHELD = (ONNX_FILE, _HEAD)
"""What of a REDUCED version holds rows of forgotten classes."""
_OWN = (ONNX_FILE, _HEAD, _MEMORY)
"""What only the version itself needs, and what a purge or its retirement deletes. The factors stay:
later versions' weights are made of them."""

FOLLOWS = "FOLLOWS"
"""Says which shared store a folder is a copy of; without it, it is a store of its own."""

BACKBONE_SOURCE = "backbone-source.json"
"""Says what the backbone was made from; whoever makes it writes it."""

_BACKBONE_FILES = ("weights.safetensors", "template.onnx", "manifest.json")

_MANIFEST = "manifest.json"
_MANIFEST_SUM = "manifest.sha256"
_PIN = "PINNED"
_RETIREMENT = "RETIRED"
_FORMAT_DRAFT = ".FORMAT."
_POINTER = re.compile(rb"([1-9][0-9]{0,8})(?: ([0-9a-f]{64}))?\n")
"""What is in CURRENT; the checksum is not there where an operator, or an older server, wrote it."""
_SHA256 = re.compile("[0-9a-f]{64}")
_NUMBER = re.compile("[0-9]{8,9}")
_NOVELTY = ("weight", "bias", "whitening", "offset")
_MALFORMED = (ValueError, KeyError, TypeError, RecursionError)
"""What comes of reading JSON that is none, or not as it was written."""
_VERSION = TypeAdapter(Version)
_CONFIG = TypeAdapter(BackboneConfig)
_FILES = TypeAdapter(tuple[FileEntry, ...])


@dataclass(frozen=True)
class Forgotten:
    """Keys of classes that no version may know any more.

    Attributes:
        keys: All of them.
        purged: Those whose data were asked to be deleted.
    """

    keys: frozenset[str] = frozenset()
    purged: frozenset[str] = frozenset()


@dataclass(frozen=True)
class StoredVersion:
    """A version as it lies in a store.

    Attributes:
        number: Its number.
        manifest: Its manifest, as it is on the disk.
        files: Those that it should have, and where.
        pinned: Whether it is kept however old it is.
        retired: Whether its data were let go.
    """

    number: int
    manifest: bytes
    files: tuple[tuple[FileEntry, Path], ...]
    pinned: bool
    retired: bool


@dataclass(frozen=True)
class StoredBackbone:
    """The frozen backbone in the store; both files were checked when it was opened."""

    sha256: str
    config: BackboneConfig
    weights_path: Path
    template_path: Path


class Store:
    """A directory of versions of one model, ``default``. Safe for many readers and one writer."""

    def __init__(self, root: Path) -> None:
        """Use ``Store.open``."""
        self.root = root
        self._model = root / "models" / MODEL
        self._versions = self._model / "versions"
        self._drafts = root / "drafts"
        self._forgotten = self._model / "forgotten.json"
        # A file that is being made again must not come back after it was purged.
        self._rewriting = threading.Lock()
        # A learner asks before every task, and a version's never changes.
        self._makers: dict[int, str] = {}

    @classmethod
    def open(cls, root: str | os.PathLike[str]) -> Self:
        """Open the store at ``root``, made if there is none.

        Raises:
            InvalidInputError: ``root`` is a file, or a folder with other things in it.
            StoreFormatError: a newer release wrote it.
            DamagedError: its format cannot be read.
            OSError: a folder of it cannot be made, for example because a file is in its place.
        """
        path = Path(root)
        if path.exists() and not path.is_dir():
            raise InvalidInputError(f"{path} is not a folder", field="store")
        marker = path / "FORMAT"
        if not marker.exists():
            check_new(path)
            durable.make_folder(path)
            durable.replace(marker, json.dumps({"format": FORMAT}).encode() + b"\n")
        store = cls.existing(path)
        for folder in (store._versions, store._drafts, path / "backbones"):
            durable.make_folder(folder)
        if not store._forgotten.exists():
            store.recover_forgotten()
        return store

    @classmethod
    def existing(cls, root: str | os.PathLike[str]) -> Self:
        """Return the store at ``root`` as it is, to be looked at: nothing is changed on the disk.

        Raises:
            NotFoundError: there is none.
            DamagedError: its format cannot be read.
            StoreFormatError: another release wrote it.
        """
        path, marker = Path(root), Path(root) / "FORMAT"
        try:
            number = int(json.loads(marker.read_bytes())["format"])
        except FileNotFoundError as error:
            raise NotFoundError(f"{path} has no FORMAT file, so it is not a store") from error
        except (OSError, OverflowError, *_MALFORMED) as error:
            raise DamagedError(f"{marker} cannot be read: {error}") from error
        if number > FORMAT:
            raise StoreFormatError(
                f"{path} has store format {number}; this release reads up to {FORMAT}. "
                "Use the release that wrote it, or a newer one."
            )
        if number < OLDEST_FORMAT:
            raise StoreFormatError(
                f"{path} has store format {number}, which no release ever wrote: begin a new store"
            )
        return cls(path)

    def clear_drafts(self) -> None:
        """Remove what an interrupted writer left. Only the one writer may call this."""
        for draft in self._drafts.iterdir():
            if draft.is_dir() and not draft.is_symlink():
                shutil.rmtree(draft)
            else:
                draft.unlink()

    def half_replaced(self) -> Iterator[Path]:
        """Yield what is left of files that were to replace others when their writer ended."""
        folders = (*self._versions.glob("*/"), *(self.root / "backbones").glob("*/"))
        for folder in (self.root, self._model, *sorted(folders)):
            yield from filter(durable.is_draft, sorted(folder.glob(".*")))

    # -- the backbone -----------------------------------------------------------------------

    def set_backbone(
        self, config: BackboneConfig, weights: Mapping[str, Array], template: bytes
    ) -> StoredBackbone:
        """Keep the frozen backbone and its ONNX template; a store has one for life.

        Args:
            config: How the backbone is built; its ``layers`` name the attention layers.
            weights: float32 arrays by parameter name, fused ``{layer}.qkv.weight`` among them.
            template: The ONNX graph whose initializers a version replaces.
        """
        if self.has_backbone():
            raise StateError("the store has a backbone already")
        # Of non-contiguous arrays safetensors writes scrambled data without a word.
        arrays = {name: np.asarray(value, order="C") for name, value in weights.items()}
        content = save(arrays, {"config": _CONFIG.dump_json(config).decode()})
        sha256 = hashlib.sha256(content).hexdigest()
        final = self.root / "backbones" / sha256
        if not final.exists():
            files = {"weights.safetensors": content, "template.onnx": template}
            entries = tuple(FileEntry.of(name, data) for name, data in files.items())
            self._commit(files, _FILES.dump_json(entries, indent=1), final)
        durable.replace(self._model / "backbone", f"{sha256}\n".encode())
        return self.backbone()

    def has_backbone(self) -> bool:
        """Whether a backbone was set."""
        return (self._model / "backbone").exists()

    def backbone(self) -> StoredBackbone:
        """Return the frozen backbone.

        Raises:
            StateError: none was set yet.
            DamagedError: a file of it is missing or does not have its checksum.
        """
        for _, error in self.backbone_damage():
            raise error
        folder = self._backbone_folder()
        sha256 = folder.name
        weights = folder / "weights.safetensors"
        with safe_open(weights, "numpy") as file:
            config = _CONFIG.validate_json(file.metadata()["config"])
        return StoredBackbone(sha256, config, weights, folder / "template.onnx")

    def backbone_damage(self, sha256: str = "") -> Iterator[tuple[Path, DamagedError]]:
        """Yield the files of the backbone that are not what they were.

        Args:
            sha256: Its name, where the store has lost it.

        Raises:
            StateError: none was set yet.
            DamagedError: its name or its manifest cannot be read.
        """
        if not sha256 and not self.has_backbone():
            raise StateError("the store has no backbone yet")
        folder = self._backbone_called(sha256) if sha256 else self._backbone_folder()
        try:
            entries = _FILES.validate_json(_read_manifest(folder))
        except ValueError as error:
            raise DamagedError(f"the backbone in {folder} cannot be read: {error}") from error
        for entry in entries:
            self._provide(folder, entry)
            try:
                _check(folder, entry)
            except DamagedError as error:
                yield folder / entry.name, error

    def _backbone_folder(self) -> Path:
        name = self._model / "backbone"
        try:
            sha256 = _read(name).decode().strip()
        except ValueError as error:
            raise DamagedError(f"the backbone in {name} cannot be read: {error}") from error
        return self._backbone_called(sha256)

    def _backbone_called(self, sha256: str) -> Path:
        if not _SHA256.fullmatch(sha256):
            raise DamagedError(f"{sha256[:100]!r} is no backbone's name, which is a sha256")
        return self.root / "backbones" / sha256

    def load_weights(self, backbone: StoredBackbone) -> dict[str, Array]:
        """Return the frozen weights, float32, by parameter name."""
        return load_file(backbone.weights_path)

    def initial_model(self, backbone: StoredBackbone) -> ContinualModel:
        """Return the state before the first task: nothing protected, no class known."""
        layers = {}
        with safe_open(backbone.weights_path, "numpy") as file:
            for name in backbone.config.layers:
                layers[name] = initial_layer(file.get_tensor(f"{name}.qkv.weight"))
        return ContinualModel.untaught(layers, backbone.config.embedding_size)

    # -- versions ---------------------------------------------------------------------------

    def numbers(self) -> list[int]:
        """Return the numbers of all versions, oldest first."""
        names = [path.name for path in self._versions.iterdir() if _NUMBER.fullmatch(path.name)]
        # What is not named as we do it was not made by us.
        return sorted(int(name) for name in names if int(name) and name == f"{int(name):08d}")

    def version(self, number: int) -> Version:
        """Return the manifest of version ``number`` as it is now: without forgotten classes.

        Raises:
            NotFoundError: there is no such version.
            DamagedError: its manifest, or the list of forgotten classes, cannot be read.
        """
        version, forgotten = self._manifest(number), self.forgotten()
        known = {entry.key for entry in version.classes}
        if not known.isdisjoint(forgotten.purged):
            state = VersionState.PURGED
        elif (self._folder(number) / _RETIREMENT).exists():
            state = VersionState.RETIRED
        elif not known.isdisjoint(forgotten.keys):
            state = VersionState.REDUCED
        else:
            state = VersionState.WHOLE
        return replace(
            version,
            classes=tuple(entry for entry in version.classes if entry.key not in forgotten.keys),
            state=state,
            pinned=(self._folder(number) / _PIN).exists(),
        )

    def _manifest(self, number: int) -> Version:
        """Return the manifest of version ``number`` as it is on the disk."""
        folder = self._folder(number)
        if not folder.exists():
            raise NotFoundError(f"there is no version {number}", field="name")
        return self._parsed(number, _read_manifest(folder))

    def _parsed(self, number: int, manifest: bytes) -> Version:
        """Return what the manifest of version ``number`` says."""
        folder = self._folder(number)
        try:
            version = _VERSION.validate_json(manifest)
        except ValidationError as error:
            raise DamagedError(f"{folder / _MANIFEST} cannot be read: {error}") from error
        if version.number != number:
            raise DamagedError(f"{folder / _MANIFEST} is of version {version.number}")
        if version.parent is not None and version.parent >= number:
            raise DamagedError(f"by {folder / _MANIFEST} it is its own ancestor")
        return version

    def manifest(self, number: int) -> Version:
        """Return the manifest as it is on the disk, forgotten classes among the others.

        To check the store by; whoever answers, teaches or lists takes ``version``.

        Raises:
            NotFoundError: there is no such version.
            DamagedError: it cannot be read.
        """
        return self._manifest(number)

    def ancestors(self, number: int, known: Mapping[int, int | None] | None = None) -> list[int]:
        """Return what version ``number`` was made from, its parent first, as far as can be told.

        Args:
            number: A version, which may be gone.
            known: Parents of versions, for those whose manifests cannot be read.
        """
        lineage: list[int] = []
        parent: int | None = number
        while parent is not None:
            child = parent
            try:
                parent = self._manifest(child).parent
            except (DamagedError, NotFoundError):
                parent = (known or {}).get(child)
            if parent is not None and parent >= child:
                break  # what others know may be damaged, too
            if parent is not None:
                lineage.append(parent)
        return lineage

    def damage(self, version: Version) -> Iterator[tuple[FileEntry, DamagedError]]:
        """Yield the files of a version that it needs and that are not what they were.

        A ``model.onnx`` that is not there is no damage: it is not kept of every version.

        Args:
            version: As ``version`` returned it; what is withheld is not needed.
        """
        for entry in version.files:
            folder = self._folder(version.number)
            absent = entry.name == ONNX_FILE and not (folder / ONNX_FILE).exists()
            if entry.name not in _unneeded(version) and not absent:
                try:
                    _check(folder, entry)
                except DamagedError as error:
                    yield entry, error

    def version_of_task(self, task: str) -> int | None:
        """Return the version that ``task`` made, or None. A task makes at most one.

        A version whose manifest cannot be read is passed over: it must not end all learning. The
        one that is returned outlives a power cut.
        """
        for number in reversed(self.numbers()):
            try:
                if number not in self._makers:
                    self._makers[number] = self._manifest(number).task
            except DamagedError as error:
                log.warning("passing over version %d: %s", number, error)
                continue
            if self._makers[number] == task:
                durable.sync_folder(self._versions)  # its writer may have died before it did
                return number
        return None

    def current(self) -> int | None:
        """Return the number of the current version, or None before the first.

        Raises:
            DamagedError: it cannot be read, or does not have its checksum.
        """
        path = self._model / "CURRENT"
        if not os.path.lexists(path):
            return None
        match = _POINTER.fullmatch(_read(path))
        # With a digit flipped it would name another version, and that would answer.
        if match is None or (match[2] and match[0] != _pointer(int(match[1]))):
            raise DamagedError(f"{path} is not the number of a version, or has another's checksum")
        return int(match[1])

    def set_current(self, number: int) -> None:
        """Make version ``number`` current. The caller has verified it.

        Raises:
            StateError: its data are deleted.
        """
        if (version := self.version(number)).state.stripped:
            self._refuse_stripped(version)
        failpoints.reach("pointer.replace")
        durable.replace(self._model / "CURRENT", _pointer(number))
        failpoints.reach("pointer.replaced")

    def verify(self, number: int) -> Version:
        """Return the manifest after checking size and sha256 of every file that is used.

        Raises:
            NotFoundError: there is no such version.
            StateError: it can answer nothing any more.
            DamagedError: naming the first file that is not what it was.
        """
        version = self.version(number)
        self._check_usable(version)
        for _, error in self.damage(version):
            raise error
        return version

    def path(self, number: int, name: str) -> Path:
        """Return the path of file ``name`` of version ``number``, if its manifest lists it.

        Raises:
            NotFoundError: there is no such version or file. A name with a path in it is never
                in a manifest, so it cannot lead out of the store.
            StateError: the file holds what was forgotten, or is deleted.
        """
        version = self.version(number)
        if version.state is VersionState.RETIRED and name in _OWN:
            self._refuse_stripped(version)
        if name in _withheld(version):
            raise StateError(
                f"{name} of version {number} holds a class that was forgotten since"
                + self._instead(),
                field="name",
            )
        entry = version.file(name)
        if entry is None:
            raise NotFoundError(f"version {number} has no artifact {name!r}", field="artifact")
        self._provide(self._folder(number), entry)
        return self._folder(number) / name

    def artifacts(self, version: Version) -> tuple[FileEntry, ...]:
        """Return the files of a version that ``path`` leads to."""
        return tuple(entry for entry in version.files if entry.name not in _withheld(version))

    def forms(self, version: Version) -> tuple[Form, ...]:
        """Return the smaller forms of a version's ``model.onnx`` that are handed out.

        Where that is not, neither are they: they are made of it.
        """
        return () if ONNX_FILE in _withheld(version) else version.forms

    def load_model(self, number: int | None) -> ContinualModel:
        """Return the state of version ``number``, or the initial one for None.

        Classes that are forgotten are not in it, whichever version it is of: what is learned on an
        older version must not bring them back.

        Raises:
            NotFoundError: there is no such version.
            StateError: it was purged or retired.
            DamagedError: a file of it, of an ancestor or of the backbone is damaged.
        """
        start = self.initial_model(self.backbone())
        if number is None:
            return start
        if (asked := self.version(number)).state.stripped:
            self._refuse_stripped(asked)
        lineage = [self._manifest(number)]
        while (parent := lineage[-1].parent) is not None:
            lineage.append(self._manifest(parent))
        merged = {name: layer.key_value for name, layer in start.layers.items()}
        for version in reversed(lineage):
            for name, pair in self.factors(version.number).items():
                merged[name] = merge(merged[name], pair)
        newest = lineage[0]
        memory, head = self._tensors(newest, _MEMORY), self._tensors(newest, _HEAD)
        if len(head["weight"]) != len(newest.classes):
            raise DamagedError(f"version {number} lists other classes than its head has")
        layers = {
            name: LayerState(
                key_value=key_value,
                basis=memory[f"{name}.basis"],
                protected=int(memory[f"{name}.protected"]),
                moment=memory[f"{name}.moment"],
                tokens=int(memory[f"{name}.tokens"]),
            )
            for name, key_value in merged.items()
        }
        model = ContinualModel(
            layers=layers,
            head_weight=head["weight"],
            head_bias=head["bias"],
            classes=newest.classes,
            tasks=sum(version.report is not None for version in lineage),
            version=number,
            class_means=head["class_means"],
            class_counts=head["class_counts"],
            class_scatter=head["class_scatter"],
            class_freedom=int(head["class_freedom"]),
            novelty=Novelty(**{part: head[f"novelty.{part}"] for part in _NOVELTY}),
            calibration=Calibration(
                images=int(head["calibration.images"]),
                losses=head["calibration.losses"],
                scores=head["calibration.scores"],
            ),
            capacity=memory["capacity"],
        )
        return edits.without(model, self.forgotten().keys)

    def factors(self, number: int) -> dict[str, Factors]:
        """Return what a version's task added to its parent's K and V weights, by layer.

        Raises:
            NotFoundError: there is no such version.
            DamagedError: the file is damaged.
        """
        arrays = self._tensors(self._manifest(number), _FACTORS)
        layers = [name.removesuffix(_EXPANSION) for name in arrays if name.endswith(_EXPANSION)]
        return {
            name: Factors(arrays[name + _EXPANSION], arrays[name + _REDUCTION]) for name in layers
        }

    def make_onnx(self, number: int) -> bytes:
        """Return the ONNX file of a version as it may answer now: without forgotten classes.

        Of a version that is WHOLE, these are the bytes of its ``model.onnx``.

        Raises:
            NotFoundError: there is no such version.
            StateError: it can answer nothing any more.
            DamagedError: what it is made from is damaged.
        """
        self._check_usable(self.version(number))
        template = self.backbone().template_path.read_bytes()
        return materialise(template, self.load_model(number), number)

    def rebuild_onnx(self, number: int) -> bytes:
        """Make ``model.onnx`` of a version again, from the template and what the task changed.

        Returns:
            Its content.

        Raises:
            NotFoundError: there is no such version.
            StateError: it can answer nothing any more.
            DamagedError: what it is made from is damaged, or the result is another file.
        """
        with self._rewriting:
            content = self._made_onnx(self.version(number))
            durable.replace(self._folder(number) / ONNX_FILE, content)
            return content

    # -- what is kept -----------------------------------------------------------------------

    def pin(self, number: int) -> Version:
        """Keep version ``number`` however old it is; return it.

        Raises:
            NotFoundError: there is no such version.
            StateError: its data are deleted already.
        """
        if (version := self.version(number)).state.stripped:
            self._refuse_stripped(version)
        durable.replace(self._folder(number) / _PIN, b"")
        return self.version(number)

    def unpin(self, number: int) -> Version:
        """Let version ``number`` go when it is old; return it. One not pinned is left as it is.

        Raises:
            NotFoundError: there is no such version.
        """
        self.version(number)
        (self._folder(number) / _PIN).unlink(missing_ok=True)
        durable.sync_folder(self._folder(number))
        return self.version(number)

    def retire(self, number: int) -> None:
        """Delete what only version ``number`` itself needs; it can never be used again.

        An interrupted retirement is finished by another call. Only the one process that promotes
        may call this, and not of the current version.

        Raises:
            NotFoundError: there is no such version.
            StateError: it is the current one.
            DamagedError: its manifest cannot be read, so nothing says what it is.
        """
        self._manifest(number)
        if number == self.current():
            raise StateError(f"version {number} is current, and stays", field="name")
        folder = self._folder(number)
        failpoints.reach("retire.mark")
        durable.replace(folder / _RETIREMENT, b"")
        failpoints.reach("retire.marked")
        with self._rewriting:
            for path in (*(folder / name for name in _OWN), *folder.glob(".*")):
                failpoints.reach("retire.delete")
                path.unlink(missing_ok=True)
            durable.sync_folder(folder)
        failpoints.reach("retire.deleted")

    def drop_onnx(self, number: int) -> None:
        """Delete ``model.onnx`` of version ``number``, which ``rebuild_onnx`` makes again.

        Raises:
            DamagedError: it could not: something that it is made from is damaged. It stays, as the
                last thing that the version can answer with.
        """
        version = self.version(number)
        if version.state is VersionState.WHOLE:
            self._made_onnx(version)
        with self._rewriting:
            failpoints.reach("onnx.delete")
            (self._folder(number) / ONNX_FILE).unlink(missing_ok=True)
            failpoints.reach("onnx.deleted")

    def onnx(self, number: int) -> bytes:
        """Return ``model.onnx`` of version ``number``, from the disk or made again; checked.

        Raises:
            NotFoundError: there is no such version.
            StateError: it can answer nothing any more, or not with that file.
            DamagedError: it is damaged, or what it is made from.
        """
        path, version = self.path(number, ONNX_FILE), self.version(number)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return self._made_onnx(version)
        if FileEntry.of(ONNX_FILE, content) != version.file(ONNX_FILE):
            raise DamagedError(f"{path} does not have the checksum in its manifest")
        return content

    def _made_onnx(self, version: Version) -> bytes:
        content = self.make_onnx(version.number)
        if FileEntry.of(ONNX_FILE, content) != version.file(ONNX_FILE):
            raise DamagedError(
                f"{ONNX_FILE} of version {version.number} is damaged, and cannot be rebuilt"
            )
        return content

    def is_stripped(self, number: int) -> bool:
        """Whether data that only version ``number`` itself needs are gone."""
        return any(not (self._folder(number) / name).exists() for name in (_HEAD, _MEMORY))

    def kept(self) -> list[int]:
        """Return the versions whose own data are there: neither retired nor purged."""
        return [number for number in self.numbers() if not self.is_stripped(number)]

    def has_onnx(self, number: int) -> bool:
        """Whether ``model.onnx`` of version ``number`` is there."""
        return (self._folder(number) / ONNX_FILE).exists()

    def marked(self) -> tuple[frozenset[int], frozenset[int]]:
        """Return which versions are pinned, and which are retired, damaged ones among them."""
        found = [
            frozenset(number for number in self.numbers() if (self._folder(number) / mark).exists())
            for mark in (_PIN, _RETIREMENT)
        ]
        return found[0], found[1]

    def half_retired(self) -> list[int]:
        """Return the retired versions of which something is left that should not be."""
        return [
            number
            for number in sorted(self.marked()[1])
            if any((self._folder(number) / name).exists() for name in _OWN)
        ]

    def next_number(self) -> int:
        """Return the number that ``publish`` will give."""
        return max(self.numbers(), default=0) + 1

    def publish(
        self, learned: Learned, task: str, onnx: bytes, forms: tuple[Form, ...] = ()
    ) -> Version:
        """Make ``learned`` a version, durable and whole, but not yet current.

        Args:
            learned: The state; ``learned.model.version`` names the parent.
            task: Id of the task that was learned.
            onnx: The merged model.
            forms: Smaller ones of it that are handed out.
        """
        return self._publish(
            learned.model, task, onnx, learned.factors, learned.report, forms=forms
        )

    def publish_edit(
        self, edited: edits.Edited, task: str, onnx: bytes, forms: tuple[Form, ...] = ()
    ) -> Version:
        """Make ``edited`` a version, durable and whole, but not yet current.

        Classes are forgotten once ``forget`` is told of the version's ``forgets``.

        Args:
            edited: The state; ``edited.model.version`` names the parent.
            task: Id of the task that asked for it.
            onnx: The merged model.
            forms: Smaller ones of it that are handed out.
        """
        return self._publish(edited.model, task, onnx, forgets=edited.forgets, forms=forms)

    def _publish(
        self,
        model: ContinualModel,
        task: str,
        onnx: bytes,
        factors: Mapping[str, Factors] | None = None,
        report: TaskReport | None = None,
        forgets: tuple[str, ...] = (),
        forms: tuple[Form, ...] = (),
    ) -> Version:
        number = self.next_number()
        calibration = model.calibration
        changes, memory = {}, {"capacity": model.capacity}
        for name, pair in (factors or {}).items():
            changes[name + _EXPANSION] = pair.expansion
            changes[name + _REDUCTION] = pair.reduction
        for name, layer in model.layers.items():
            memory[f"{name}.basis"] = layer.basis
            memory[f"{name}.protected"] = np.asarray(layer.protected, np.int64)
            memory[f"{name}.moment"] = layer.moment
            memory[f"{name}.tokens"] = np.asarray(layer.tokens, np.int64)
        head = {
            "weight": model.head_weight,
            "bias": model.head_bias,
            "class_means": model.class_means,
            "class_counts": model.class_counts,
            "class_scatter": model.class_scatter,
            "class_freedom": np.asarray(model.class_freedom, np.int64),
            **{f"novelty.{part}": getattr(model.novelty, part) for part in _NOVELTY},
            "calibration.images": np.asarray(calibration.images, np.int64),
            "calibration.losses": calibration.losses,
            "calibration.scores": calibration.scores,
        }
        files = {
            _FACTORS: _save(changes),
            _HEAD: _save(head),
            _MEMORY: _save(memory),
            ONNX_FILE: onnx,
        }
        version = Version(
            number=number,
            parent=model.version,
            task=task,
            backbone=(self._model / "backbone").read_text().strip(),
            classes=model.classes,
            files=tuple(FileEntry.of(name, data) for name, data in files.items()),
            create_time=now(),
            report=report,
            forgets=forgets,
            forms=forms,
        )
        self._commit(files, _dump(version), self._folder(number))
        return version

    # -- forgetting -------------------------------------------------------------------------

    def forgotten(self) -> Forgotten:
        """Return which classes are forgotten.

        Raises:
            DamagedError: the list is missing or cannot be read. What is on it must not come back,
                so nothing can be loaded then.
        """
        try:
            content = json.loads(_read(self._forgotten))
            keys, purged = content["forgotten"], content["purged"]
            if content["sha256"] != _forgotten_sum(keys, purged):
                raise DamagedError(f"{self._forgotten} does not have its checksum")
            return Forgotten(frozenset(keys), frozenset(purged))
        except _MALFORMED as error:
            raise DamagedError(f"{self._forgotten} cannot be read: {error}") from error

    def forget(self, keys: Collection[str]) -> None:
        """Forget classes for good, durably: no version is read with them any more.

        Canary images of them are deleted. Doing it again changes nothing. Only the one process that
        promotes may call this.
        """
        known = self.forgotten()
        changed = Forgotten(known.keys.union(keys), known.purged)
        if changed != known:
            self._remember(changed)
        canary.forget(self.root, keys)

    def purge(self, keys: Collection[str]) -> None:
        """Delete the data of all versions that know one of these classes, which are forgotten.

        Such versions can never be used again. An interrupted purge is finished by another call, of
        no keys even. A version whose manifest is damaged is left alone, and named in the log:
        nothing says what it knows; once its manifest is sound again, the next call purges it. Only
        the one process that promotes may call this.
        """
        known = self.forgotten()
        wanted = Forgotten(known.keys.union(keys), known.purged.union(keys))
        if wanted != known:
            self._remember(wanted)
        if not wanted.purged:
            return
        with self._rewriting:
            for number, version in self._manifests():
                if not self._is_purged(number, version, wanted.purged):
                    self._purge_version(number, version, wanted.purged)

    def unpurged(self) -> list[int]:
        """Return the versions in which a purge left something, as far as manifests can be read."""
        purged = self.forgotten().purged
        return [
            number
            for number, version in self._manifests()
            if not self._is_purged(number, version, purged)
        ]

    def clear_canaries(self, *, all_of_them: bool = False) -> None:
        """Delete canary images of classes that are forgotten, or that no version ever knew.

        Only the one process that promotes may call this.

        Args:
            all_of_them: Whether to keep none of any class.

        Raises:
            DamagedError: the list of forgotten classes cannot be read.
            OSError: something could not be deleted.
        """
        found, manifests = canary.keys(self.root), [version for _, version in self._manifests()]
        known = {entry.key for version in manifests for entry in version.classes}
        gone = {key for key in found if canary.is_draft(key)} | self.forgotten().keys
        # What a version knows whose manifest is damaged, nothing says.
        if len(manifests) == len(self.numbers()):
            gone |= found - known
        canary.forget(self.root, found if all_of_them else found & gone)

    def names_of(self, keys: Collection[str]) -> frozenset[str]:
        """Return what classes are, or once were, called, without names of classes of now."""
        names: set[str] = set()
        for _, version in self._manifests():
            for entry in version.classes:
                if entry.key in keys:
                    names.update(entry.names)
        current = self.current()
        borne = self.version(current).classes if current is not None else ()
        return frozenset(names.difference({MARK}, *(entry.names for entry in borne)))

    def emptied_tasks(self) -> frozenset[str]:
        """Return the tasks of whose classes all are forgotten, as far as manifests can be read."""
        gone = self.forgotten().keys
        tasks: set[str] = set()
        left: set[str] = set()
        for _, version in self._manifests():
            tasks.update(entry.task for entry in version.classes)
            left.update(entry.task for entry in version.classes if entry.key not in gone)
        return frozenset(tasks - left)

    def tables_for(self, edit: Edit) -> Iterator[tuple[ClassEntry, ...]]:
        """Yield the class table of every version that can be read, for ``edits.apply``.

        With classes that are forgotten already if they are to be purged now, as they can still be.
        """
        known = self.forgotten()
        gone = known.purged if isinstance(edit, Forget) and edit.purge else known.keys
        for _, version in self._manifests():
            yield tuple(entry for entry in version.classes if entry.key not in gone)

    def _remember(self, forgotten: Forgotten) -> None:
        keys, purged = sorted(forgotten.keys), sorted(forgotten.purged)
        content = {"forgotten": keys, "purged": purged, "sha256": _forgotten_sum(keys, purged)}
        failpoints.reach("forgotten.replace")
        durable.replace(self._forgotten, json.dumps(content, indent=1).encode() + b"\n")
        failpoints.reach("forgotten.replaced")

    def recover_forgotten(self, also: Forgotten | None = None) -> None:
        """Write the list of forgotten classes anew, as far as the manifests tell.

        A new store has an empty one. Without it, every class ever forgotten would be back. Only the
        one process that promotes may call this, where the list is lost or damaged.

        Args:
            also: What others than the manifests know of.
        """
        versions = [version for _, version in self._manifests()]
        keys = {key for version in versions for key in version.forgets}
        marked = {
            entry.key for version in versions for entry in version.classes if entry.label == MARK
        }
        if keys:
            log.warning("%s was lost, and is made again from the versions", self._forgotten)
        more = also or Forgotten()
        purged = more.purged | marked
        self._remember(Forgotten(more.keys | keys | purged, purged))

    def manifests(self) -> Iterator[Version]:
        """Yield the manifests that can be read, with what is forgotten, unless it is purged."""
        for _, version in self._manifests():
            yield version

    def _manifests(self) -> Iterator[tuple[int, Version]]:
        """Yield the manifests that can be read, as they are on the disk."""
        for number in self.numbers():
            try:
                yield number, self._manifest(number)
            except DamagedError as error:
                log.warning("passing over version %d: %s", number, error)

    def _is_purged(self, number: int, version: Version, purged: Collection[str]) -> bool:
        """Whether nothing of ``purged`` classes is left in a version, or ever was."""
        known = [entry for entry in version.classes if entry.key in purged]
        if not known:
            return True
        folder = self._folder(number)
        one_sum = _read(folder / _MANIFEST_SUM).count(b"\n") == 1
        leftovers = [name for name in _OWN if (folder / name).exists()] + [*folder.glob(".*")]
        return one_sum and not leftovers and all(entry.names == (MARK,) for entry in known)

    def _purge_version(self, number: int, version: Version, purged: Collection[str]) -> None:
        """Take a version's data away, and the names of all its purged classes."""
        names = {name for entry in version.classes if entry.key in purged for name in entry.names}
        redacted = replace(
            version,
            classes=tuple(
                replace(entry, label=MARK, aliases=()) if entry.key in purged else entry
                for entry in version.classes
            ),
            files=tuple(entry for entry in version.files if entry.name not in _OWN),
            forms=(),
            report=version.report and version.report.without_classes(names),
        )
        folder = self._folder(number)
        self._replace_manifest(folder, None if redacted == version else _dump(redacted))
        # Also what an interrupted writer left: it may be a copy.
        for path in (*(folder / name for name in _OWN), *folder.glob(".*")):
            failpoints.reach("purge.delete")
            path.unlink(missing_ok=True)
        durable.sync_folder(folder)
        failpoints.reach("purge.deleted")

    @staticmethod
    def _replace_manifest(folder: Path, new: bytes | None) -> None:
        """Give a version another manifest, or finish doing so."""
        if new is not None:
            old = (folder / _MANIFEST).read_bytes()
            # Two files cannot be replaced at once. For a moment both contents are right.
            durable.replace(folder / _MANIFEST_SUM, _manifest_sum(old) + _manifest_sum(new))
            durable.replace(folder / _MANIFEST, new)
        durable.replace(folder / _MANIFEST_SUM, _manifest_sum((folder / _MANIFEST).read_bytes()))

    def _check_usable(self, version: Version) -> None:
        """Refuse a version that can answer nothing any more."""
        if version.state.stripped:
            self._refuse_stripped(version)
        if not version.classes:
            raise StateError(
                f"all classes of version {version.number} are forgotten" + self._instead(),
                field="name",
            )

    def _refuse_stripped(self, version: Version) -> Never:
        retired = version.state is VersionState.RETIRED
        why = "is retired" if retired else "knew a class that was forgotten"
        raise StateError(
            f"version {version.number} {why}, and its data are deleted" + self._instead(),
            field="name",
        )

    def _instead(self) -> str:
        """Return the end of a message: which version there is in place of a forgotten one."""
        for number in reversed(self.numbers()):
            with contextlib.suppress(DamagedError):
                version = self.version(number)
                if version.state is VersionState.WHOLE and not version.candidate:
                    return f"; use version {number}"
        return ""

    def stored_versions(self) -> Iterator[tuple[int, StoredVersion | None]]:
        """Yield the versions as they lie here, for a copy of them; None if one cannot be read.

        Files may go while it is looked at.
        """
        pinned, retired = self.marked()
        for number in self.numbers():
            folder = self._folder(number)
            gone = _OWN if number in retired else ()
            try:
                manifest = _read_manifest(folder)
                version = self._parsed(number, manifest)
            except DamagedError as error:
                log.warning("passing over version %d: %s", number, error)
                yield number, None
                continue
            files = tuple(
                (entry, folder / entry.name) for entry in version.files if entry.name not in gone
            )
            yield (
                number,
                StoredVersion(number, manifest, files, number in pinned, number in retired),
            )

    def stored_backbone(self) -> tuple[str, dict[str, Path]]:
        """Return the backbone's name, and its files by name; nothing of them is read.

        Raises:
            StateError: none was set yet.
            DamagedError: its name cannot be read.
        """
        if not self.has_backbone():
            raise StateError("the store has no backbone yet")
        folder = self._backbone_folder()
        return folder.name, {name: folder / name for name in _BACKBONE_FILES}

    def forgotten_list(self) -> bytes:
        """Return the list of forgotten classes as it is on the disk, checked.

        Raises:
            DamagedError: as ``forgotten``.
        """
        self.forgotten()
        return _read(self._forgotten)

    def _provide(self, folder: Path, entry: FileEntry) -> None:
        """See that a file is there, which is about to be read. In a store of one's own, it is."""

    def _folder(self, number: int) -> Path:
        return self._versions / f"{number:08d}"

    def _tensors(self, version: Version, name: str) -> dict[str, Array]:
        entry = version.file(name)
        if entry is None:
            raise DamagedError(f"version {version.number} lists no {name}")
        self._provide(self._folder(version.number), entry)
        try:
            return load(_check(self._folder(version.number), entry))
        except SafetensorError as error:
            raise DamagedError(f"{name} of version {version.number}: {error}") from error

    def _commit(self, files: Mapping[str, bytes], manifest: bytes, final: Path) -> None:
        draft = self._drafts / uuid.uuid4().hex
        draft.mkdir()
        try:
            for name, data in files.items():
                failpoints.reach("draft.write")
                durable.write(draft / name, data)
            durable.write(draft / _MANIFEST, manifest)
            durable.write(draft / _MANIFEST_SUM, _manifest_sum(manifest))
            failpoints.reach("draft.sync")
            durable.sync_folder(draft)
            failpoints.reach("draft.rename")
            os.rename(draft, final)
        except OSError:
            # Half a draft on a full disk would keep it full.
            shutil.rmtree(draft, ignore_errors=True)
            raise
        failpoints.reach("draft.renamed")
        durable.sync_folder(final.parent)
        failpoints.reach("draft.published")


def initial_layer(qkv_weight: Array) -> LayerState:
    """Return the state of a layer before the first task.

    Args:
        qkv_weight: (3a, d) float32 rows of Q, K, V.
    """
    rows, d = qkv_weight.shape
    return LayerState(
        # A copy: the learner writes merged rows into the weights that this came from.
        key_value=np.array(qkv_weight[rows // 3 :], np.float32, order="C"),
        basis=np.eye(d, dtype=np.float32),
        protected=0,
        moment=np.zeros((d, d), np.float32),
        tokens=0,
    )


def check_new(path: Path) -> None:
    """Refuse to begin a store in a folder with other things in it.

    Raises:
        InvalidInputError: that is so.
    """
    if path.is_dir() and not all(_may_be_in_new_store(name) for name in path.iterdir()):
        raise InvalidInputError(
            f"{path} has no FORMAT file, so it is not a store, and it is not empty", field="store"
        )


def _may_be_in_new_store(path: Path) -> bool:
    """Whether ``path`` may lie in a folder that becomes a store."""
    ours = (_FORMAT_DRAFT, f".{FOLLOWS}.")
    return path.name in ("lost+found", FOLLOWS) or path.name.startswith(ours)


def _withheld(version: Version) -> tuple[str, ...]:
    """Return the files of a version that nobody may have any more."""
    match version.state:
        case VersionState.REDUCED:
            return _WITHHELD
        case VersionState.PURGED | VersionState.RETIRED:
            return _OWN
    return ()


def _unneeded(version: Version) -> tuple[str, ...]:
    """Return the files of a version that it can do without."""
    # What a REDUCED one answers with is made in memory, of its head among others.
    return (ONNX_FILE,) if version.state is VersionState.REDUCED else _withheld(version)


def _dump(version: Version) -> bytes:
    return _VERSION.dump_json(version, indent=1, exclude={"state", "pinned"})


def _pointer(number: int) -> bytes:
    return f"{number} {hashlib.sha256(str(number).encode()).hexdigest()}\n".encode()


def _forgotten_sum(keys: list[str], purged: list[str]) -> str:
    return hashlib.sha256(json.dumps([keys, purged]).encode()).hexdigest()


def _read_manifest(folder: Path) -> bytes:
    # Before and after: a purge may replace the manifest meanwhile. While it does, there are two
    # lines, of the old one and of the new one.
    sums = _read(folder / _MANIFEST_SUM)
    content = _read(folder / _MANIFEST)
    sums += _read(folder / _MANIFEST_SUM)
    # A flipped bit in a class's name would pass for a class of another name.
    if _manifest_sum(content) not in sums.splitlines(keepends=True):
        raise DamagedError(
            f"{folder / _MANIFEST} does not have the checksum in {folder / _MANIFEST_SUM}"
        )
    return content


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        if not durable.is_damage(error):
            raise
        raise DamagedError(f"{path} cannot be read: {error}") from error


def _manifest_sum(manifest: bytes) -> bytes:
    return f"{hashlib.sha256(manifest).hexdigest()}  {_MANIFEST}\n".encode()


def _save(arrays: Mapping[str, Array]) -> bytes:
    return save({name: np.asarray(value, order="C") for name, value in arrays.items()})


def _check(folder: Path, entry: FileEntry) -> bytes:
    path = folder / entry.name
    data = _read(path)
    if FileEntry.of(entry.name, data) != entry:
        raise DamagedError(f"{path} does not have the checksum in its manifest")
    return data
