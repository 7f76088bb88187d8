"""The exported ONNX file: its names, its preprocessing, and surgery on it. No torch.

One file goes from images to answers, and can be split at ``pixels`` into two:

    images (batch, height, width, 3) uint8, of any size
      | preprocess: resize, crop, scale, normalise
    pixels (batch, 3, S, S') float32
      | classify: frozen backbone, merged K and V weights, head
    logits, probabilities (batch, classes), embedding (batch, e), novelty (batch,) float32

``novelty`` is 0 (known) to 1 (new): the share of known images that look less new, measured on
images that were held out (``inflora_core.model.Novelty`` says how). The graph is composed once for
each backbone (``compose``); a version's file is that template with the initializers of
``materialise`` replaced. Weights that tasks change are stored transposed, so that each is one plain
MatMul: ``{layer}.key.weight`` and ``{layer}.value.weight`` (d, a), ``head.weight`` (e, classes),
``head.bias`` (classes,), and of the novelty score ``novelty.weight`` (e, classes), ``novelty.bias``
(classes,), ``novelty.whitening`` (e, e), ``novelty.offset`` (e,), ``novelty.knots``,
``novelty.widths`` and ``novelty.slopes`` (k,).

The file's ``metadata_props``:

* ``classes``: JSON list of labels; position i is logit i.
* ``tasks``: JSON list, the task that taught each of them.
* ``version``: the version's number, decimal.
* ``preprocessing``: JSON object with the fields of ``inflora_core.model.Preprocessing``.
* ``layers``: JSON list of the attention layers' names, first to last.

Whatever else ``materialise`` is given is kept beside these.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import (
    AttributeProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    ValueInfoProto,
    helper,
)

from inflora_core.errors import DamagedError, InvalidInputError, UnsupportedBackboneError
from inflora_core.heads import novelty_knots, ramp_widths
from inflora_core.model import (
    Array,
    Calibration,
    ContinualModel,
    Novelty,
    Preprocessing,
)

OPSET = 20
IR_VERSION = 10

IMAGES = "images"
PIXELS = "pixels"
LOGITS = "logits"
PROBABILITIES = "probabilities"
EMBEDDING = "embedding"
NOVELTY = "novelty"
CLASSES = "classes"
"""The side of outputs that grows with the classes."""
OUTPUTS = (LOGITS, PROBABILITIES, EMBEDDING, NOVELTY)

HEAD_WEIGHT = "head.weight"
HEAD_BIAS = "head.bias"
NOVELTY_WEIGHT = "novelty.weight"
NOVELTY_BIAS = "novelty.bias"
NOVELTY_WHITENING = "novelty.whitening"
NOVELTY_OFFSET = "novelty.offset"
NOVELTY_KNOTS = "novelty.knots"
NOVELTY_WIDTHS = "novelty.widths"
NOVELTY_SLOPES = "novelty.slopes"

PRODUCER = "inflora-server"

_FIXED_SIDES = {HEAD_WEIGHT: 1, HEAD_BIAS: 0, NOVELTY_WEIGHT: 1, NOVELTY_BIAS: 0}
"""Leading sides of an initializer that a version cannot change; the rest grows with the classes."""

_PREPROCESS = "preprocess."
_HEAD = "head."
_MODES = {"bicubic": "cubic", "bilinear": "linear"}
_RESERVED_KEYS = ("classes", "tasks", "version", "preprocessing", "layers")


def key_weight(layer: str) -> str:
    """Return the initializer's name of a layer's key weights, (d, a)."""
    return f"{layer}.key.weight"


def value_weight(layer: str) -> str:
    """Return the initializer's name of a layer's value weights, (d, a)."""
    return f"{layer}.value.weight"


@dataclass(frozen=True)
class ModelCard:
    """What a file says of itself.

    Attributes:
        classes: Labels; position i is logit i.
        tasks: The task that taught each class.
        version: The version's number; None for a template.
        preprocessing: What the graph does to an image.
        layers: Names of the attention layers, first to last.
        other: Metadata under any other key.
    """

    classes: tuple[str, ...]
    tasks: tuple[str, ...]
    version: int | None
    preprocessing: Preprocessing
    layers: tuple[str, ...]
    other: Mapping[str, str]


def compose(
    backbone: ModelProto, layers: Sequence[str], embedding_size: int, preprocessing: Preprocessing
) -> ModelProto:
    """Put preprocessing before an exported backbone and a head behind it: the template.

    Names, notes and source locations that an exporter left in ``backbone`` are dropped.

    Args:
        backbone: ``pixels`` (batch, 3, S, S') to ``embedding`` (batch, e), opset 20. Its K and V
            weights are initializers under their names here.
        layers: Names of the attention layers, first to last.
        embedding_size: e.
        preprocessing: What the backbone expects.

    Returns:
        The template, with a head of one class that is all zeros. ``backbone`` is not changed.

    Raises:
        UnsupportedBackboneError: if ``backbone`` needs operators beyond ONNX's own, or lacks a
            weight that tasks change.
    """
    _check_backbone(backbone, layers)
    size = ("batch", 3, preprocessing.height, preprocessing.width)
    prepare, prepare_weights = _preprocess(preprocessing)
    blank = [
        _tensor(name, array.astype(np.float32))
        for name, array in _answers(
            np.zeros((1, embedding_size)),
            np.zeros(1),
            replace(
                Novelty.untaught(embedding_size),
                weight=np.zeros((1, embedding_size)),
                bias=np.zeros(1),
            ),
            Calibration.untaught(),
        ).items()
    ]
    head, constants = _head()
    graph = helper.make_graph(
        nodes=[*prepare, *(_plain_node(node) for node in backbone.graph.node), *head],
        name="inflora",
        inputs=[_value(IMAGES, TensorProto.UINT8, ("batch", "height", "width", 3))],
        outputs=[
            _value(LOGITS, TensorProto.FLOAT, ("batch", CLASSES)),
            _value(PROBABILITIES, TensorProto.FLOAT, ("batch", CLASSES)),
            _value(EMBEDDING, TensorProto.FLOAT, ("batch", embedding_size)),
            _value(NOVELTY, TensorProto.FLOAT, ("batch",)),
        ],
        initializer=[
            *prepare_weights,
            *(_plain_tensor(tensor) for tensor in backbone.graph.initializer),
            *constants,
            *blank,
        ],
        # Slicing at computed positions hides the size; saying it lets runtimes plan and fuse.
        value_info=[_value(PIXELS, TensorProto.FLOAT, size)],
    )
    _check_names(graph)
    model = _model(graph)
    _set_metadata(
        model,
        {
            "classes": "[]",
            "tasks": "[]",
            "preprocessing": json.dumps(asdict(preprocessing), sort_keys=True),
            "layers": json.dumps(list(layers)),
        },
    )
    return model


def materialise(
    template: bytes | ModelProto,
    model: ContinualModel,
    version: int,
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    """Make a version's file: the template with K and V weights, head and class table replaced.

    The same arguments give the same bytes.

    Args:
        template: What ``compose`` made; not changed.
        model: The merged state to write.
        version: The number that the file is published under.
        metadata: More to say in ``metadata_props``, under keys that are not taken.

    Raises:
        InvalidInputError: if the model knows no class, does not fit the template, or a key of
            ``metadata`` is taken.
        DamagedError: if ``template`` is not a template.
    """
    for rows in (model.head_weight, model.novelty.weight):
        if not model.classes or len(rows) != len(model.classes):
            raise InvalidInputError(
                f"a file needs as many head rows ({len(rows)}) as classes "
                f"({len(model.classes)}), and at least one"
            )
    if taken := set(metadata or ()).intersection(_RESERVED_KEYS):
        raise InvalidInputError(f"metadata key {min(taken)!r} is taken")
    proto = own(template)
    card = read_metadata(proto)
    if tuple(model.layers) != card.layers:
        raise InvalidInputError("the model's layers are not those of the template")
    changed = _answers(model.head_weight, model.head_bias, model.novelty, model.calibration)
    for name, layer in model.layers.items():
        key, value = np.split(layer.key_value, 2)
        changed[key_weight(name)], changed[value_weight(name)] = key.T, value.T
    _replace(proto.graph, changed)
    kept = {prop.key: prop.value for prop in proto.metadata_props}
    _set_metadata(
        proto,
        {
            **kept,
            **(metadata or {}),
            "classes": json.dumps([entry.label for entry in model.classes], ensure_ascii=False),
            "tasks": json.dumps([entry.task for entry in model.classes], ensure_ascii=False),
            "version": str(version),
        },
    )
    return serialise(proto)


def split(model: bytes | ModelProto) -> tuple[bytes, bytes]:
    """Cut a composed file at ``pixels``.

    Returns:
        The preprocess part (``images`` to ``pixels``), which takes images of one size at a time,
        and the classify part (``pixels`` to the outputs), which takes any batch. Both keep the
        metadata.

    Raises:
        DamagedError: if ``model`` is not a composed file.
    """
    proto = own(model)
    graph = proto.graph
    cut = behind(graph, PIXELS)
    pixels = [value for value in graph.value_info if value.name == PIXELS]
    if not cut or len(pixels) != 1:
        raise DamagedError(f"the ONNX file has no {PIXELS!r} to be split at")
    ours = 0
    while ours < len(graph.initializer) and graph.initializer[ours].name.startswith(_PREPROCESS):
        ours += 1
    first = _model(
        helper.make_graph(
            nodes=graph.node[:cut],
            name=graph.name,
            inputs=graph.input,
            outputs=pixels,
            initializer=graph.initializer[:ours],
        )
    )
    first.metadata_props.extend(proto.metadata_props)
    # What is left of the parsed file is the second part: weights are not copied again.
    del graph.node[:cut], graph.initializer[:ours], graph.input[:], graph.value_info[:]
    graph.input.extend(pixels)
    return serialise(first), serialise(proto)


def read_metadata(model: bytes | ModelProto) -> ModelCard:
    """Read what a file says of itself.

    Raises:
        DamagedError: if it is not ONNX, or does not say what ours do.
    """
    proto = model if isinstance(model, ModelProto) else parse(model)
    said = {prop.key: prop.value for prop in proto.metadata_props}
    try:
        preprocessing = json.loads(said["preprocessing"])
        for key in ("mean", "std"):
            preprocessing[key] = tuple(preprocessing[key])
        return ModelCard(
            classes=tuple(json.loads(said["classes"])),
            tasks=tuple(json.loads(said["tasks"])),
            version=int(said["version"]) if "version" in said else None,
            preprocessing=Preprocessing(**preprocessing),
            layers=tuple(json.loads(said["layers"])),
            other={key: value for key, value in said.items() if key not in _RESERVED_KEYS},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"the ONNX file is not one of ours: {error!r}") from error


def _preprocess(to: Preprocessing) -> tuple[list[NodeProto], list[TensorProto]]:
    """Return nodes and constants from ``images`` to ``pixels``.

    It follows timm's evaluation transform, that is torchvision's sizes and Pillow's filters.
    Resizing stays in uint8: onnxruntime then rounds between its passes as Pillow does, and with
    ``exclude_outside`` weighs the border as it does. The pixels are Pillow's own where that
    resizes rows before columns; newer ones take the cheaper order, and then the roundings in
    between come out differently (on average 0.4 grey levels on noise, less on pictures).
    """
    # NCHW before resizing, because that is the layout every runtime can antialias.
    graph = _Nodes(_PREPROCESS)
    channels_first = graph.add("Transpose", IMAGES, perm=[0, 3, 1, 2])
    shape = graph.add("Shape", channels_first)
    sides_start, sides_end = graph.constant("sides.start", [2]), graph.constant("sides.end", [4])
    count = graph.add("Slice", shape, graph.constant("count.start", [0]), sides_start)
    sides = graph.add("Slice", shape, sides_start, sides_end)
    scaled = _scaled_sides(graph, sides, to)
    resized = graph.add(
        "Resize",
        channels_first,
        "",
        "",
        graph.add("Concat", count, scaled, axis=0),
        mode=_MODES[to.interpolation],
        antialias=1,
        exclude_outside=1,
        coordinate_transformation_mode="half_pixel",
        cubic_coeff_a=-0.5,
    )
    target = graph.constant("crop", [to.height, to.width])
    margin = graph.add("Cast", graph.add("Sub", scaled, target), to=TensorProto.FLOAT)
    # Round is half to even, as Python's round in torchvision's center_crop.
    half = graph.add("Round", graph.add("Mul", margin, graph.constant("half", np.float32(0.5))))
    start = graph.add("Cast", half, to=TensorProto.INT64)
    end = graph.add("Add", start, target)
    cropped = graph.add("Slice", resized, start, end, graph.constant("axes", [2, 3]))
    scale = graph.add(
        "Div",
        graph.add("Cast", cropped, to=TensorProto.FLOAT),
        graph.constant("white", np.float32(255)),
    )
    mean, std = (
        graph.constant(name, np.array(values, np.float32).reshape(1, 3, 1, 1))
        for name, values in (("mean", to.mean), ("std", to.std))
    )
    graph.add("Div", graph.add("Sub", scale, mean), std, output=PIXELS)
    return graph.nodes, graph.constants


def _scaled_sides(graph: _Nodes, sides: str, to: Preprocessing) -> str:
    """Add the size to resize to, int64 (2,), from the image's ``sides``."""
    if to.crop_mode == "squash":
        return graph.constant("resize", [to.resize_height, to.resize_width])
    if to.resize_height == to.resize_width:
        # torchvision: int(resize * long / short); in integers, where nothing is rounded up.
        short = graph.add("ReduceMin", sides, keepdims=1)
        wanted = graph.add("Mul", sides, graph.constant("resize", [to.resize_height]))
        return graph.add("Div", wanted, short)
    # timm's ResizeKeepRatio: both sides over the smaller ratio, rounded.
    exact = graph.add("Cast", sides, to=TensorProto.DOUBLE)
    target = graph.constant("resize", np.array([to.resize_height, to.resize_width], np.float64))
    ratio = graph.add("ReduceMin", graph.add("Div", exact, target), keepdims=1)
    rounded = graph.add("Round", graph.add("Div", exact, ratio))
    return graph.add("Cast", rounded, to=TensorProto.INT64)


def _answers(
    head_weight: Array, head_bias: Array, novelty: Novelty, calibration: Calibration
) -> dict[str, Array]:
    """Return the initializers behind ``embedding``, by name."""
    knots = novelty_knots(calibration)
    widths = ramp_widths(knots)
    return {
        HEAD_WEIGHT: head_weight.T,
        HEAD_BIAS: head_bias,
        NOVELTY_WEIGHT: novelty.weight.T,
        NOVELTY_BIAS: novelty.bias,
        NOVELTY_WHITENING: novelty.whitening,
        NOVELTY_OFFSET: novelty.offset,
        NOVELTY_KNOTS: knots[:-1],
        NOVELTY_WIDTHS: widths,
        NOVELTY_SLOPES: 1 / (len(widths) * widths),
    }


def _head() -> tuple[list[NodeProto], list[TensorProto]]:
    """Return nodes and constants from ``embedding`` to the other outputs."""
    graph = _Nodes(_HEAD)
    graph.add("Gemm", EMBEDDING, HEAD_WEIGHT, HEAD_BIAS, output=LOGITS)
    graph.add("Softmax", LOGITS, output=PROBABILITIES, axis=-1)
    axis = graph.constant("axis", [1])
    directions = graph.add("Gemm", EMBEDDING, NOVELTY_WEIGHT, NOVELTY_BIAS)
    along = graph.add("ReduceMax", directions, axis, keepdims=1)
    whitened = graph.add("Gemm", EMBEDDING, NOVELTY_WHITENING, NOVELTY_OFFSET)
    length = graph.add("ReduceL2", whitened, axis, keepdims=1)
    # An image at the centre of all classes has no direction.
    length = graph.add("Max", length, graph.constant("least", np.float32(1e-6)))
    one, zero = graph.constant("one", np.float32(1)), graph.constant("zero", np.float32(0))
    score = graph.add("Sub", one, graph.add("Div", along, length))
    above = graph.add("Max", graph.add("Sub", score, NOVELTY_KNOTS), zero)
    risen = graph.add("Mul", graph.add("Min", above, NOVELTY_WIDTHS), NOVELTY_SLOPES)
    share = graph.add("ReduceSum", risen, axis, keepdims=0)
    graph.add("Min", share, one, output=NOVELTY)
    return graph.nodes, graph.constants


class _Nodes:
    """A growing list of nodes whose values are named in order behind ``prefix``."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []

    def add(self, kind: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """Add a node with one output; return its name."""
        name = f"{self.prefix}{len(self.nodes)}.{kind}"
        made = output or f"{name}.out"
        self.nodes.append(helper.make_node(kind, list(inputs), [made], name=name, **attributes))
        return made

    def constant(self, name: str, value: Any) -> str:
        """Add an initializer: int64 from a list, else an array as it is; return its name."""
        array = np.asarray(value, np.int64) if isinstance(value, list) else np.asarray(value)
        self.constants.append(_tensor(self.prefix + name, array))
        return self.prefix + name


def behind(graph: GraphProto, value: str) -> int:
    """Return the place behind the node that makes a value, 0 if there is none."""
    return next((i for i, node in enumerate(graph.node, 1) if value in node.output), 0)


def _check_backbone(backbone: ModelProto, layers: Sequence[str]) -> None:
    domains = {entry.domain: entry.version for entry in backbone.opset_import}
    used = {node.domain for node in backbone.graph.node}
    if used - {""} or backbone.functions or domains.get("") != OPSET:
        raise UnsupportedBackboneError(
            f"the exported backbone is not plain ONNX of opset {OPSET}: {domains}"
        )
    names = {tensor.name for tensor in backbone.graph.initializer}
    changing = [name(layer) for layer in layers for name in (key_weight, value_weight)]
    if missing := [name for name in changing if name not in names]:
        raise UnsupportedBackboneError(f"the exported backbone lacks {', '.join(missing[:5])}")


def _check_names(graph: GraphProto) -> None:
    made = [name for node in graph.node for name in node.output if name]
    stored = [tensor.name for tensor in graph.initializer]
    names = [*made, *stored, IMAGES]
    if len(names) != len(set(names)):
        twice = next(name for name in names if names.count(name) > 1)
        raise UnsupportedBackboneError(f"the exported backbone uses a name of ours: {twice!r}")


def _plain_node(node: NodeProto) -> NodeProto:
    """Return ``node`` without what the exporter noted about where it comes from."""
    plain = NodeProto()
    plain.CopyFrom(node)
    plain.ClearField("metadata_props")
    plain.ClearField("doc_string")
    for attribute in plain.attribute:
        attribute.ClearField("doc_string")
        if attribute.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS):
            raise UnsupportedBackboneError(
                f"the exported backbone branches: {node.op_type} holds a graph of its own"
            )
    return plain


def _plain_tensor(tensor: TensorProto) -> TensorProto:
    plain = TensorProto()
    plain.CopyFrom(tensor)
    plain.ClearField("metadata_props")
    plain.ClearField("doc_string")
    return plain


def _replace(graph: GraphProto, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Put ``arrays`` in place of the initializers of their names; only classes may differ."""
    left = dict(arrays)
    for tensor in graph.initializer:
        array = left.pop(tensor.name, None)
        if array is None:
            continue
        fixed = _FIXED_SIDES.get(tensor.name, len(tensor.dims))
        if len(array.shape) != len(tensor.dims) or list(array.shape)[:fixed] != list(
            tensor.dims[:fixed]
        ):
            raise InvalidInputError(
                f"{tensor.name} is {array.shape}, not {tuple(tensor.dims)} as in the template"
            )
        tensor.CopyFrom(_tensor(tensor.name, array.astype(np.float32, copy=False)))
    if left:
        raise DamagedError(f"the template has no initializer {min(left)!r}")


def _tensor(name: str, array: NDArray[Any]) -> TensorProto:
    """Return an initializer with little-endian raw data, whatever the processor."""
    little = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False)
    return TensorProto(
        name=name,
        dims=array.shape,
        data_type=helper.np_dtype_to_tensor_dtype(np.dtype(array.dtype)),
        raw_data=little.tobytes(),
    )


def _value(name: str, kind: int, shape: Iterable[int | str]) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, list(shape))


def _model(graph: GraphProto) -> ModelProto:
    return helper.make_model(
        graph,
        producer_name=PRODUCER,
        ir_version=IR_VERSION,
        opset_imports=[helper.make_opsetid("", OPSET)],
    )


def _set_metadata(model: ModelProto, metadata: Mapping[str, str]) -> None:
    del model.metadata_props[:]
    for key in sorted(metadata):
        model.metadata_props.add(key=key, value=metadata[key])


def own(model: bytes | ModelProto) -> ModelProto:
    """Return ``model`` as a message that may be changed."""
    if not isinstance(model, ModelProto):
        return parse(model)
    copy = ModelProto()
    copy.CopyFrom(model)
    return copy


def parse(model: bytes) -> ModelProto:
    """Return a file as a message.

    Raises:
        DamagedError: if it is not ONNX.
    """
    proto = ModelProto()
    try:
        proto.ParseFromString(model)
    except Exception as error:  # the class belongs to protobuf, which this package does not name
        raise DamagedError(f"not an ONNX file: {error}") from error
    return proto


def serialise(model: ModelProto) -> bytes:
    """Return a message as a file; equal ones are equal files."""
    content: bytes = model.SerializeToString(deterministic=True)
    return content
