"""An update from one ONNX file of a model to another: what changed, and the hashes of both ends.

A task changes key and value weights by products of rank r, and what comes behind the backbone. So a
delta says of the new file, from its first byte to the last, where each piece comes from: a piece of
the old file, bytes that the delta has, or weights of the old file with products added, one task's
after the other's. Applied by anybody, it gives the very bytes that the server published.

The format, all numbers little-endian: ``MAGIC``; the header's size, 4 bytes; the header, JSON; the
payload, one zlib stream; the SHA-256 of all that comes before, 32 bytes. The payload holds the
header's ``arrays`` (float32, row after row), then the bytes of all ``data`` pieces, in order. The
header is an object with

* ``base`` and ``target``: objects with ``version``, ``size`` and ``sha256`` of the files;
* ``arrays``: a list of [rows, columns];
* ``pieces``: a list of ["copy", offset, size], ["data", size] and ["merge", offset, d, a,
  [[left, right], ...]]. Of the last, the weights at ``offset`` are (d, a) float32, and arrays
  ``left`` (d, r) and ``right`` (r, a) are multiplied, added and rounded, pair after pair.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from inflora_edge import files
from inflora_edge.errors import DeltaError
from inflora_edge.merging import Floats, add_product

MAGIC = b"\x89INFLORA-DELTA\r\n\x1a\n\x01"

_CHECKSUM = 32
_SHA256 = re.compile("[0-9a-f]{64}")
_FLOAT = np.dtype("<f4")
MORE = 2**26
"""Bytes that a delta may hold beyond the size of what it leads from."""

Buffer = bytes | memoryview

_MALFORMED = (ArithmeticError, IndexError, KeyError, RecursionError, TypeError, ValueError)


@dataclass(frozen=True)
class End:
    """One of the two files.

    Attributes:
        version: Its version's number, 0 for a file that is none.
        size: In bytes.
        sha256: Of all of it, 64 lower-case hexadecimal digits.
    """

    version: int
    size: int
    sha256: str

    def __post_init__(self) -> None:
        """Check what somebody sent."""
        _counted(self.version)
        _counted(self.size)
        if not _SHA256.fullmatch(str(self.sha256)):
            raise ValueError(f"a hash of {self.sha256!r}")


@dataclass(frozen=True)
class Delta:
    """A delta as it was read; see the module.

    Attributes:
        base: The file it is applied to.
        target: The file it gives.
        pieces: Of ``target``, in order.
        arrays: What ``merge`` pieces add.
        data: What ``data`` pieces hold, one after the other.
    """

    base: End
    target: End
    pieces: tuple[tuple[Any, ...], ...]
    arrays: tuple[Floats, ...]
    data: bytes

    @classmethod
    def read(cls, content: bytes, most: int = 2**31) -> Delta:
        """Read a delta.

        Args:
            content: Of its file.
            most: Bytes that may be taken for what it holds.

        Raises:
            DeltaError: it is not one, it is cut short or damaged, or holds more than that.
        """
        start = len(MAGIC) + 4
        if content[: len(MAGIC)] != MAGIC or len(content) < start + _CHECKSUM:
            raise DeltaError("this is no delta")
        content, checksum = content[:-_CHECKSUM], content[-_CHECKSUM:]
        if hashlib.sha256(content).digest() != checksum:
            raise DeltaError("the delta is cut short, or damaged")
        size = int.from_bytes(content[len(MAGIC) : start], "little")
        try:
            header = json.loads(content[start : start + size])
            base, target = (End(**header[name]) for name in ("base", "target"))
            pieces = tuple(tuple(piece) for piece in header["pieces"])
            shapes = [(int(rows), int(columns)) for rows, columns in header["arrays"]]
            wanted = sum(_counted(piece[1]) for piece in pieces if piece[0] == "data")
            for rows, columns in shapes:
                wanted += _FLOAT.itemsize * _counted(rows) * _counted(columns)
        except _MALFORMED as error:
            raise DeltaError(f"the delta's header is damaged: {error!r}") from error
        if wanted > most:
            raise DeltaError(f"the delta holds {wanted} bytes, more than {most}")
        payload = _inflated(content[start + size :], wanted)
        arrays, at = [], 0
        for rows, columns in shapes:
            flat = np.frombuffer(payload, _FLOAT, rows * columns, at)
            arrays.append(flat.reshape(rows, columns))
            at += flat.nbytes
        return cls(base, target, pieces, tuple(arrays), payload[at:])

    def applied(self, base: Buffer) -> Iterator[Buffer]:
        """Yield the target, piece after piece; it is right only if its hash is.

        Raises:
            DeltaError: a piece is not as the format has it.
        """
        whole, at = memoryview(base), 0
        for piece in self.pieces:
            try:
                match piece:
                    case ("copy", int(offset), int(size)):
                        yield _cut(whole, offset, size)
                    case ("data", int(size)):
                        yield _cut(memoryview(self.data), at, size)
                        at += size
                    case ("merge", int(offset), int(d), int(a), list(pairs)):
                        raw = _cut(whole, offset, _FLOAT.itemsize * d * a)
                        weight = np.frombuffer(raw, _FLOAT).reshape(d, a)
                        for left, right in pairs:
                            weight = add_product(weight, self.arrays[left], self.arrays[right])
                        yield weight.astype(_FLOAT, copy=False).tobytes()
                    case _:
                        raise DeltaError(f"the delta has a piece of an unknown kind: {piece[:1]}")
            except _MALFORMED as error:
                raise DeltaError(f"a piece of the delta is damaged: {error}") from error


def apply(base: Path, delta: bytes, target: Path) -> Delta:
    """Make the file that a delta leads to; ``target`` is there whole and right, or not at all.

    Args:
        base: The file that the delta is applied to.
        delta: Its content.
        target: Where to put the new file; on the same disk is a draft while it is being made.

    Returns:
        The delta, which says which version ``target`` is.

    Raises:
        DeltaError: it is damaged, or made for another file than ``base``.
        OSError: ``base`` cannot be read, or ``target`` cannot be written.
    """
    read = Delta.read(delta, base.stat().st_size + MORE)
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    with base.open("rb") as file:
        if not read.base.size or os.fstat(file.fileno()).st_size != read.base.size:
            raise DeltaError(f"{base} is not the file that the delta is for")
        # It is closed when nobody looks at it any more, the frames of an error among them.
        whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hashlib.sha256(whole).hexdigest() != read.base.sha256:
        raise DeltaError(f"{base} is not the file that the delta is for")
    try:
        _write(read, whole, draft)
        os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)
    files.sync_folder(target.parent)
    return read


def _write(delta: Delta, base: mmap.mmap, draft: Path) -> None:
    digest, size = hashlib.sha256(), 0
    with draft.open("wb") as file:
        for piece in delta.applied(memoryview(base)):
            size += len(piece)
            if size > delta.target.size:
                raise DeltaError("the delta gives a larger file than it says")
            digest.update(piece)
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    if digest.hexdigest() != delta.target.sha256:
        raise DeltaError("the delta does not give the file that it says")


def _counted(size: Any) -> int:
    if type(size) is not int or not 0 <= size < 2**40:
        raise ValueError(f"a size of {size!r}")
    return size


def _cut(whole: memoryview, offset: int, size: int) -> memoryview:
    if offset < 0 or size < 0 or offset + size > len(whole):
        raise ValueError(f"there are no bytes {offset} to {offset + size}")
    return whole[offset : offset + size]


def _inflated(payload: bytes, size: int) -> bytes:
    """Return the payload, of which it is known how much there is: no more memory is taken."""
    stream = zlib.decompressobj()
    try:
        content = stream.decompress(payload, size + 1)
    except zlib.error as error:
        raise DeltaError(f"the delta is damaged: {error}") from error
    if len(content) != size or not stream.eof or stream.unused_data:
        raise DeltaError("the delta's payload is not what its header says")
    return content
