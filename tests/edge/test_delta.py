"""Deltas: the very bytes that were published, or an error, whatever they are made of."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

from inflora_core import delta
from inflora_core.delta import OnnxFile
from inflora_core.errors import DamagedError
from inflora_core.graph import key_weight, value_weight
from inflora_core.merge import merge
from inflora_core.model import Factors
from inflora_edge import Delta, DeltaError, apply
from inflora_edge.delta import MAGIC
from inflora_edge.merging import add_product

LAYERS = ("blocks.0.attn", "blocks.1.attn")
WIDTH = 40


def floats(rng: np.random.Generator, *shape: int) -> Any:
    return rng.normal(size=shape).astype(np.float32)


@given(st.integers(0, 2**32), st.integers(1, 70), st.integers(1, 40), st.integers(0, 5))
def test_a_product_is_the_same_transposed(seed: int, n: int, d: int, r: int) -> None:
    rng = np.random.default_rng(seed)
    weight, left, right = floats(rng, n, d), floats(rng, n, r), floats(rng, r, d)
    np.testing.assert_array_equal(
        add_product(weight, left, right), add_product(weight.T, right.T, left.T).T
    )
    exact = weight.astype(np.float64) + left.astype(np.float64) @ right.astype(np.float64)
    np.testing.assert_allclose(add_product(weight, left, right), exact, rtol=1e-5, atol=1e-5)


def test_factors_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be added"):
        add_product(*(np.zeros(shape, np.float32) for shape in ((4, 3), (4, 2), (1, 3))))


class Line:
    """Versions of a made-up model, each learned from the one before."""

    def __init__(self, seed: int, ranks: list[int]) -> None:
        rng = np.random.default_rng(seed)
        frozen = floats(rng, 3000)
        merged = {layer: floats(rng, 2 * WIDTH, WIDTH) for layer in LAYERS}
        self.factors: list[Mapping[str, Factors]] = []
        self.files = [OnnxFile(0, onnx_of(frozen, merged, floats(rng, 1, WIDTH)))]
        for number, rank in enumerate(ranks, 1):
            # A layer without free directions has no branch; and a task may adapt nothing.
            pairs = {
                layer: Factors(floats(rng, 2 * WIDTH, rank), floats(rng, rank, WIDTH))
                for layer in LAYERS[: 1 + number % 2]
            }
            merged = merged | {layer: merge(merged[layer], pairs[layer]) for layer in pairs}
            head = floats(rng, 1 + number, WIDTH)
            self.factors.append(pairs)
            self.files.append(OnnxFile(number, onnx_of(frozen, merged, head)))

    def delta(self, base: int, target: int) -> bytes:
        between = self.factors[base:target] if base <= target else []
        return delta.make(self.files[base], self.files[target], between)


def onnx_of(frozen: Any, merged: Mapping[str, Any], head: Any) -> bytes:
    arrays = {"frozen": frozen, "head.weight": head}
    for layer, weight in merged.items():
        key, value = np.split(weight, 2)
        arrays |= {key_weight(layer): key.T, value_weight(layer): value.T}
    nodes = [helper.make_node("Identity", [name], [f"{name}.out"]) for name in arrays]
    tensors = [numpy_helper.from_array(np.ascontiguousarray(x), name) for name, x in arrays.items()]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])], [], tensors
    )
    model = helper.make_model(graph)
    model.metadata_props.add(key="classes", value=json.dumps(["label"] * len(head)))
    content: bytes = model.SerializeToString()
    assert ModelProto.FromString(content) == model
    return content


def applied(base: bytes, content: bytes) -> bytes:
    return b"".join(Delta.read(content).applied(base))


@given(st.integers(0, 2**32), st.lists(st.integers(0, 6), min_size=1, max_size=4))
def test_step_by_step_and_at_once_give_the_published_bytes(seed: int, ranks: list[int]) -> None:
    line = Line(seed, ranks)
    content = line.files[0].content
    for number in range(len(ranks)):
        content = applied(content, line.delta(number, number + 1))
        assert content == line.files[number + 1].content
    assert applied(line.files[0].content, line.delta(0, len(ranks))) == content
    # Backwards, and to the same.
    assert applied(content, line.delta(len(ranks), 0)) == line.files[0].content
    assert applied(content, line.delta(len(ranks), len(ranks))) == content


def test_a_delta_has_what_changed_alone() -> None:
    line = Line(0, [3, 3])
    for base, target, most in ((0, 1, 0.35), (0, 2, 0.5), (1, 1, 0.05)):
        made = line.delta(base, target)
        assert made == line.delta(base, target), "the same bytes again"
        assert len(made) < most * len(line.files[target].content)
    read = Delta.read(line.delta(0, 1))
    assert (read.base.version, read.target.version) == (0, 1)
    kinds = [piece[0] for piece in read.pieces]
    assert kinds.count("merge") == 4
    assert {"copy", "data"} < set(kinds)


def test_factors_of_other_tasks_are_noticed_where_it_is_made() -> None:
    line = Line(0, [3, 3])
    for factors in (line.factors[:1], line.factors[::-1], []):
        if not factors:
            continue
        with pytest.raises(DamagedError, match="do not lead from version 0 to 2"):
            delta.make(line.files[0], line.files[2], factors)


def test_a_file_that_is_no_onnx_is_told() -> None:
    line = Line(0, [1])
    with pytest.raises(DamagedError):
        delta.make(line.files[0], OnnxFile(1, b"\x0f" * 10), [])


class TestApplying:
    @pytest.fixture
    def line(self) -> Line:
        return Line(1, [2, 2])

    @pytest.fixture
    def base(self, line: Line, tmp_path: Path) -> Path:
        path = tmp_path / "base.onnx"
        path.write_bytes(line.files[0].content)
        return path

    def test_it_makes_the_file(self, line: Line, base: Path) -> None:
        target = base.with_name("target.onnx")
        assert apply(base, line.delta(0, 2), target).target == line.files[2].end
        assert target.read_bytes() == line.files[2].content
        assert sorted(x.name for x in base.parent.iterdir()) == ["base.onnx", "target.onnx"]

    def test_in_place(self, line: Line, base: Path) -> None:
        apply(base, line.delta(0, 1), base)
        assert base.read_bytes() == line.files[1].content

    @pytest.mark.parametrize("change", ["shorter", "other"])
    def test_another_base_is_refused(self, line: Line, base: Path, change: str) -> None:
        content = line.files[0].content
        base.write_bytes(content[:-1] if change == "shorter" else content[:-1] + b"~")
        self.refused(base, line.delta(0, 1), "is not the file that the delta is for")

    def test_every_damage_is_refused(self, line: Line, base: Path) -> None:
        made = line.delta(0, 1)
        rng = np.random.default_rng(0)
        for place in [*range(40), *rng.integers(0, len(made), 60)]:
            damaged = bytearray(made)
            damaged[place] ^= 1 << int(rng.integers(8))
            self.refused(base, bytes(damaged), "no delta|damaged")
        for size in [*range(30), *rng.integers(0, len(made), 30)]:
            self.refused(base, made[:size], "no delta|damaged")

    def refused(self, base: Path, content: bytes, match: str) -> None:
        target = base.with_name("target.onnx")
        with pytest.raises(DeltaError, match=match):
            apply(base, content, target)
        assert [x.name for x in base.parent.iterdir()] == ["base.onnx"]

    @pytest.mark.parametrize(
        "pieces",
        [
            [["copy", -1, 4]],
            [["copy", 0, 10**9]],
            [["merge", 0, 4, 4, [[0, 7]]]],
            [["merge", 0, 2, 4, [[0, 0]]]],
            [["merge", 0, -4, -4, []]],
            [["merge", 0, 4, 4, 5]],
            [["move", 0, 4]],
            [[]],
            [["copy", 0.5, 4]],
            [["copy", 0, 30_000], ["copy", 0, 30_000]],
            [["data", 1e999]],
            [["data", "4"]],
        ],
        ids=str,
    )
    def test_pieces_out_of_reach_are_refused(
        self, line: Line, base: Path, pieces: list[Any]
    ) -> None:
        self.refused(base, packed(line, {"pieces": pieces}), "piece|larger|header")

    def test_a_delta_for_another_target_is_refused(self, line: Line, base: Path) -> None:
        target = vars(line.files[1].end) | {"sha256": hashlib.sha256(b"").hexdigest()}
        whole = [["copy", 0, line.files[0].end.size]]
        content = packed(line, {"target": target, "pieces": whole})
        self.refused(base, content, "does not give the file that it says")

    def test_no_more_memory_is_taken_than_the_header_says(self, line: Line, base: Path) -> None:
        bomb = packed(line, {"pieces": [["data", 10]]}, payload=bytes(2**24))
        self.refused(base, bomb, "not what its header says")
        for size, reason in ((2**60, "a size of"), (2**33, "holds 8589934592 bytes, more than")):
            header = packed(line, {"pieces": [["data", size]]}, payload=b"x")
            self.refused(base, header, reason)


def packed(line: Line, changes: dict[str, Any], payload: bytes = bytes(64)) -> bytes:
    """A delta by hand, with an array (4, 4) and then nothing."""
    header = {
        "base": vars(line.files[0].end),
        "target": vars(replace(line.files[1].end)),
        "arrays": [[4, 4]] if len(payload) == 64 else [],
        "pieces": [],
    } | changes
    text = json.dumps(header).encode()
    content = MAGIC + len(text).to_bytes(4, "little") + text + zlib.compress(payload)
    return content + hashlib.sha256(content).digest()
