"""Parts an ONNX file's weights from the rest as it lies in memory, where parsing would copy them.

A server loads versions while it answers. protobuf holds Python's lock for as long as it parses or
serialises, which for the weights of a ViT-B is half a second in which no call can be answered; this
looks at the few bytes between them. Field numbers and wire types are those of onnx.proto and of
protobuf's encoding specification.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from inflora_core.errors import DamagedError
from inflora_edge import varint

_GRAPH = 7
"""Field of ``ModelProto``."""
_INITIALIZER = 5
"""Field of ``GraphProto``."""
_DIMS, _NAME, _RAW_DATA = 1, 8, 9
"""Fields of ``TensorProto``."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED = {_FIXED64: 8, _FIXED32: 4}

_LARGE = 4096
"""Bytes from which on an initializer is set apart."""


def part(model: bytes) -> tuple[bytes, list[memoryview]]:
    """Part a file's large initializers from the rest.

    Returns:
        An ONNX file without them, and they themselves as they lie in ``model``; see ``appended``.

    Raises:
        DamagedError: if ``model`` is not encoded as protobuf is.
    """
    rest, large = bytearray(), []
    for number, whole, graph in _fields(memoryview(model)):
        if number != _GRAPH:
            rest += whole
            continue
        kept = bytearray()
        for inner, field, content in _fields(graph):
            if inner == _INITIALIZER and len(content) >= _LARGE:
                large.append(field)
            else:
                kept += field
        rest += _tag(_GRAPH, len(kept)) + kept
    return bytes(rest), large


@dataclass(frozen=True)
class Span:
    """Where a piece of a file is. All of them are all of its bytes, in order.

    Attributes:
        start: Its first byte.
        end: Behind its last.
        name: Of an initializer; else empty.
        raw: Where its values are, if they are raw bytes.
    """

    start: int
    end: int
    name: str = ""
    raw: tuple[int, int] | None = None


def spans(model: bytes) -> Iterator[Span]:
    """Yield the fields of a file, of its graph, and each initializer.

    Raises:
        DamagedError: if ``model`` is not encoded as protobuf is.
    """
    message, at = memoryview(model), 0
    for number, whole, content in _fields(message):
        start, at = at, at + len(whole)
        if number != _GRAPH:
            yield Span(start, at)
            continue
        inner = at - len(content)
        yield Span(start, inner)
        for kind, field, tensor in _fields(content):
            first, inner = inner, inner + len(field)
            if kind == _INITIALIZER:
                yield _initializer(tensor, first, inner)
            else:
                yield Span(first, inner)


def _initializer(tensor: memoryview, start: int, end: int) -> Span:
    name, raw, at = "", None, end - len(tensor)
    for number, whole, content in _fields(tensor):
        at += len(whole)
        if number == _NAME:
            name = str(content, "utf-8")
        elif number == _RAW_DATA:
            raw = at - len(content), at
    return Span(start, end, name, raw)


def appended(model: bytes, initializers: list[memoryview]) -> list[bytes | memoryview]:
    """Return the pieces of a file that is ``model`` with more initializers.

    They come as a second graph, which whoever parses the file merges with the first: that is what
    protobuf's specification asks for where a field that is not repeated occurs again.
    """
    return [model, _tag(_GRAPH, sum(map(len, initializers))), *initializers]


def joined(model: bytes, initializers: list[bytes]) -> bytes:
    """Return a file that is ``model`` with more initializers, fields of its graph, in that."""
    pieces: list[bytes | memoryview] = []
    for number, whole, graph in _fields(memoryview(model)):
        if number == _GRAPH:
            pieces += [_tag(_GRAPH, len(graph) + sum(map(len, initializers))), graph, *initializers]
        else:
            pieces.append(whole)
    return b"".join(pieces)


def ranks(initializers: list[memoryview]) -> dict[str, int]:
    """Return how many sides each of the initializers of ``part`` has, by its name."""
    found: dict[str, int] = {}
    for initializer in initializers:
        ((_, _, tensor),) = _fields(initializer)
        name, sides = "", 0
        for number, _, content in _fields(tensor):
            if number == _NAME:
                name = str(content, "utf-8")
            elif number == _DIMS:  # one in each field, or all of them packed in one
                sides += sum(byte < 0x80 for byte in content) if content else 1
        found[name] = sides
    return found


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview, memoryview]]:
    """Yield the number of each field, all of its bytes, and its content (empty for numbers)."""
    at = 0
    while at < len(message):
        start = at
        tag, at = _varint(message, at)
        kind, content = tag & 7, at
        if kind == _VARINT:
            _, at = _varint(message, at)
            content = at
        elif kind == _BYTES:
            size, content = _varint(message, at)
            at = content + size
        elif kind in _FIXED:
            content = at = at + _FIXED[kind]
        else:
            raise DamagedError(f"not an ONNX file: wire type {kind}")
        if at > len(message):
            raise DamagedError("not an ONNX file, or cut short")
        yield tag >> 3, message[start:at], message[content:at]


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """Return the number at a position, and the position after it."""
    try:
        return varint.read(message, at)
    except ValueError as error:
        raise DamagedError("not an ONNX file, or cut short") from error


def _tag(number: int, size: int) -> bytes:
    """Return what comes before the content of a field that has a length."""
    return varint.encoded(number << 3 | _BYTES) + varint.encoded(size)
