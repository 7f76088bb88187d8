"""A task's examples on disk, between upload and learning. No torch.

A spool is a folder of files:

    images.bin       the encoded images, end to end
    examples.jsonl   one line for each image, in order:
                     {"label": "cat", "offset": 0, "size": 4711, "sha256": "...", "chain": "..."}
                     and a last one that seals them: {"examples": 80, "sha256": "..."}
    checkpoint.pt    where its training stands (``inflora_core.checkpoint``)
    upload.json      what the upload was to become, if it can be continued after a break:
                     {"upload": {...}, "sha256": "..."}

``chain`` is the hash of all (label, sha256) up to that line; that of the last one is the seal's.
The line of an image is written once the image is on the disk, so whatever breaks off, the lines say
how much is whole: ``recover`` cuts a spool back to that.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from inflora_core import durable, failpoints
from inflora_core.errors import DamagedError

IMAGES = "images.bin"
INDEX = "examples.jsonl"
ORIGIN = "upload.json"
CHECKPOINT = "checkpoint.pt"

STEP_BYTES = 8 * 2**20
"""Of images, between two flushes to the disk: what of an upload a killed server loses at most. With
one a message, of 512 KiB, a spool grows at a quarter of the speed (docs/operations-uploads.md)."""

_MALFORMED = (ValueError, KeyError, TypeError, RecursionError)
"""What comes of reading JSON that is none, or not as it was written."""


@dataclass(frozen=True)
class SpoolSummary:
    """What a finished spool holds.

    Attributes:
        labels: Classes in the order of their first image.
        counts: Images of each class.
        size: Encoded bytes of all images.
        sha256: Of the sequence of (label, sha256 of the image): equal for equal uploads.
    """

    labels: tuple[str, ...]
    counts: tuple[int, ...]
    size: int
    sha256: str


@dataclass
class SpoolState:
    """What was written to a spool so far.

    Attributes:
        count: Images.
        size: Their encoded bytes.
        counts: Images of each class, in the order of its first one.
        digest: Of the sequence of (label, sha256 of the image).
    """

    count: int = 0
    size: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)

    @property
    def sha256(self) -> str:
        """The digest, in hexadecimal."""
        return self.digest.hexdigest()

    def add(self, label: str, size: int, sha256: str) -> None:
        """Count one more image."""
        _extend(self.digest, label, sha256)
        self.counts[label] = self.counts.get(label, 0) + 1
        self.count += 1
        self.size += size


class SpoolWriter:
    """Writes one spool; a context manager that removes the folder unless it is to be kept.

    That is, unless ``finish`` or ``suspend`` was called.

    Attributes:
        state: What was added.
        durable_count: Images that a power cut cannot lose any more.
        durable_size: Their encoded bytes.
        finished: Whether it is sealed.
    """

    def __init__(
        self,
        folder: Path,
        origin: Mapping[str, Any] | None = None,
        state: SpoolState | None = None,
    ) -> None:
        """Open ``folder``.

        Args:
            folder: Made; it must not exist unless there is a ``state``.
            origin: What ``read_origin`` is to return of it; JSON. None: nothing.
            state: From ``recover``, to go on with a spool that was not finished.
        """
        self.folder = folder
        self.state = state or SpoolState()
        self.durable_count, self.durable_size = self.state.count, self.state.size
        self._lines: list[str] = []
        self._named = False
        self._kept = False
        self.finished = False
        if state is None:
            failpoints.reach("spool.create")
            folder.mkdir(parents=True)
        try:
            if origin is not None:
                failpoints.reach("spool.origin")
                durable.write(folder / ORIGIN, _sealed(origin))
            self._images = (folder / IMAGES).open("ab")
            try:
                self._index = (folder / INDEX).open("a", encoding="utf-8")
            except OSError:
                self._images.close()
                raise
        except OSError:
            if state is None:
                # Not rmtree, which needs a descriptor: there may be none to be had.
                with contextlib.suppress(OSError):
                    for name in (ORIGIN, IMAGES, INDEX):
                        (folder / name).unlink(missing_ok=True)
                    folder.rmdir()
            raise

    def __enter__(self) -> SpoolWriter:
        """Return self."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the files; remove them all if the spool is not to be kept."""
        for file in (self._images, self._index):
            # What is to be kept is flushed by now; what cannot be is removed, or cut off later.
            with contextlib.suppress(OSError):
                file.close()
        if not self._kept:
            shutil.rmtree(self.folder)

    @property
    def closed(self) -> bool:
        """Whether nothing more can be added."""
        return self._index.closed

    def add(self, image: bytes, label: str) -> None:
        """Append one encoded image."""
        sha256 = hashlib.sha256(image).hexdigest()
        row = {"label": label, "offset": self.state.size, "size": len(image), "sha256": sha256}
        failpoints.reach("spool.write")
        self._images.write(image)
        self.state.add(label, len(image), sha256)
        line = json.dumps({**row, "chain": self.state.sha256}, ensure_ascii=False)
        self._lines.append(line + "\n")
        if self.state.size - self.durable_size >= STEP_BYTES:
            self.flush()

    def flush(self) -> None:
        """Flush what was added to the disk: a power cut does not lose it any more."""
        if self.durable_count == self.state.count:
            return
        failpoints.reach("spool.flush")
        self._flush()
        failpoints.reach("spool.flushed")

    def suspend(self) -> None:
        """Keep the spool as it is, to be recovered and continued. What is not flushed may go."""
        self._kept = True

    def finish(self) -> SpoolSummary:
        """Seal the spool and flush it to the disk; from now on a power cut loses nothing."""
        state = self.state
        self._lines.append(json.dumps({"examples": state.count, "sha256": state.sha256}) + "\n")
        failpoints.reach("spool.sync")
        self._flush()
        failpoints.reach("spool.synced")
        self._kept = self.finished = True
        return SpoolSummary(
            tuple(state.counts), tuple(state.counts.values()), state.size, state.sha256
        )

    def _flush(self) -> None:
        self._images.flush()
        os.fsync(self._images.fileno())
        # Only now: a line vouches for its image.
        self._index.write("".join(self._lines))
        self._index.flush()
        os.fsync(self._index.fileno())
        if not self._named:
            for folder in (self.folder, self.folder.parent):
                durable.sync_folder(folder)
        self._named = True
        self._lines.clear()
        self.durable_count, self.durable_size = self.state.count, self.state.size


def recover(folder: Path) -> SpoolState:
    """Cut a spool that no writer has open back to its whole examples; return what is left.

    A seal goes, too: who writes on puts a new one.

    Raises:
        OSError: a file is missing, or cannot be read or written.
    """
    failpoints.reach("spool.recover")
    state, lines = SpoolState(), 0
    with (folder / IMAGES).open("r+b") as images, (folder / INDEX).open("r+b") as index:
        end = os.fstat(images.fileno()).st_size
        for line in index:
            try:
                _take(state, line, images.read, end)
            except _MALFORMED:
                break
            lines += len(line)
        for file, length in ((index, lines), (images, state.size)):
            file.truncate(length)
            os.fsync(file.fileno())
    failpoints.reach("spool.recovered")
    return state


def read_origin(folder: Path) -> dict[str, Any]:
    """Return what the spool was opened with.

    Raises:
        DamagedError: there is nothing, or it does not have its checksum.
    """
    path = folder / ORIGIN
    try:
        content = path.read_bytes()
        origin: dict[str, Any] = json.loads(content)["upload"]
        if content != _sealed(origin):
            raise DamagedError(f"{path} does not have its checksum")
    except (OSError, *_MALFORMED) as error:
        if isinstance(error, OSError) and not durable.is_damage(error):
            raise
        raise DamagedError(f"{path} cannot be read: {error}") from error
    return origin


def read_labels(folder: Path) -> tuple[str, ...]:
    """Return the classes of a finished spool, in the order of their first image.

    Raises:
        DamagedError: the index is damaged.
    """
    state, sealed = SpoolState(), False
    try:
        with (folder / INDEX).open("rb") as index:
            for line in index:
                row = json.loads(line)
                sealed = row == {"examples": state.count, "sha256": state.sha256}
                if not sealed:
                    state.add(row["label"], row["size"], row["sha256"])
    except (OSError, *_MALFORMED) as error:
        if isinstance(error, OSError) and not durable.is_damage(error):
            raise
        raise DamagedError(f"the index of {folder} cannot be read: {error}") from error
    if not sealed:
        raise DamagedError(f"the index of {folder} is cut short, or does not have its checksum")
    return tuple(state.counts)


def checkpoint_sum(folder: Path) -> str:
    """Return what tells a spool's checkpoint from any other one; "" if there is none.

    Raises:
        OSError: it cannot be read.
    """
    try:
        with (folder / CHECKPOINT).open("rb") as file:
            return file.readline(64).decode(errors="replace")
    except FileNotFoundError:
        return ""


def check_spool(folder: Path) -> SpoolSummary:
    """Return what a spool holds, after reading all of it.

    Raises:
        DamagedError: as ``read_spool``.
    """
    digest, counts, size = hashlib.sha256(), dict[str, int](), 0
    for image, label in read_spool(folder):
        _extend(digest, label, hashlib.sha256(image).hexdigest())
        counts[label] = counts.get(label, 0) + 1
        size += len(image)
    return SpoolSummary(tuple(counts), tuple(counts.values()), size, digest.hexdigest())


def read_spool(folder: Path) -> Iterator[tuple[bytes, str]]:
    """Yield (encoded image, label) in order.

    Raises:
        DamagedError: a file is missing or cut short, an image does not have its checksum, or the
            examples are not those that were written.
    """
    state, sealed = SpoolState(), False
    try:
        with (folder / IMAGES).open("rb") as images, (folder / INDEX).open("rb") as index:
            end = os.fstat(images.fileno()).st_size
            for line in index:
                if sealed:
                    raise DamagedError(f"the spool {folder} goes on after its end")
                if json.loads(line) == {"examples": state.count, "sha256": state.sha256}:
                    sealed = state.size == end
                    if not sealed:
                        raise DamagedError(f"the spool {folder} does not have its checksum")
                    continue
                example = _take(state, line, images.read, end)
                yield example.image, example.label
    except (OSError, *_MALFORMED) as error:
        raise DamagedError(f"the spool {folder} cannot be read: {error}") from error
    if not sealed:
        raise DamagedError(f"the spool {folder} is cut short")


class _Example(NamedTuple):
    image: bytes
    label: str


def _take(state: SpoolState, line: bytes, read: Callable[[int], bytes], end: int) -> _Example:
    """Read the next example and add it to ``state``.

    Args:
        state: What came before.
        line: Of the index.
        read: Returns the next bytes of the images.
        end: How many of them there are.

    Raises:
        ValueError, KeyError, TypeError, RecursionError: it is not whole. ``state`` is as it was.
    """
    row = json.loads(line)
    label, size = row["label"], row["size"]
    if not isinstance(label, str) or type(size) is not int or row["offset"] != state.size:
        raise ValueError("a line of the index is none")
    # Before it is read: memory for any size that a damaged line names would be taken first.
    if not line.endswith(b"\n") or not 0 <= size <= end - state.size:
        raise ValueError("it is cut short")
    image = read(size)
    sha256 = hashlib.sha256(image).hexdigest()
    if sha256 != row["sha256"]:
        raise ValueError("an image does not have its checksum")
    ahead = state.digest.copy()
    _extend(ahead, label, sha256)
    if ahead.hexdigest() != row["chain"]:
        raise ValueError("a label does not have its checksum")
    state.add(label, size, sha256)
    return _Example(image, label)


def _extend(digest: hashlib._Hash, label: str, sha256: str) -> None:
    digest.update(json.dumps([label, sha256]).encode())


def _sealed(origin: Mapping[str, Any]) -> bytes:
    sha256 = hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()
    return json.dumps({"upload": origin, "sha256": sha256}, indent=1).encode() + b"\n"
