"""The files of versions, as clients download them."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator
from pathlib import Path

from inflora_core.errors import (
    DamagedError,
    InvalidInputError,
    OutOfRangeError,
    UnavailableError,
)
from inflora_core.model import FileEntry

CHUNK_BYTES = 2**20


async def read_artifact(path: Path, entry: FileEntry, offset: int) -> AsyncGenerator[bytes]:
    """Yield the file from ``offset`` on, in chunks; one empty chunk at its very end.

    Raises:
        InvalidInputError: the offset is negative.
        OutOfRangeError: the offset is beyond the end.
        DamagedError: the file is not what ``entry`` says. Nothing of it was yielded then.
        UnavailableError: it was let go meanwhile. Asked for again, it is made again.
    """
    if offset < 0:
        raise InvalidInputError(f"the offset is {offset}, but at least 0", field="offset")
    if offset > entry.size:
        raise OutOfRangeError(
            f"offset {offset} is beyond the end of {entry.name}, {entry.size}", field="offset"
        )
    await asyncio.to_thread(_verify, path, entry)
    if offset == entry.size:
        yield b""
    for position in range(offset, entry.size, CHUNK_BYTES):
        yield await asyncio.to_thread(_read, path, position)


def _verify(path: Path, entry: FileEntry) -> None:
    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DamagedError(f"{entry.name} cannot be read: {error.strerror}") from error
    if sha256 != entry.sha256:
        raise DamagedError(f"{entry.name} does not have the checksum in its manifest")


def _read(path: Path, position: int) -> bytes:
    # Opened for each chunk: a stream can be left at any moment, and has nothing to close then.
    try:
        with path.open("rb") as file:
            file.seek(position)
            return file.read(CHUNK_BYTES)
    except FileNotFoundError as error:
        raise UnavailableError(f"{path.name} was let go meanwhile: go on from here") from error
