"""``wire``: what is parted and put together again is what protobuf would have parsed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import GraphProto, ModelProto, TensorProto, helper, numpy_helper

from inflora_core import wire
from inflora_core.errors import DamagedError


@st.composite
def models(draw: Any) -> ModelProto:
    """Models with initializers small and large, and all that may lie between them."""
    sizes = draw(st.lists(st.sampled_from([0, 1, 900, 1024, 5000, 70_000]), max_size=6))
    graph = helper.make_graph(
        [helper.make_node("Identity", [f"in{i}"], [f"out{i}"]) for i in range(len(sizes))],
        draw(st.text(max_size=200)),
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 3])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)],
        [
            numpy_helper.from_array(np.full(size, i, np.float32), f"weight {i}")
            for i, size in enumerate(sizes)
        ],
    )
    model = helper.make_model(graph, ir_version=draw(st.integers(1, 2**40)))
    for text in draw(st.lists(st.text(max_size=20), max_size=3)):
        model.metadata_props.add(key="key", value=text)
    return model


def in_order(graph: GraphProto) -> GraphProto:
    """The same with its initializers by name."""
    sorted_graph = GraphProto()
    sorted_graph.CopyFrom(graph)
    sorted_graph.initializer.sort(key=lambda each: each.name)
    return sorted_graph


@given(models())
def test_nothing_is_lost_or_changed(model: ModelProto) -> None:
    rest, large = wire.part(model.SerializeToString())
    small = ModelProto.FromString(rest)
    assert len(small.graph.initializer) + len(large) == len(model.graph.initializer)
    assert all(len(each.raw_data) < 4096 for each in small.graph.initializer)
    again = ModelProto.FromString(b"".join(wire.appended(rest, large)))
    assert in_order(again.graph) == in_order(model.graph)
    for both in (again, model):
        both.ClearField("graph")
    assert again == model


@given(st.lists(st.lists(st.integers(1, 300), max_size=4), max_size=4), st.booleans())
def test_sides_are_counted_however_they_are_encoded(shapes: list[list[int]], packed: bool) -> None:
    tensors = []
    for number, shape in enumerate(shapes):
        encoded = TensorProto(name=f"weight {number}", raw_data=b"x" * 5000).SerializeToString()
        if packed and shape:
            sides = b"".join(map(varint, shape))
            encoded += b"\x0a" + varint(len(sides)) + sides
        else:
            encoded += TensorProto(dims=shape).SerializeToString()
        assert list(TensorProto.FromString(encoded).dims) == shape
        tensors.append(memoryview(b"\x2a" + varint(len(encoded)) + encoded))
    expected = {f"weight {number}": len(shape) for number, shape in enumerate(shapes)}
    assert wire.ranks(tensors) == expected


def varint(value: int) -> bytes:
    """As protobuf encodes a number."""
    head = bytearray()
    while value > 0x7F:
        head.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(head) + bytes([value])


@given(models(), st.data())
def test_what_is_cut_short_is_found_or_protobuf_takes_it_too(
    model: ModelProto, data: st.DataObject
) -> None:
    whole = model.SerializeToString()
    cut = whole[: data.draw(st.integers(0, len(whole)))]
    try:
        rest, large = wire.part(cut)
    except DamagedError:
        with pytest.raises(Exception, match="pars"):
            ModelProto.FromString(cut)
    else:
        ModelProto.FromString(b"".join(wire.appended(rest, large)))


@given(st.binary(max_size=100))
def test_anything_at_all_is_parted_or_damaged(content: bytes) -> None:
    try:
        rest, large = wire.part(content)
    except DamagedError:
        return
    assert len(b"".join(wire.appended(rest, large))) >= len(content) - 100
    assert not large  # there is no room for one
