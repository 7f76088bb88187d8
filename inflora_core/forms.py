"""Smaller forms of a version's file, for devices: the same graph with coarser weights. No torch.

``fp16`` keeps the weights of the backbone in 16 bits. They are widened once, when the file is
opened, and computed with in float32: half the size, no less speed on any processor, and answers
that differ in the third digit.

``int8`` multiplies 8-bit integers where a MatMul has weights: those have a scale for each column,
what is multiplied with them is rounded as it comes. The first block stays as in ``fp16``: what it
rounds, all others see, and it costs a third of all disagreement.

Head and novelty stay float32 in both, and work for tokens that nobody looks at is left out
(``passes.first_token``). A form is a pure function of the version's file, in arithmetic that gives
the same bits on every processor: it is made when it is asked for, and has the checksum that the
manifest lists. How alike its answers are was measured when its task was learned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from inflora_core import wire
from inflora_core.errors import DamagedError
from inflora_core.graph import (
    EMBEDDING,
    LOGITS,
    PROBABILITIES,
    behind,
    key_weight,
    parse,
    read_metadata,
    serialise,
)
from inflora_core.model import Agreement, FileEntry
from inflora_core.passes import first_token
from inflora_core.predictor import each_alone

FORM = "form"
"""The key of a file's metadata under which its form is."""

_LARGEST = 100
"""Of a weight's integers. Processors of before VNNI add two products of 8 bits in 16, and what
does not fit there is cut off: at 127 one sum in thirty, which changes more answers than the finer
steps save; at 100 one in two thousand."""

_SMALL = 1024
"""Numbers of an initializer that is left as it is."""


def halved(model: bytes) -> bytes:
    """Return a version's file with float16 weights, ``fp16``.

    Raises:
        DamagedError: if ``model`` is not a composed file.
    """
    return _coarser(model, "fp16", lambda nodes, layers: [])


def quantised(model: bytes) -> bytes:
    """Return a version's file with 8-bit MatMuls, ``int8``.

    Raises:
        DamagedError: if ``model`` is not a composed file.
    """
    return _coarser(model, "int8", _behind_first_block)


FORMS: dict[str, Callable[[bytes], bytes]] = {"fp16": halved, "int8": quantised}
"""What makes each of them."""

IMAGES = {"fp16": 16, "int8": 32}
"""Images of a task that each is compared with ``model.onnx`` on, at the most. Coarser weights are
as good for one image as for the next, but what is rounded as it comes is another with each. More
would tell more; 30 of them take a hundredth of a small task's time."""


def file_of(form: str) -> str:
    """Return the name under which a form is downloaded."""
    return f"model.{form}.onnx"


def form_of(name: str) -> str | None:
    """Return which form has a name, None if it is none's."""
    return next((form for form in FORMS if file_of(form) == name), None)


Answers = tuple[NDArray[np.intp], NDArray[np.float32]]
"""Of n images: (n,) the positions of the likeliest classes, (n, classes) probabilities."""


def answers(
    model: bytes,
    images: Sequence[NDArray[np.uint8]],
    threads: int,
    step: Callable[[], None] = lambda: None,
) -> Answers:
    """Return what a version's file, in any form, says of images, one at a time as devices do.

    Args:
        model: The file.
        images: At least one, each (h, w, 3) uint8 of any size.
        threads: To use.
        step: Called after each image; what it raises ends this.
    """
    found = []
    for answer in each_alone(model, [LOGITS, PROBABILITIES], images, threads):
        found.append(answer)
        step()
    logits, probabilities = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
    return logits.argmax(axis=1), probabilities


def of_some(answers: Answers, which: slice) -> Answers:
    """Return the answers for some of the images."""
    labels, probabilities = answers
    return labels[which], probabilities[which]


def agreement(one: Answers, other: Answers) -> Agreement:
    """Return how alike the answers of two files for the same images are."""
    (labels, probabilities), (others, their_probabilities) = one, other
    distance = 0.5 * np.abs(probabilities - their_probabilities).sum(axis=1).mean()
    return Agreement(
        images=len(labels),
        differing=int((labels != others).sum()),
        # What is not a number is as far away as can be.
        distance=float(np.clip(np.nan_to_num(distance, nan=1.0), 0, 1)),
    )


def made(form: str, model: bytes) -> tuple[bytes, FileEntry]:
    """Return a form of a version's file, and what a manifest says of it.

    Raises:
        DamagedError: if ``model`` is not a composed file.
    """
    content = FORMS[form](model)
    return content, FileEntry.of(file_of(form), content)


def _coarser(
    model: bytes,
    form: str,
    choose: Callable[[Sequence[NodeProto], Sequence[str]], Iterable[NodeProto]],
) -> bytes:
    """Return a form of a file: some products in integers, the other weights in float16.

    Weights are looked at one by one, as they lie in the file: parsed as a whole they would take
    three times its size in memory, beside a server's versions.

    Args:
        model: The file.
        form: What it is called.
        choose: Returns nodes of the backbone, of which MatMuls with weights become integer ones.
    """
    skeleton, large = wire.part(model)
    proto = parse(first_token(skeleton, wire.ranks(large)))
    graph = proto.graph
    end = behind(graph, EMBEDDING)
    if not end:
        raise DamagedError(f"the ONNX file has no {EMBEDDING!r}")
    backbone = list(graph.node[:end])
    read = {name for node in backbone for name in node.input}
    chosen = choose(backbone, read_metadata(proto).layers)
    products = {node.output[0]: node.input[1] for node in chosen if node.op_type == "MatMul"}
    # What something else reads, too, is needed as it is.
    wanted = set(products.values()).difference(
        name
        for node in graph.node
        for place, name in enumerate(node.input)
        if place != 1 or node.output[0] not in products
    )

    def changed(tensor: TensorProto) -> Sequence[TensorProto]:
        if tensor.data_type == TensorProto.FLOAT and tensor.name in read:
            if tensor.name in wanted and len(tensor.dims) == 2:
                return _integers(tensor)
            return [_halves(tensor)]
        return [tensor]

    kept = [new for tensor in graph.initializer for new in changed(tensor)]
    weights, names = [], {new.name for new in kept}
    for raw in large:
        for new in changed(GraphProto.FromString(bytes(raw)).initializer[0]):
            names.add(new.name)
            weights.append(GraphProto(initializer=[new]).SerializeToString(deterministic=True))
    nodes = [
        helper.make_node("Cast", [name], [name.removesuffix(_HALF)], to=TensorProto.FLOAT)
        for name in sorted(names)
        if name.endswith(_HALF)
    ]
    rounded: set[str] = set()
    for node in graph.node:
        if f"{products.get(node.output[0])}{_INT}" in names:
            nodes += _integer_product(node, first=node.input[0] not in rounded)
            rounded.add(node.input[0])
        else:
            nodes.append(node)
    if rounded:
        kept.append(numpy_helper.from_array(np.zeros((), np.int8), _ZERO))
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(kept)
    said = proto.metadata_props.add()
    said.key, said.value = FORM, form
    return wire.joined(serialise(proto), weights)


_HALF, _INT, _SCALE, _ZERO = ".fp16", ".int8", ".scale", "int8.zero"
"""What is put behind the names of weights, and the name of the zero point of all of them."""


def _behind_first_block(nodes: Sequence[NodeProto], layers: Sequence[str]) -> Sequence[NodeProto]:
    """Return the nodes from the second block's attention on; all where there is no other block."""
    if len(layers) < 2:
        return nodes
    inputs = {node.input[0] for node in nodes if key_weight(layers[1]) in node.input}
    if not inputs:
        raise DamagedError(f"no node reads {key_weight(layers[1])}")
    start = next(i for i, node in enumerate(nodes) if inputs.intersection(node.input))
    return nodes[start:]


def _halves(tensor: TensorProto) -> TensorProto:
    values = numpy_helper.to_array(tensor)
    # What float16 has no number for would be infinite.
    if values.size < _SMALL or not np.abs(values).max() <= np.finfo(np.float16).max:
        return tensor
    return numpy_helper.from_array(values.astype(np.float16), tensor.name + _HALF)


def _integers(tensor: TensorProto) -> list[TensorProto]:
    """Return the integers of a weight (d, a), and the scale of each column (a,)."""
    values = numpy_helper.to_array(tensor)
    columns = np.abs(values).max(axis=0)
    # Too little for a scale of its own is nothing: numbers this small differ between processors.
    columns = np.where(columns >= _LARGEST * np.finfo(np.float32).tiny, columns, np.inf)
    scale = (np.where(np.isfinite(columns), columns, _LARGEST) / np.float32(_LARGEST)).astype(
        np.float32
    )
    return [
        numpy_helper.from_array(np.rint(values / scale).astype(np.int8), tensor.name + _INT),
        numpy_helper.from_array(scale, tensor.name + _SCALE),
    ]


def _integer_product(node: NodeProto, *, first: bool) -> list[NodeProto]:
    """Return what computes a MatMul in integers; runtimes know the pattern, and fuse it.

    Args:
        node: The MatMul.
        first: Whether what it multiplies has to be rounded yet.
    """
    x, weight, y = node.input[0], node.input[1], node.output[0]
    rounding = helper.make_node(
        "DynamicQuantizeLinear", [x], [f"{x}{_INT}", f"{x}{_SCALE}", f"{x}.zero"]
    )
    return [
        *([rounding] if first else []),
        helper.make_node(
            "MatMulInteger", [f"{x}{_INT}", f"{weight}{_INT}", f"{x}.zero", _ZERO], [f"{y}.int32"]
        ),
        helper.make_node("Cast", [f"{y}.int32"], [f"{y}.float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{x}{_SCALE}", f"{weight}{_SCALE}"], [f"{y}.scales"]),
        helper.make_node("Mul", [f"{y}.float", f"{y}.scales"], [y]),
    ]
