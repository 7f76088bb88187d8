"""Deltas from one ONNX file to another (``inflora_edge.delta`` has the format). No torch."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from inflora_core import wire
from inflora_core.errors import DamagedError
from inflora_core.graph import key_weight, value_weight
from inflora_core.model import Array, Factors
from inflora_edge.delta import MAGIC, Delta, End
from inflora_edge.errors import DeltaError

_LEVEL = 6
"""Of zlib: what is trained does not shrink, but the triangle of the novelty's whitening does."""


@dataclass(frozen=True)
class OnnxFile:
    """A version's file.

    Attributes:
        version: The version's number.
        content: All of it.
    """

    version: int
    content: bytes

    @property
    def end(self) -> End:
        """What a delta says of it."""
        sha256 = hashlib.sha256(self.content).hexdigest()
        return End(self.version, len(self.content), sha256)


def make(base: OnnxFile, target: OnnxFile, factors: Sequence[Mapping[str, Factors]]) -> bytes:
    """Return the delta from one file to another of the same model.

    Args:
        base: What the receiver has.
        target: What it is to have.
        factors: Of the tasks between them by layer, first task first, if ``target`` was learned
            from ``base``. Else nothing: all weights that differ are in the delta as they are.

    Returns:
        The same bytes for the same arguments.

    Raises:
        DamagedError: one is no ONNX file, or ``factors`` do not lead from one to the other.
    """
    draft, end = _Draft(base.content, _by_weight(factors)), target.end
    for span in wire.spans(target.content):
        draft.add(span, memoryview(target.content))
    content = draft.packed(base.end, end)
    try:
        made = hashlib.sha256()
        for piece in Delta.read(content).applied(base.content):
            made.update(piece)
    except DeltaError as error:
        raise DamagedError(f"no delta leads to version {target.version}: {error}") from error
    if made.hexdigest() != end.sha256:
        raise DamagedError(
            f"the factors of its tasks do not lead from version {base.version} to "
            f"{target.version}: one of the files is damaged"
        )
    return content


@dataclass(frozen=True)
class _Product:
    """What one task adds to a weight (d, a): ``left`` (d, r) times ``right`` (r, a)."""

    layer: str
    left: Array
    right: Array


def _by_weight(tasks: Sequence[Mapping[str, Factors]]) -> dict[str, list[_Product]]:
    """Return what is added to each initializer; in the file, weights lie transposed."""
    found: dict[str, list[_Product]] = defaultdict(list)
    for number, layers in enumerate(tasks):
        for layer, pair in layers.items():
            if not len(pair.reduction):
                continue
            halves = np.split(pair.expansion, 2)
            for name, half in zip((key_weight(layer), value_weight(layer)), halves, strict=True):
                found[name].append(_Product(f"{number} {layer}", pair.reduction.T, half.T))
    return found


class _Draft:
    """A delta in the making: pieces of the target so far."""

    def __init__(self, base: bytes, products: Mapping[str, Sequence[_Product]]) -> None:
        self._base = memoryview(base)
        self._products = products
        self._pieces: list[list[Any]] = []
        self._arrays: list[Array] = []
        self._data = bytearray()
        self._shared: dict[str, int] = {}
        self._weights: dict[str, wire.Span] = {}
        self._known: dict[bytes, list[int]] = defaultdict(list)
        for span in wire.spans(base):
            if span.name:
                self._weights[span.name] = span
            self._known[_digest(self._base[span.start : span.end])].append(span.start)

    def add(self, span: wire.Span, target: memoryview) -> None:
        """Say where the next bytes of the target come from."""
        content = target[span.start : span.end]
        products, weight = self._products.get(span.name), self._weights.get(span.name)
        if products and weight is not None and span.raw and weight.raw:
            before, after = slice(span.start, span.raw[0]), slice(span.raw[1], span.end)
            self._literal(target[before])
            self._merge(weight.raw, products)
            self._literal(target[after])
            return
        places = self._known.get(_digest(content))
        if not places:
            self._literal(content)
            return
        last = self._last("copy")
        if last and last[1] + last[2] in places:
            last[2] += len(content)
        else:
            self._pieces.append(["copy", places[0], len(content)])

    def packed(self, base: End, target: End) -> bytes:
        """Return the file."""
        header = {
            "base": asdict(base),
            "target": asdict(target),
            "arrays": [list(array.shape) for array in self._arrays],
            "pieces": self._pieces,
        }
        text = json.dumps(header, separators=(",", ":"), sort_keys=True).encode()
        raw = b"".join(np.ascontiguousarray(x, "<f4").tobytes() for x in self._arrays)
        payload = zlib.compress(raw + self._data, _LEVEL)
        content = MAGIC + len(text).to_bytes(4, "little") + text + payload
        return content + hashlib.sha256(content).digest()

    def _literal(self, content: memoryview) -> None:
        if not content:
            return
        if last := self._last("data"):
            last[1] += len(content)
        else:
            self._pieces.append(["data", len(content)])
        self._data += content

    def _last(self, kind: str) -> list[Any] | None:
        """Return the last piece, if it is of that kind and can be made longer."""
        return self._pieces[-1] if self._pieces and self._pieces[-1][0] == kind else None

    def _merge(self, raw: tuple[int, int], products: Sequence[_Product]) -> None:
        pairs = []
        for product in products:
            # Keys and values of a layer share its reduction.
            if product.layer not in self._shared:
                self._shared[product.layer] = len(self._arrays)
                self._arrays.append(product.left)
            pairs.append([self._shared[product.layer], len(self._arrays)])
            self._arrays.append(product.right)
        d, a = len(products[0].left), products[0].right.shape[1]
        self._pieces.append(["merge", raw[0], d, a, pairs])


def _digest(content: memoryview) -> bytes:
    return hashlib.sha256(content).digest()
