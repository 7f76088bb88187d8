"""The files of versions, as clients download them."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path

from inflora_core import durable
from inflora_core.errors import (
    DamagedError,
    InfloraError,
    InvalidInputError,
    OutOfRangeError,
    UnavailableError,
)
from inflora_core.model import FileEntry

log = logging.getLogger(__name__)

CHUNK_BYTES = 2**18
"""A device on a thin line has to get one in a minute, and keeps what came of whole ones alone."""


async def read_artifact(
    path: Path, entry: FileEntry, offset: int, rebuild: Callable[[], object] | None = None
) -> AsyncGenerator[bytes]:
    """Yield the file from ``offset`` on, in chunks; one empty chunk at its very end.

    Args:
        path: The file.
        entry: What it must be.
        offset: Where to begin, in bytes.
        rebuild: Makes the file again; None if nothing can.

    Raises:
        InvalidInputError: the offset is negative.
        OutOfRangeError: the offset is beyond the end.
        DamagedError: the file is not what ``entry`` says, and cannot be made again. Nothing of it
            was yielded then, unless it was damaged after it had been checked: then all but the last
            chunk.
        UnavailableError: it was let go meanwhile. Asked for again, it is made again.
    """
    _check_offset(entry, offset)
    try:
        expected = await asyncio.to_thread(_verify, path, entry, offset)
    except DamagedError as error:
        if rebuild is None:
            raise
        try:
            await asyncio.to_thread(rebuild)
        except (InfloraError, OSError) as cause:
            log.warning("%s cannot be made again: %s", path, cause)
            raise error from cause
        expected = await asyncio.to_thread(_verify, path, entry, offset)
    sent = hashlib.sha256()
    for position in range(offset, max(entry.size, offset + 1), CHUNK_BYTES):
        chunk = await asyncio.to_thread(_read, path, entry, position)
        sent.update(chunk)
        # The disk may give other bytes than a moment ago, or the file be replaced.
        if position + CHUNK_BYTES >= entry.size and sent.digest() != expected:
            raise _damaged(entry)
        yield chunk


def cut(content: bytes, entry: FileEntry, offset: int) -> Iterator[bytes]:
    """Yield what is in memory from ``offset`` on, as ``read_artifact`` does with a file.

    Raises:
        InvalidInputError: the offset is negative.
        OutOfRangeError: the offset is beyond the end.
    """
    _check_offset(entry, offset)
    for position in range(offset, max(entry.size, offset + 1), CHUNK_BYTES):
        yield content[position : position + CHUNK_BYTES]


def _check_offset(entry: FileEntry, offset: int) -> None:
    if offset < 0:
        raise InvalidInputError(f"the offset is {offset}, but at least 0", field="offset")
    if offset > entry.size:
        raise OutOfRangeError(
            f"offset {offset} is beyond the end of {entry.name}, {entry.size}", field="offset"
        )


def _verify(path: Path, entry: FileEntry, offset: int) -> bytes:
    """Return the sha256 of what follows ``offset``, once the whole file is known to be sound."""
    whole, rest = hashlib.sha256(), hashlib.sha256()
    try:
        with path.open("rb") as file:
            position = 0
            while chunk := file.read(CHUNK_BYTES):
                whole.update(chunk)
                rest.update(chunk[max(0, offset - position) :])
                position += len(chunk)
    except OSError as error:
        if not durable.is_damage(error):
            raise
        raise DamagedError(f"{entry.name} cannot be read: {error.strerror}") from error
    if whole.hexdigest() != entry.sha256:
        raise _damaged(entry)
    return rest.digest()


def _read(path: Path, entry: FileEntry, position: int) -> bytes:
    # Opened for each chunk: a stream can be left at any moment, and has nothing to close then.
    try:
        with path.open("rb") as file:
            file.seek(position)
            return file.read(CHUNK_BYTES)
    except FileNotFoundError as error:
        raise UnavailableError(f"{entry.name} was let go meanwhile: go on from here") from error
    except OSError as error:
        if not durable.is_damage(error):
            raise
        raise DamagedError(f"{entry.name} cannot be read: {error.strerror}") from error


def _damaged(entry: FileEntry) -> DamagedError:
    return DamagedError(f"{entry.name} does not have the checksum in its manifest")
