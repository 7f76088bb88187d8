"""A tar archive with one folder for each class, as a task; nothing of it is unpacked."""

from __future__ import annotations

import lzma
import tarfile
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Self

from inflora_client import Example
from inflora_client._channel import MAX_MESSAGE_BYTES
from inflora_client.cli.sources.common import (
    SUFFIXES,
    Choice,
    Source,
    SourceError,
    is_image,
    normalised,
    select,
)

_DAMAGED = (tarfile.TarError, EOFError, OSError, lzma.LZMAError, zlib.error)
"""What reading a damaged archive raises, by its compression."""


class Archive:
    """A tar archive, compressed or not, whose members are read where they lie.

    Examples are in the order of the archive, so that an upload reads it once from front to back;
    one that goes on after a break reads on.

    Args:
        path: The file.

    Raises:
        SourceError: It is no tar archive.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # An upload that is tried again may still be read from by the thread of the one before.
        self._lock = threading.Lock()
        with self._described():
            self._tar = tarfile.open(path)  # noqa: SIM115

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._tar.close()

    def members(self) -> Iterator[tuple[PurePosixPath, tarfile.TarInfo]]:
        """Yield the files that are not hidden.

        Raises:
            SourceError: the archive is damaged, or has members that no task has.
        """
        with self._described():
            for member in self._tar:
                path = self._checked(member)
                if member.isreg() and not any(part.startswith(".") for part in path.parts):
                    yield path, member
            self._check_end()

    def read(self, member: tarfile.TarInfo) -> bytes:
        """Return the content of a member.

        Raises:
            SourceError: the archive is damaged.
        """
        with self._lock, self._described():
            file = self._tar.extractfile(member)
            return file.read() if file else b""

    def _checked(self, member: tarfile.TarInfo) -> PurePosixPath:
        """Refuse what is no file or folder in its place: it would be hostile, if unpacked."""
        path = PurePosixPath(member.name)
        if path.is_absolute() or ".." in path.parts:
            raise SourceError(
                f"{self.path}: {member.name!r} leads out of the archive; pack it anew"
            )
        if not (member.isreg() or member.isdir()) or member.issparse():
            raise SourceError(
                f"{self.path}: {member.name!r} is a link or something else that is no plain file; "
                "pack the files themselves (tar --dereference)"
            )
        return path

    def _check_end(self) -> None:
        """Refuse an archive with a damaged header, which tarfile takes for its end."""
        file: Any = self._tar.fileobj
        file.seek(self._tar.offset)
        if any(file.read(tarfile.BLOCKSIZE)):
            raise SourceError(f"{self.path} is damaged at byte {self._tar.offset}: pack it anew")

    @contextmanager
    def _described(self) -> Iterator[None]:
        try:
            yield
        except _DAMAGED as error:
            raise SourceError(
                f"{self.path} cannot be read as a tar archive, copy or pack it anew: {error}"
            ) from error


@dataclass(frozen=True, slots=True)
class MemberImage:
    """An image in an archive.

    Attributes:
        archive: Where it is.
        member: Which of its members.
    """

    archive: Archive
    member: tarfile.TarInfo

    def __str__(self) -> str:
        return f"{self.archive.path}: {self.member.name}"

    def read_bytes(self) -> bytes:
        """Return the encoded bytes."""
        return self.archive.read(self.member)


def read_archive(archive: Archive, choice: Choice) -> Source:
    """List the images of an archive.

    Every image lies in a folder named like its class, and all of these in the same place, be it at
    the top or, as in an archive of one folder, further down.

    Raises:
        SourceError: The archive is damaged, hostile, or not a task.
    """
    examples: list[Example] = []
    left_out = 0
    first: PurePosixPath | None = None
    for path, member in archive.members():
        if not is_image(path.name):
            left_out += 1
            continue
        if not path.parent.name:
            raise SourceError(f"{archive.path}: {path} is in no folder: make one for each class")
        if member.size > MAX_MESSAGE_BYTES:  # a small archive may hold what fills the memory
            raise SourceError(
                f"{archive.path}: {member.name} has {member.size} bytes, more than a call carries; "
                "make the image smaller, or leave it out"
            )
        first = first or path
        if path.parent.parent != first.parent.parent:
            raise SourceError(
                f"{archive.path}: the folders of {first} and {path} are not in the same place, so "
                "they are not both classes; move them"
            )
        examples.append(Example(MemberImage(archive, member), normalised(path.parent.name)))
    if not examples:
        raise SourceError(
            f"{archive.path} holds no {SUFFIXES} files: pack one folder for each class"
        )
    return Source(select(examples, choice, archive.path), left_out)
