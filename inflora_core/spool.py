"""A task's examples on disk, between upload and learning. No torch.

A spool is a folder of two files:

    images.bin       the encoded images, end to end
    examples.jsonl   one line for each image, in order:
                     {"label": "cat", "offset": 0, "size": 4711, "sha256": "..."}
                     and a last one that seals them: {"examples": 80, "sha256": "..."}
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from inflora_core import durable, failpoints
from inflora_core.errors import DamagedError


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


class SpoolWriter:
    """Writes one spool; a context manager that removes the folder unless ``finish`` was called."""

    def __init__(self, folder: Path) -> None:
        """Make ``folder``, which must not exist."""
        failpoints.reach("spool.create")
        folder.mkdir(parents=True)
        self.folder = folder
        self.count = 0
        self.size = 0
        self._counts: dict[str, int] = {}
        self._digest = hashlib.sha256()
        self._images = (folder / "images.bin").open("wb")
        self._index = (folder / "examples.jsonl").open("w", encoding="utf-8")
        self._finished = False

    def __enter__(self) -> SpoolWriter:
        """Return self."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the files; remove them all if the spool is not finished."""
        for file in (self._images, self._index):
            # After ``finish`` nothing is left to flush; before it, what cannot be is removed.
            with contextlib.suppress(OSError):
                file.close()
        if not self._finished:
            shutil.rmtree(self.folder)

    def add(self, image: bytes, label: str) -> None:
        """Append one encoded image."""
        sha256 = hashlib.sha256(image).hexdigest()
        row = {"label": label, "offset": self.size, "size": len(image), "sha256": sha256}
        line = json.dumps(row, ensure_ascii=False)
        failpoints.reach("spool.write")
        self._images.write(image)
        self._index.write(line + "\n")
        _extend(self._digest, label, sha256)
        self._counts[label] = self._counts.get(label, 0) + 1
        self.count += 1
        self.size += len(image)

    def finish(self) -> SpoolSummary:
        """Seal the spool and flush it to the disk; from now on a power cut loses nothing."""
        seal = {"examples": self.count, "sha256": self._digest.hexdigest()}
        self._index.write(json.dumps(seal) + "\n")
        failpoints.reach("spool.sync")
        for file in (self._images, self._index):
            file.flush()
            os.fsync(file.fileno())
        for folder in (self.folder, self.folder.parent):
            durable.sync_folder(folder)
        self._finished = True
        failpoints.reach("spool.synced")
        return SpoolSummary(
            tuple(self._counts), tuple(self._counts.values()), self.size, self._digest.hexdigest()
        )


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

    Labels are vouched for by the seal, so only after the last example.

    Raises:
        DamagedError: a file is missing or cut short, an image does not have its checksum, or the
            examples are not those that were written.
    """
    digest, count, sealed = hashlib.sha256(), 0, False
    try:
        with (
            (folder / "images.bin").open("rb") as images,
            (folder / "examples.jsonl").open(encoding="utf-8") as index,
        ):
            for line in index:
                row = json.loads(line)
                if sealed:
                    raise DamagedError(f"the spool {folder} goes on after its end")
                if "examples" in row:
                    sealed = row == {"examples": count, "sha256": digest.hexdigest()}
                    if not sealed or images.read(1):
                        raise DamagedError(f"the spool {folder} does not have its checksum")
                    continue
                image = images.read(row["size"])
                if hashlib.sha256(image).hexdigest() != row["sha256"]:
                    raise DamagedError(f"an image in the spool {folder} has not its checksum")
                _extend(digest, row["label"], row["sha256"])
                count += 1
                yield image, row["label"]
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise DamagedError(f"the spool {folder} cannot be read: {error}") from error
    if not sealed:
        raise DamagedError(f"the spool {folder} is cut short")


def _extend(digest: hashlib._Hash, label: str, sha256: str) -> None:
    digest.update(json.dumps([label, sha256]).encode())
