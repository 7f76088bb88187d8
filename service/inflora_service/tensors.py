"""The tensors of the Open Inference Protocol: what requests hold, and what answers do.

Pure functions. Tensors come, and go, in one of two forms: raw, as bytes beside all tensors, or as a
list within each of them. An answer has the form of its request.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from inflora.oip.v2 import open_inference_pb2 as pb
from inflora_core.config import Limits
from inflora_core.errors import InvalidInputError
from inflora_core.graph import EMBEDDING, IMAGES, LOGITS, NOVELTY, PROBABILITIES, ModelCard
from inflora_core.images import check_sides
from inflora_core.predictor import Answers, top_classes
from inflora_service.names import short
from inflora_service.serving import check_count
from inflora_service.turns import Source

ENCODED_IMAGES = "encoded_images"
LABELS = "labels"
CLASSES = "classes"

BYTES, FP32, UINT8 = "BYTES", "FP32", "UINT8"

INPUTS = {ENCODED_IMAGES: (BYTES, (-1,)), IMAGES: (UINT8, (-1, -1, -1, 3))}
"""Datatype and shape of each; a request has one of them."""

OUTPUTS = (LABELS, PROBABILITIES, LOGITS, NOVELTY, EMBEDDING, CLASSES)
UNASKED = (LABELS, PROBABILITIES, LOGITS, NOVELTY)
"""What is answered where a request does not say what it wants."""

TOP_K = "top_k"

_CONTENTS = {BYTES: "bytes_contents", UINT8: "uint_contents"}
_RAW = "raw_input_contents"
_SHAPE = "inputs[0].shape"

_OTHER_FORMS = ("classification", "shared_memory_region")
"""Parameters of outputs that ask for them in another form, which must not be passed over."""


def describe_inputs() -> list[pb.ModelMetadataResponse.TensorMetadata]:
    """Return the tensors that a request has one of."""
    return [
        pb.ModelMetadataResponse.TensorMetadata(name=name, datatype=datatype, shape=shape)
        for name, (datatype, shape) in INPUTS.items()
    ]


def describe_outputs(
    classes: int, embedding_size: int
) -> list[pb.ModelMetadataResponse.TensorMetadata]:
    """Return the tensors that a request can ask for.

    Args:
        classes: How many the version knows, -1 where that varies.
        embedding_size: Width of the embedding.
    """
    shapes = {
        LABELS: (-1, -1),
        PROBABILITIES: (-1, classes),
        LOGITS: (-1, classes),
        NOVELTY: (-1,),
        EMBEDDING: (-1, embedding_size),
        CLASSES: (classes,),
    }
    return [
        pb.ModelMetadataResponse.TensorMetadata(
            name=name, datatype=_output_type(name), shape=shapes[name]
        )
        for name in OUTPUTS
    ]


def decode_images(request: pb.ModelInferRequest, limits: Limits) -> list[Source]:
    """Return the images of a request.

    Raises:
        InvalidInputError: its one input is not as ``INPUTS`` has it.
        LimitExceededError: there are too many images.
    """
    if len(request.inputs) != 1:
        raise InvalidInputError(
            f"send one input, {' or '.join(INPUTS)}, not {len(request.inputs)}", field="inputs"
        )
    name, datatype = request.inputs[0].name, request.inputs[0].datatype
    if name not in INPUTS:
        raise InvalidInputError(
            f"there is no input {short(name)}, only {' and '.join(INPUTS)}", field="inputs[0].name"
        )
    if datatype != INPUTS[name][0]:
        raise InvalidInputError(
            f"{name} is {INPUTS[name][0]}, not {short(datatype)}", field="inputs[0].datatype"
        )
    shape = tuple(request.inputs[0].shape)
    return list(
        _encoded(request, shape, limits)
        if name == ENCODED_IMAGES
        else _pixels(request, shape, limits)
    )


def _encoded(
    request: pb.ModelInferRequest, shape: tuple[int, ...], limits: Limits
) -> Sequence[bytes]:
    if len(shape) not in (1, 2) or shape[0] < 0 or shape[1:] not in ((), (1,)):
        raise InvalidInputError(
            f"{ENCODED_IMAGES} is [n] or [n, 1], not {_said(shape)}", field=_SHAPE
        )
    # First: millions of empty elements fit a message.
    check_count(shape[0], limits, field=_SHAPE)
    raw = _raw(request)
    if raw is not None:
        return unpack_bytes(raw, shape[0], field=f"{_RAW}[0]")
    return _listed(request, shape[0]).bytes_contents


def _pixels(
    request: pb.ModelInferRequest, shape: tuple[int, ...], limits: Limits
) -> NDArray[np.uint8]:
    if len(shape) != 4 or min(shape) < 0 or shape[3] != 3:
        raise InvalidInputError(
            f"{IMAGES} is [n, height, width, 3], not {_said(shape)}", field=_SHAPE
        )
    count, height, width, channels = shape
    check_count(count, limits, field=_SHAPE)
    check_sides(width, height, limits, field=_SHAPE)
    size = count * height * width * channels
    raw = _raw(request)
    if raw is None:
        values = np.fromiter(_listed(request, size).uint_contents, np.uint32, size)
        if values.max() > 255:
            raise InvalidInputError(
                f"{IMAGES} holds {values.max()}, and UINT8 0 to 255", field="inputs[0].contents"
            )
        return values.astype(np.uint8).reshape(shape)
    if len(raw) != size:
        raise InvalidInputError(
            f"{_said(shape)} of UINT8 takes {size} bytes, not {len(raw)}", field=f"{_RAW}[0]"
        )
    return np.frombuffer(raw, np.uint8).reshape(shape)


def _raw(request: pb.ModelInferRequest) -> bytes | None:
    """Return the raw content of the input, None if it has that of its own."""
    if not request.raw_input_contents:
        return None
    if request.inputs[0].contents.ListFields():
        raise InvalidInputError(
            f"{request.inputs[0].name} has its content here and in {_RAW}: send one of them",
            field="inputs[0].contents",
        )
    if len(request.raw_input_contents) != 1:
        raise InvalidInputError(
            f"it has {len(request.raw_input_contents)} entries for 1 input", field=_RAW
        )
    return request.raw_input_contents[0]


def _listed(request: pb.ModelInferRequest, size: int) -> pb.InferTensorContents:
    """Return the input's own content, which has ``size`` elements in the field of its datatype."""
    (tensor,) = request.inputs
    wanted, filled = _CONTENTS[tensor.datatype], tensor.contents.ListFields()
    other = [field.name for field, _ in filled if field.name != wanted]
    found = len(getattr(tensor.contents, wanted))
    if other or found != size:
        raise InvalidInputError(
            f"{_said(tensor.shape)} of {tensor.datatype} takes {size} elements in {wanted}, "
            f"not {found}" + (f" and some in {other[0]}" if other else ""),
            field="inputs[0].contents",
        )
    return tensor.contents


def unpack_bytes(raw: bytes, count: int, *, field: str) -> list[bytes]:
    """Return the elements of a raw ``BYTES`` tensor.

    Args:
        raw: Each element behind its length, 4 bytes little-endian.
        count: How many there are.
        field: What errors name.

    Raises:
        InvalidInputError: it has fewer elements, or more.
    """
    elements: list[bytes] = []
    at = 0
    while len(elements) < count:
        start = at + 4
        at = start + int.from_bytes(raw[at:start], "little")
        if max(start, at) > len(raw):
            raise InvalidInputError(
                f"it ends within element {len(elements)} of {count} (each has its length before "
                "it, 4 bytes little-endian)",
                field=field,
            )
        elements.append(raw[start:at])
    if at < len(raw):
        raise InvalidInputError(
            f"{len(raw) - at} bytes are left behind its {count} elements", field=field
        )
    return elements


def pack_bytes(elements: Sequence[bytes]) -> bytes:
    """Return the raw ``BYTES`` tensor of some elements."""
    return b"".join(struct.pack("<I", len(each)) + each for each in elements)


def decode_top_k(request: pb.ModelInferRequest) -> int:
    """Return how many labels a request asks for, for each image.

    Raises:
        InvalidInputError: that is no number, or too low.
    """
    if TOP_K not in request.parameters:
        return 1
    parameter = request.parameters[TOP_K]
    kind = parameter.WhichOneof("parameter_choice")
    if kind not in ("int64_param", "uint64_param") or getattr(parameter, kind) < 1:
        raise InvalidInputError("it is an integer, at least 1", field=f"parameters[{TOP_K}]")
    return int(getattr(parameter, kind))


def decode_outputs(request: pb.ModelInferRequest) -> Sequence[str]:
    """Return the names of the outputs that a request asks for.

    Raises:
        InvalidInputError: there is no such output, or not in the form that is asked for, or it is
            asked for twice.
    """
    names = [output.name for output in request.outputs]
    for i, output in enumerate(request.outputs):
        if output.name not in OUTPUTS:
            raise InvalidInputError(
                f"there is no output {short(output.name)}, only {', '.join(OUTPUTS)}",
                field=f"outputs[{i}].name",
            )
        if output.name in names[:i]:
            raise InvalidInputError(
                f"{output.name} is asked for already", field=f"outputs[{i}].name"
            )
        for parameter in _OTHER_FORMS:
            if parameter in output.parameters:
                raise InvalidInputError(
                    "the server does not have this extension",
                    field=f"outputs[{i}].parameters[{parameter}]",
                )
    return names or UNASKED


def encode_answer(
    answers: Answers, card: ModelCard, outputs: Sequence[str], top_k: int, *, raw: bool
) -> pb.ModelInferResponse:
    """Return the tensors that were asked for, in their order.

    Args:
        answers: What the model says.
        card: Of the version that says it.
        outputs: Which tensors.
        top_k: How many labels for each image.
        raw: In which form.
    """
    response = pb.ModelInferResponse()
    for name in outputs:
        shape, values = _output(name, answers, card, top_k)
        tensor = response.outputs.add(name=name, datatype=_output_type(name), shape=shape)
        if isinstance(values, list):
            if raw:
                response.raw_output_contents.append(pack_bytes(values))
            else:
                tensor.contents.bytes_contents.extend(values)
        elif raw:
            response.raw_output_contents.append(values.astype("<f4", copy=False).tobytes())
        else:
            tensor.contents.fp32_contents.extend(values.ravel().tolist())
    return response


def _output(
    name: str, answers: Answers, card: ModelCard, top_k: int
) -> tuple[tuple[int, ...], NDArray[np.float32] | list[bytes]]:
    """Return the shape of an output, and what it holds."""
    if name == CLASSES:
        return (len(card.classes),), [label.encode() for label in card.classes]
    if name == LABELS:
        rows = top_classes(answers, card, top_k)
        return (len(rows), len(rows[0])), [label.encode() for row in rows for label, _ in row]
    values: NDArray[np.float32] = getattr(answers, name)
    return values.shape, values


def _output_type(name: str) -> str:
    return BYTES if name in (LABELS, CLASSES) else FP32


def _said(shape: Sequence[int]) -> str:
    """Return a shape as error messages have it, which is cut if it is long."""
    more = ", ..." if len(shape) > 8 else ""
    return f"[{', '.join(map(str, shape[:8]))}{more}]"
