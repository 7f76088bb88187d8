"""What a server makes of the classify part before it runs it: the same answers, sooner. No torch.

The file itself stays plain ONNX, as the devices have it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from onnx import NodeProto, TensorProto, helper, numpy_helper

from inflora_core.errors import DamagedError
from inflora_core.graph import EMBEDDING, PIXELS, behind, own, parse, serialise

_OWN_OPERATORS = "com.microsoft"

_FIRST, _CUT = "first.token", ".first"
"""Names of what is added: the index of the first token, and the ending of values without others."""


def attention_fused(classify: bytes) -> bytes:
    """Return the classify part with each attention as one operator of onnxruntime's own.

    Its answers differ by rounding. What is not attention as timm's plain ViTs have it, softmax of
    scaled products of queries and keys and nothing between, stays as it is. No weight is looked at.

    Args:
        classify: It may lack its large initializers.

    Raises:
        DamagedError: if ``classify`` is not ONNX.
    """
    proto = parse(classify)
    graph = proto.graph
    made = {name: node for node in graph.node for name in node.output}
    used: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            used.setdefault(name, []).append(node)
    constants = {tensor.name: tensor for tensor in graph.initializer}
    fused: dict[str, NodeProto] = {}
    gone: set[str] = set()
    for softmax in [node for node in graph.node if node.op_type == "Softmax"]:
        attention = _attention(softmax, made, used, constants)
        if attention is not None:
            nodes, fused_node = attention
            fused[nodes[-1].output[0]] = fused_node
            gone.update(node.output[0] for node in nodes)
    if not fused:
        return classify
    nodes = [
        fused.get(node.output[0], node)
        for node in graph.node
        if node.output[0] in fused or node.output[0] not in gone
    ]
    changed = own(proto)
    del changed.graph.node[:]
    changed.graph.node.extend(nodes)
    changed.opset_import.append(helper.make_opsetid(_OWN_OPERATORS, 1))
    return serialise(changed)


def _attention(
    softmax: NodeProto,
    made: Mapping[str, NodeProto],
    used: Mapping[str, Sequence[NodeProto]],
    constants: Mapping[str, TensorProto],
) -> tuple[list[NodeProto], NodeProto] | None:
    """Return the nodes of the attention around a softmax, last one last, and one in their place."""

    def before(node: NodeProto, place: int, kind: str) -> NodeProto:
        found = made[node.input[place]]
        if found.op_type != kind or len(used[found.output[0]]) != 1:
            raise LookupError(kind)
        return found

    def after(node: NodeProto, kind: str) -> NodeProto:
        (found,) = used[node.output[0]]
        if found.op_type != kind:
            raise LookupError(kind)
        return found

    try:
        products = before(softmax, 0, "MatMul")
        weighted = after(softmax, "MatMul")
        back = after(weighted, "Transpose")
        joined = after(back, "Reshape")
        scaled = before(products, 0, "Mul")
        turned = (
            before(scaled, 0, "Transpose"),
            before(products, 1, "Transpose"),
            before(weighted, 1, "Transpose"),
        )
        parted = [before(node, 0, "Reshape") for node in turned]
        permutations = [_permutation(node) for node in (*turned, back)]
        scale = numpy_helper.to_array(constants[scaled.input[1]])
        shapes = [numpy_helper.to_array(constants[node.input[1]]).tolist() for node in parted]
    except (LookupError, ValueError):
        return None
    if (
        _axis(softmax, -1) not in (-1, 3)
        or weighted.input[0] != softmax.output[0]
        or permutations != [[0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3], [0, 2, 1, 3]]
        or scale.size != 1
        or any(len(shape) != 4 or shape[1:3] != shapes[0][1:3] for shape in shapes)
    ):
        return None
    one = helper.make_node(
        "MultiHeadAttention",
        [node.input[0] for node in parted],
        [joined.output[0]],
        domain=_OWN_OPERATORS,
        num_heads=int(shapes[0][2]),
        scale=float(scale.reshape(-1)[0]),
    )
    nodes = [*parted, *turned, scaled, products, softmax, weighted, back, joined]
    return nodes, one


def first_token(classify: bytes, ranks: Mapping[str, int]) -> bytes:
    """Return the classify part without what it does for tokens that nobody looks at.

    Where the embedding is the first token of the last block, that block's queries, projection and
    MLP are computed for it alone: of a ViT with 12 blocks, 7% of the work goes. Its answers differ
    by rounding. Where the embedding is of all tokens, nothing is changed. No weight is looked at.

    Args:
        classify: It may lack its large initializers.
        ranks: How many sides those have.

    Raises:
        DamagedError: if ``classify`` is not ONNX.
    """
    proto = parse(classify)
    graph = proto.graph
    ranks = {**ranks, **{tensor.name: len(tensor.dims) for tensor in graph.initializer}}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    tokens = _tokens(graph.node, ranks, constants)
    pooling = next((x for x in graph.node if _takes_first(x, tokens, constants)), None)
    if pooling is None:
        return classify
    uses = Counter(name for node in graph.node for name in node.input)
    uses.update(value.name for value in graph.output)
    # Of each value, the uses that want its first token alone; then it is made for that alone.
    alone = Counter([pooling.input[0]])
    cut: set[str] = set()
    for node in reversed(graph.node):
        value = node.output[0]
        rows = _rows(node, tokens, ranks)
        if rows and alone[value] and alone[value] == uses[value]:
            cut.add(value)
            alone.update(node.input[place] for place in rows)
    if not cut:
        return classify
    whole = {name for name in alone if name not in cut}
    nodes: list[NodeProto] = []
    for node in graph.node:
        if node.output[0] in cut:
            for place in _rows(node, tokens, ranks):
                if node.input[place] in whole:
                    node.input[place] += _CUT
        nodes.append(node)
        for name in node.output:
            if name in whole:
                nodes.append(helper.make_node("Gather", [name, _FIRST], [name + _CUT], axis=1))
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.append(helper.make_tensor(_FIRST, TensorProto.INT64, [1], [0]))
    return serialise(proto)


_BY_ROW = {
    "Add": 2,
    "Gelu": 1,
    "LayerNormalization": 1,
    "MatMul": 1,
    "Mul": 2,
    "MultiHeadAttention": 1,
    "Sigmoid": 1,
}
"""Operators of which row i of the first inputs, this many, decides row i of the output."""


def _tokens(
    nodes: Sequence[NodeProto], ranks: Mapping[str, int], constants: Mapping[str, TensorProto]
) -> set[str]:
    """Return the values of which it is sure that they are (batch, tokens, width)."""
    found: set[str] = set()
    for node in nodes:
        operands = [ranks.get(name, 3 if name in found else 4) for name in node.input]
        if node.op_type == "Reshape":
            shape = constants.get(node.input[1])
            sure = shape is not None and list(shape.dims) == [3]
        elif node.op_type == "Transpose":
            sure = len(_permutation(node)) == 3
        elif node.op_type in ("Concat", "Gelu", "LayerNormalization", "Sigmoid"):
            sure = any(name in found for name in node.input)
        elif node.op_type in ("Add", "MatMul", "Mul"):
            # A product with a vector has a side less.
            vector = node.op_type == "MatMul" and min(operands) < 2
            sure = any(name in found for name in node.input) and max(operands) <= 3 and not vector
        else:
            sure = node.op_type == "MultiHeadAttention"
        if sure:
            found.add(node.output[0])
    return found


def _takes_first(node: NodeProto, tokens: set[str], constants: Mapping[str, TensorProto]) -> bool:
    """Whether a node makes the embedding of the first of some tokens."""
    if node.op_type != "Gather" or node.input[0] not in tokens or node.input[1] not in constants:
        return False
    index = numpy_helper.to_array(constants[node.input[1]])
    return _axis(node, 0) == 1 and index.shape == () and index == 0


def _rows(node: NodeProto, tokens: set[str], ranks: Mapping[str, int]) -> list[int]:
    """Return which inputs' row i alone decides row i of the output, none if that is not sure."""
    places = list(range(min(_BY_ROW.get(node.op_type, 0), len(node.input))))
    rows = [place for place in places if node.input[place] in tokens]
    others = [ranks.get(node.input[place], 4) for place in places if place not in rows]
    if (
        any(rank > 1 for rank in others)
        or _axis(node, -1) not in (-1, 2)
        or (node.op_type == "MatMul" and ranks.get(node.input[1]) != 2)
    ):
        return []
    return rows


def _axis(node: NodeProto, usual: int) -> int:
    return next((each.i for each in node.attribute if each.name == "axis"), usual)


def _permutation(transpose: NodeProto) -> list[int]:
    return next((list(each.ints) for each in transpose.attribute if each.name == "perm"), [])


def halved(classify: bytes) -> bytes:
    """Return the classify part with a backbone of float16; what goes in and out stays float32.

    The head stays as it is: what it adds up over the classes would lose three digits.

    Raises:
        DamagedError: if ``classify`` has no ``embedding``.
    """
    # Takes half a second to import, and hardly anybody needs it.
    from onnxruntime.transformers.float16 import convert_float_to_float16

    proto = parse(classify)
    graph = proto.graph
    end = behind(graph, EMBEDDING)
    if not end:
        raise DamagedError(f"the ONNX file has no {EMBEDDING!r}")
    head, outputs = list(graph.node[end:]), list(graph.output)
    read = {name for node in graph.node[:end] for name in node.input}
    weights = [tensor for tensor in graph.initializer if tensor.name not in read]
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.node[end:], graph.output[:], graph.initializer[:]
    graph.initializer.extend(kept)
    graph.output.extend(value for value in outputs if value.name == EMBEDDING)
    half = convert_float_to_float16(
        proto, keep_io_types=[PIXELS, EMBEDDING], disable_shape_infer=True
    )
    half.graph.node.extend(head)
    half.graph.initializer.extend(weights)
    half.graph.output.extend(value for value in outputs if value.name != EMBEDDING)
    return serialise(half)
