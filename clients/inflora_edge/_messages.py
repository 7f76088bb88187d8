"""The two messages that a device needs, encoded by hand.

Generated code needs a protobuf as new as its generator; onnxruntime brings whichever it likes.

Field numbers are those of ``proto/inflora/v1/model_service.proto``; what is unknown is passed over.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from inflora_edge import varint

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class Artifact:
    """A file as it is announced.

    Attributes:
        name: Of the file.
        size: In bytes.
        sha256: 64 lower-case hexadecimal digits.
    """

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Piece:
    """``DownloadArtifactResponse``.

    Attributes:
        data: Bytes from ``offset`` on.
        offset: Of the first.
        artifact: In the first message: the whole file.
        version: In the first message: whose it is.
    """

    data: bytes
    offset: int
    artifact: Artifact | None
    version: str


def request(name: str, artifact: str, offset: int, held: Sequence[str]) -> bytes:
    """Encode ``DownloadArtifactRequest``."""
    fields = [(1, name), (2, artifact), *((4, sha256) for sha256 in held)]
    encoded = b"".join(_text(number, value) for number, value in fields if value)
    return encoded + (varint.encoded(3 << 3 | _VARINT) + varint.encoded(offset) if offset else b"")


def piece(message: bytes) -> Piece:
    """Decode ``DownloadArtifactResponse``.

    Raises:
        ValueError: it is not encoded as protobuf is.
    """
    data, offset, artifact, version = b"", 0, None, ""
    for number, value in _fields(message):
        match number, value:
            case 1, bytes():
                data = value
            case 2, int():
                offset = value
            case 3, bytes():
                artifact = _artifact(value)
            case 4, bytes():
                version = value.decode()
    return Piece(data, offset, artifact, version)


def _artifact(message: bytes) -> Artifact:
    name, size, sha256 = "", 0, ""
    for number, value in _fields(message):
        match number, value:
            case 1, bytes():
                name = value.decode()
            case 2, int():
                size = value
            case 3, bytes():
                sha256 = value.decode()
    return Artifact(name, size, sha256)


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    at = 0
    while at < len(message):
        tag, at = varint.read(message, at)
        kind = tag & 7
        if kind == _VARINT:
            value, at = varint.read(message, at)
            yield tag >> 3, value
            continue
        if kind == _BYTES:
            size, at = varint.read(message, at)
        elif kind in (_FIXED64, _FIXED32):
            size = 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if at + size > len(message):
            raise ValueError("the message is cut short")
        if kind == _BYTES:
            yield tag >> 3, message[at : at + size]
        at += size


def _text(number: int, value: str) -> bytes:
    content = value.encode()
    return varint.encoded(number << 3 | _BYTES) + varint.encoded(len(content)) + content
