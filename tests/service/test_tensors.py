"""Tensors of the Open Inference Protocol: laws of both forms, on generated contents."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from inflora.oip.v2 import open_inference_pb2 as pb
from inflora_core.config import Limits
from inflora_core.errors import InvalidInputError
from inflora_core.graph import ModelCard
from inflora_core.model import Preprocessing
from inflora_core.predictor import Answers, softmax
from inflora_service import tensors

LIMITS = Limits(predict_images=8)
FIELD = "raw_input_contents[0]"

elements = st.lists(st.binary(max_size=40), max_size=8)
labels = st.lists(st.text(min_size=1, max_size=10), min_size=1, max_size=6, unique=True)
images = arrays.arrays(np.uint8, st.tuples(*(st.integers(low, 6) for low in (1, 2, 2)), st.just(3)))


def encoded(contents: list[bytes], *, raw: bool, column: bool) -> pb.ModelInferRequest:
    """A request with images that need not be any."""
    shape = [len(contents), 1] if column else [len(contents)]
    tensor = pb.ModelInferRequest.InferInputTensor(
        name="encoded_images", datatype="BYTES", shape=shape
    )
    if raw:
        return pb.ModelInferRequest(
            inputs=[tensor], raw_input_contents=[tensors.pack_bytes(contents)]
        )
    tensor.contents.bytes_contents.extend(contents)
    return pb.ModelInferRequest(inputs=[tensor])


def pixels(values: np.ndarray, *, raw: bool) -> pb.ModelInferRequest:
    """A request with images that need not be decoded."""
    tensor = pb.ModelInferRequest.InferInputTensor(
        name="images", datatype="UINT8", shape=values.shape
    )
    if raw:
        return pb.ModelInferRequest(inputs=[tensor], raw_input_contents=[values.tobytes()])
    tensor.contents.uint_contents.extend(values.ravel().tolist())
    return pb.ModelInferRequest(inputs=[tensor])


@given(elements)
def test_bytes_come_back(contents: list[bytes]) -> None:
    packed = tensors.pack_bytes(contents)
    assert tensors.unpack_bytes(packed, len(contents), field=FIELD) == contents


@given(elements.filter(bool), st.data())
def test_bytes_that_are_cut_short_are_refused(contents: list[bytes], data: st.DataObject) -> None:
    packed = tensors.pack_bytes(contents)
    cut = data.draw(st.integers(0, len(packed) - 1))
    with pytest.raises(InvalidInputError, match="it ends within element") as caught:
        tensors.unpack_bytes(packed[:cut], len(contents), field=FIELD)
    assert caught.value.field == FIELD


@given(elements, st.binary(min_size=1))
def test_bytes_behind_the_last_are_refused(contents: list[bytes], more: bytes) -> None:
    packed = tensors.pack_bytes(contents) + more
    with pytest.raises(InvalidInputError, match=f"{len(more)} bytes are left") as caught:
        tensors.unpack_bytes(packed, len(contents), field=FIELD)
    assert caught.value.field == FIELD


@given(st.binary(max_size=64), st.integers(0, 8))
def test_whatever_is_taken_is_what_was_sent(raw: bytes, count: int) -> None:
    try:
        contents = tensors.unpack_bytes(raw, count, field=FIELD)
    except InvalidInputError:
        return
    assert len(contents) == count
    assert tensors.pack_bytes(contents) == raw


@given(elements.filter(bool), st.booleans(), st.booleans())
def test_encoded_images_come_in_either_form(contents: list[bytes], raw: bool, column: bool) -> None:
    assert tensors.decode_images(encoded(contents, raw=raw, column=column), LIMITS) == contents


@given(images, st.booleans())
def test_pixels_come_in_either_form(values: np.ndarray, raw: bool) -> None:
    found = tensors.decode_images(pixels(values, raw=raw), LIMITS)
    assert all(isinstance(image, np.ndarray) and image.dtype == np.uint8 for image in found)
    np.testing.assert_array_equal(np.stack(found), values)


@given(images, st.booleans(), st.integers(1, 20), st.booleans())
def test_pixels_that_do_not_fill_the_shape_are_refused(
    values: np.ndarray, raw: bool, count: int, more: bool
) -> None:
    request = pixels(values, raw=raw)
    if raw:
        content = request.raw_input_contents[0]
        request.raw_input_contents[0] = content + b"x" * count if more else content[:-count]
    else:
        numbers = request.inputs[0].contents.uint_contents
        if more:
            numbers.extend([1] * count)
        else:
            del numbers[-min(count, len(numbers)) :]
    with pytest.raises(InvalidInputError) as caught:
        tensors.decode_images(request, LIMITS)
    assert caught.value.field == (FIELD if raw else "inputs[0].contents")


@given(images, st.integers(256, 2**32 - 1), st.data())
def test_numbers_that_are_no_uint8_are_refused(
    values: np.ndarray, number: int, data: st.DataObject
) -> None:
    request = pixels(values, raw=False)
    numbers = request.inputs[0].contents.uint_contents
    numbers[data.draw(st.integers(0, len(numbers) - 1))] = number
    with pytest.raises(InvalidInputError, match=f"holds {number}") as caught:
        tensors.decode_images(request, LIMITS)
    assert caught.value.field == "inputs[0].contents"


@given(labels, st.integers(1, 4), st.integers(1, 2**64 - 1), st.data())
def test_an_answer_says_the_same_in_either_form(
    names: list[str], count: int, top_k: int, data: st.DataObject
) -> None:
    numbers = st.floats(-20, 20, width=32)
    logits = data.draw(arrays.arrays(np.float32, (count, len(names)), elements=numbers))
    embedding = data.draw(arrays.arrays(np.float32, (count, 3), elements=numbers))
    answers = Answers(logits, softmax(logits), embedding, np.zeros(count, np.float32))
    sizes = Preprocessing(8, 8, 8, 8, "bilinear", "squash", (0.0,) * 3, (1.0,) * 3)
    card = ModelCard(tuple(names), ("task",) * len(names), 1, sizes, (), {})
    wanted = data.draw(st.permutations(tensors.OUTPUTS))

    raw = tensors.encode_answer(answers, card, wanted, top_k, raw=True)
    listed = tensors.encode_answer(answers, card, wanted, top_k, raw=False)
    assert [output.name for output in raw.outputs] == wanted
    assert len(raw.raw_output_contents) == len(wanted)
    assert not listed.raw_output_contents
    for one, content, other in zip(
        raw.outputs, raw.raw_output_contents, listed.outputs, strict=True
    ):
        assert not one.contents.ListFields()
        assert (one.name, one.datatype, one.shape) == (other.name, other.datatype, other.shape)
        size = int(np.prod(one.shape))
        if one.datatype == "BYTES":
            texts = tensors.unpack_bytes(content, size, field="")
            assert texts == list(other.contents.bytes_contents)
            if one.name == "classes":
                assert [text.decode() for text in texts] == names
            else:
                assert list(one.shape) == [count, min(top_k, len(names))]
                best = [names[i] for i in logits.argmax(axis=1)]
                firsts = [text.decode() for text in texts[:: one.shape[1]]]
                assert firsts == best
        else:
            found = np.frombuffer(content, "<f4").reshape(one.shape)
            np.testing.assert_array_equal(found, getattr(answers, one.name))
            np.testing.assert_array_equal(found.ravel(), list(other.contents.fp32_contents))
