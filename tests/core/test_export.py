"""The exported file gives torch's answers; preprocessing in it gives timm's pixels."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn

from inflora_core import export, graph, passes, wire
from inflora_core.backbone import (
    Backbone,
    build_backbone,
    create_backbone,
    preprocessing_of,
    state_of,
)
from inflora_core.errors import (
    DamagedError,
    InvalidInputError,
    ParityError,
    UnsupportedBackboneError,
)
from inflora_core.export import check_edit, check_parity, export_template
from inflora_core.heads import novelty_shares
from inflora_core.images import resized as without_torch
from inflora_core.model import (
    BackboneConfig,
    ClassEntry,
    ContinualModel,
    LayerState,
    ParityReport,
)
from tests.core import tiny
from tests.core.test_backbone import DEIT_TINY, FAMILIES, write

Exported = tuple[Backbone, bytes]


@cache
def export_family(family: str) -> Exported:
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "weights.safetensors", FAMILIES[family])
        backbone = create_backbone(str(path))
    return backbone, export_template(backbone)


@pytest.fixture(scope="module", params=FAMILIES, ids=str)
def exported(request: pytest.FixtureRequest) -> Exported:
    return export_family(request.param)


@pytest.fixture(scope="module")
def vit() -> Exported:
    return export_family("vit")


def learned(backbone: Backbone, classes: int, seed: int = 0) -> ContinualModel:
    """A model as after learning: other K and V rows in every layer, and a head."""
    rng = np.random.default_rng(seed)
    layers = {}
    for name in backbone.config.layers:
        rows = backbone.qkv(name).get_parameter("weight").numpy()
        key_value = rows[len(rows) // 3 :]
        change = 0.1 * rng.normal(size=key_value.shape)
        d = rows.shape[1]
        layers[name] = LayerState(
            (key_value + change).astype(np.float32), np.eye(d), 0, np.eye(d), 0
        )
    e = backbone.config.embedding_size
    return replace(
        ContinualModel.untaught(layers, e),
        head_weight=rng.normal(size=(classes, e)).astype(np.float32),
        head_bias=rng.normal(size=classes).astype(np.float32),
        novelty=tiny.novelty(classes, e),
        classes=tuple(
            ClassEntry(f"Klasse {i} ß", f"task-{i // 2}", f"key-{i}") for i in range(classes)
        ),
    )


def torch_model(backbone: Backbone, model: ContinualModel) -> Callable[[Tensor], Tensor]:
    """The same model in torch, from weights of its own."""
    state = state_of(backbone)
    for name, layer in model.layers.items():
        state[f"{name}.qkv.weight"][-len(layer.key_value) :] = layer.key_value
    module = build_backbone(backbone.config, state).module
    weight, bias = torch.from_numpy(model.head_weight), torch.from_numpy(model.head_bias)
    return lambda pixels: nn.functional.linear(module(pixels), weight, bias)


def session(model: bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 2
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def noise(*shape: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def resized(backbone: Backbone, images: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    return np.stack([backbone.resize(image) for image in images])


def pixels_of(backbone: Backbone, images: list[NDArray[np.uint8]]) -> Tensor:
    return backbone.normalise(torch.from_numpy(resized(backbone, images)))


def compared(
    file: bytes,
    torch_model: Callable[[Tensor], Tensor],
    images: list[NDArray[np.uint8]],
    backbone: Backbone,
    small: NDArray[np.uint8] | None = None,
) -> ParityReport:
    """Check the parity of a file; ``small`` is what torch sees, if not ``images`` resized."""
    small = resized(backbone, images) if small is None else small
    whole = session(file)
    answers = [
        whole.run([graph.LOGITS], {graph.IMAGES: image[None]})[0].argmax() for image in images
    ]
    expected = torch_model(backbone.normalise(torch.from_numpy(small))).numpy()
    return check_parity(file, expected, small, images, np.array(answers), backbone)


@pytest.mark.parametrize("classes", [3, 5])
def test_every_family_gives_torchs_answers(exported: Exported, classes: int) -> None:
    backbone, template = exported
    model = learned(backbone, classes, seed=classes)
    file = graph.materialise(template, model, 7)
    expected = torch_model(backbone, model)
    images = [noise(40 + 9 * i, 90 - 8 * i, 3, seed=i) for i in range(5)]
    report = compared(file, expected, images, backbone)
    assert report.images == 5
    assert report.max_abs_diff <= 1e-4
    assert report.preprocessing_grey_levels <= 0.6
    assert report.top1_agreement == 1


NOT_FUSED = {"qk-norm", "dinov3", "rope-mixed"}
"""Families that change queries and keys before they are multiplied."""


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_in_one_operator_answers_alike(family: str) -> None:
    backbone, template = export_family(family)
    _, classify = graph.split(graph.materialise(template, learned(backbone, 4), 1))
    fused = passes.attention_fused(classify)
    kinds = [node.op_type for node in onnx.load_from_string(fused).graph.node]
    if family in NOT_FUSED:
        assert fused == classify
        return
    assert kinds.count("MultiHeadAttention") == len(backbone.config.layers)
    images = [noise(40, 50, 3, seed=i) for i in range(3)]
    feeds = {graph.PIXELS: pixels_of(backbone, images).numpy()}
    for ours, theirs in zip(
        session(fused).run(list(graph.OUTPUTS), feeds),
        session(classify).run(list(graph.OUTPUTS), feeds),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-5)


def _scale(node: onnx.NodeProto) -> None:
    node.input[1] = "unknown"


def _perm(node: onnx.NodeProto) -> None:
    node.attribute[0].ints[:] = [0, 1, 2, 3]


def _axis(node: onnx.NodeProto) -> None:
    del node.attribute[:]
    node.attribute.append(helper.make_attribute("axis", 1))


@pytest.mark.parametrize(
    ("kind", "change"), [("Mul", _scale), ("Transpose", _perm), ("Softmax", _axis)]
)
def test_what_only_looks_like_attention_stays(
    vit: Exported, kind: str, change: Callable[[onnx.NodeProto], None]
) -> None:
    """Of one layer, one node is another: it alone is left as it is."""
    backbone, template = vit
    _, classify = graph.split(graph.materialise(template, learned(backbone, 4), 1))
    model = onnx.load_from_string(classify)
    node = next(
        node
        for node in model.graph.node
        if node.op_type == kind and (kind != "Transpose" or len(node.attribute[0].ints) == 4)
    )
    change(node)
    fused = onnx.load_from_string(passes.attention_fused(model.SerializeToString())).graph.node
    kinds = [node.op_type for node in fused]
    assert kinds.count("MultiHeadAttention") == len(backbone.config.layers) - 1
    assert node in list(fused)


ALL_TOKENS = {"registers-avg-pool", "deit-distilled", "eva", "dinov3"}
"""Families whose embedding is not the first token."""


def _large_apart(classify: bytes) -> tuple[bytes, dict[str, int], list[memoryview]]:
    rest, large = wire.part(classify)
    return rest, wire.ranks(large), large


@pytest.mark.parametrize("fuse", [passes.attention_fused, lambda classify: classify])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_tokens_that_nobody_looks_at_answers_are_alike(
    family: str, fuse: Callable[[bytes], bytes]
) -> None:
    backbone, template = export_family(family)
    _, classify = graph.split(graph.materialise(template, learned(backbone, 4), 1))
    rest, ranks, large = _large_apart(classify)
    rest = fuse(rest)
    sparing = passes.first_token(rest, ranks)
    if family in ALL_TOKENS:
        assert sparing == rest
        return
    kinds = [node.op_type for node in onnx.load_from_string(sparing).graph.node]
    before = [node.op_type for node in onnx.load_from_string(rest).graph.node]
    assert kinds.count("Gather") > before.count("Gather")
    images = [noise(40, 50, 3, seed=i) for i in range(3)]
    feeds = {graph.PIXELS: pixels_of(backbone, images).numpy()}
    for ours, theirs in zip(
        session(b"".join(wire.appended(sparing, large))).run(list(graph.OUTPUTS), feeds),
        session(classify).run(list(graph.OUTPUTS), feeds),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-5)


def test_the_last_blocks_mlp_and_queries_are_those_of_one_token(vit: Exported) -> None:
    backbone, template = vit
    _, classify = graph.split(graph.materialise(template, learned(backbone, 4), 1))
    rest, ranks, _ = _large_apart(classify)
    nodes = onnx.load_from_string(
        passes.first_token(passes.attention_fused(rest), ranks)
    ).graph.node
    at = [place for place, node in enumerate(nodes) if node.output[0].endswith(".first")]
    assert len(at) == 2  # what goes around the last block's attention, and what goes into it
    behind = [node.op_type for node in nodes[at[-1] :]]
    assert behind.count("MatMul") == 6  # queries, keys, values, projection, and two of the MLP
    queries = next(node for node in nodes[at[-1] :] if node.op_type == "MatMul")
    assert queries.input[0] == nodes[at[-1]].output[0]


def _second(model: onnx.ModelProto, pooling: onnx.NodeProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array(1, np.int64), "second"))
    pooling.input[1] = "second"


def _seen(model: onnx.ModelProto, pooling: onnx.NodeProto) -> None:
    model.graph.output.append(helper.make_tensor_value_info(pooling.input[0], 1, None))


def _per_token(model: onnx.ModelProto, pooling: onnx.NodeProto) -> None:
    shift = np.ones((1, 1, 1), np.float32)
    model.graph.initializer.append(numpy_helper.from_array(shift, "shift"))
    place = list(model.graph.node).index(pooling)
    model.graph.node.insert(
        place, helper.make_node("Add", [pooling.input[0], "shift"], ["shifted"])
    )
    model.graph.node[place + 1].input[0] = "shifted"


@pytest.mark.parametrize("change", [_second, _seen, _per_token])
def test_what_only_looks_like_a_first_token_stays(
    vit: Exported, change: Callable[[onnx.ModelProto, onnx.NodeProto], None]
) -> None:
    """Another token, one that somebody looks at, and a sum with what may differ between tokens."""
    backbone, template = vit
    _, classify = graph.split(graph.materialise(template, learned(backbone, 4), 1))
    rest, ranks, _ = _large_apart(classify)
    model = onnx.load_from_string(rest)
    change(model, next(node for node in model.graph.node if graph.EMBEDDING in node.output))
    changed = model.SerializeToString()
    assert passes.first_token(changed, ranks) == changed


def test_weights_that_nothing_is_known_of_keep_all_tokens(vit: Exported) -> None:
    backbone, template = vit
    _, classify = graph.split(graph.materialise(template, learned(backbone, 4), 1))
    model = onnx.load_from_string(classify)
    del model.graph.initializer[:]
    classify = model.SerializeToString()
    assert passes.first_token(classify, {}) == classify


@pytest.mark.parametrize("batch", [1, 3])
def test_batch_and_classes_are_free_in_the_whole_file(exported: Exported, batch: int) -> None:
    backbone, template = exported
    model = learned(backbone, 4)
    file = graph.materialise(template, model, 1)
    images = noise(batch, 50, 60, 3)
    logits, probabilities, embedding, novelty = session(file).run(
        list(graph.OUTPUTS), {graph.IMAGES: images}
    )
    with torch.inference_mode():
        expected = torch_model(backbone, model)(pixels_of(backbone, list(images))).numpy()
    assert logits.shape == probabilities.shape == (batch, 4)
    assert embedding.shape == (batch, backbone.config.embedding_size)
    np.testing.assert_allclose(logits, expected, atol=0.05)  # the images are noise, resized
    np.testing.assert_allclose(
        probabilities, torch.from_numpy(logits).softmax(1).numpy(), atol=1e-6
    )
    np.testing.assert_allclose(novelty, novelty_shares(model, embedding), atol=1e-5)


def test_a_template_is_valid_and_discloses_nothing(exported: Exported) -> None:
    backbone, template = exported
    proto = onnx.load_from_string(template)
    onnx.checker.check_model(proto, full_check=True)
    assert [entry.version for entry in proto.opset_import] == [graph.OPSET]
    for message in (proto.graph, *proto.graph.node, *proto.graph.initializer):
        assert not message.doc_string
        assert not message.metadata_props
    assert b"site-packages" not in template
    assert b"/timm/" not in template
    card = graph.read_metadata(template)
    assert card.layers == backbone.config.layers
    assert card.preprocessing == backbone.preprocessing
    assert card.version is None
    assert card.classes == ()


def test_a_template_holds_the_frozen_rows_once(exported: Exported) -> None:
    backbone, template = exported
    stored = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in onnx.load_from_string(template).graph.initializer
    }
    for name in backbone.config.layers:
        _, key, value = np.split(backbone.qkv(name).get_parameter("weight").numpy(), 3)
        assert np.array_equal(stored[graph.key_weight(name)], key.T)
        assert np.array_equal(stored[graph.value_weight(name)], value.T)
    weights = sum(array.nbytes for array in state_of(backbone).values())
    assert sum(array.nbytes for array in stored.values()) < 1.2 * weights + 20_000


@pytest.mark.parametrize("family", ["vit", "dinov3"])
def test_exporting_again_gives_the_same_bytes(family: str) -> None:
    backbone, first = export_family(family)
    torch.manual_seed(99)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert export_template(backbone) == first


def test_equal_layers_are_not_merged(vit: Exported) -> None:
    backbone, _ = vit
    state = state_of(backbone)
    for name in backbone.config.layers:
        state[f"{name}.qkv.weight"][:] = 0
    backbone = build_backbone(backbone.config, state)
    template = export_template(backbone)
    model = learned(backbone, 3)
    images = [noise(32, 32, 3)]
    file = graph.materialise(template, model, 1)
    compared(file, torch_model(backbone, model), images, backbone)


def test_a_backbone_too_large_for_one_file_is_refused(
    vit: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "LARGEST_FILE", 1000)
    with pytest.raises(UnsupportedBackboneError, match="GiB of weights do not fit"):
        export_template(vit[0])


def test_exporting_leaves_the_backbone_as_it_was(vit: Exported) -> None:
    backbone, _ = vit
    for attention in backbone.layers.values():
        assert isinstance(attention.qkv, nn.Linear)
        assert attention.fused_attn


def test_a_file_says_what_it_is(vit: Exported) -> None:
    backbone, template = vit
    model = learned(backbone, 3)
    file = graph.materialise(template, model, 12, {"backbone": "abc"})
    card = graph.read_metadata(file)
    assert card.classes == ("Klasse 0 ß", "Klasse 1 ß", "Klasse 2 ß")
    assert card.tasks == ("task-0", "task-0", "task-1")
    assert card.version == 12
    assert card.preprocessing == backbone.preprocessing
    assert card.other == {"backbone": "abc"}
    props = {prop.key: prop.value for prop in onnx.load_from_string(file).metadata_props}
    assert list(props) == sorted(props)
    assert json.loads(props["classes"]) == list(card.classes)
    for part in graph.split(file):
        assert graph.read_metadata(part) == card


def test_a_files_bytes_follow_from_its_arguments(vit: Exported) -> None:
    backbone, template = vit
    model = learned(backbone, 3)
    parsed = onnx.load_from_string(template)
    file = graph.materialise(template, model, 2)
    assert graph.materialise(parsed, model, 2) == file
    assert parsed.SerializeToString(deterministic=True) == template
    fortran = replace(model, head_weight=np.asfortranarray(model.head_weight))
    assert graph.materialise(template, fortran, 2) == file
    assert graph.materialise(file, model, 2) == file, "a file is a template, too"


def test_what_does_not_fit_a_template_is_refused(vit: Exported) -> None:
    backbone, template = vit
    model = learned(backbone, 3)
    name, layer = next(iter(model.layers.items()))
    wrong: dict[str, ContinualModel] = {
        "at least one": replace(
            model, classes=(), head_weight=model.head_weight[:0], head_bias=model.head_bias[:0]
        ),
        "as classes": replace(model, classes=model.classes[:2]),
        "head.bias": replace(model, head_bias=model.head_bias[:, None]),
        "head.weight": replace(model, head_weight=model.head_weight[:, 1:]),
        "not those of the template": replace(model, layers={name: layer}),
        "key.weight": replace(
            model, layers={**model.layers, name: replace(layer, key_value=layer.key_value[2:])}
        ),
    }
    for reason, changed in wrong.items():
        with pytest.raises(InvalidInputError, match=reason):
            graph.materialise(template, changed, 1)
    with pytest.raises(InvalidInputError, match="'classes' is taken"):
        graph.materialise(template, model, 1, {"classes": "[]"})


def test_damaged_files_are_said_to_be(vit: Exported) -> None:
    _, template = vit
    for content in (b"", b"not ONNX", template[:500]):
        with pytest.raises(DamagedError):
            graph.read_metadata(content)
        with pytest.raises(DamagedError):
            graph.split(content)


def test_a_file_of_fewer_classes_is_compared_with_the_one_before(vit: Exported) -> None:
    backbone, template = vit
    model = learned(backbone, 4)
    before = graph.materialise(template, model, 1)
    left = replace(
        model,
        head_weight=model.head_weight[[0, 2, 3]],
        head_bias=model.head_bias[[0, 2, 3]],
        novelty=tiny.novelty(3, backbone.config.embedding_size),
        classes=(model.classes[0], *model.classes[2:]),
    )
    after = graph.materialise(template, left, 2)
    check_edit(before, after, left)
    with pytest.raises(ParityError, match="ONNX gives logits"):
        check_edit(before, after, model)
    touched = replace(left, head_bias=left.head_bias + np.float32([0, 0, 1e-2]))
    with pytest.raises(ParityError, match="logits of ONNX and the state differ"):
        check_edit(before, graph.materialise(template, touched, 2), left)
    name, layer = next(iter(left.layers.items()))
    other = {**left.layers, name: replace(layer, key_value=1.1 * layer.key_value)}
    with pytest.raises(ParityError, match="features of ONNX and the version before differ"):
        check_edit(before, graph.materialise(template, replace(left, layers=other), 2), left)


def test_a_difference_is_found(vit: Exported) -> None:
    backbone, template = vit
    model = learned(backbone, 3)
    file = graph.materialise(template, model, 1)
    images = [noise(40, 50, 3, seed=i) for i in range(4)]
    right = torch_model(backbone, model)

    other = replace(model, head_bias=model.head_bias + np.float32([0, 1e-3, 0]))
    # A thousandth, as far as rounding goes.
    with pytest.raises(ParityError, match=r"differ by (1\.0|9\.9)\de-0[34]"):
        compared(file, torch_model(backbone, other), images, backbone)
    with pytest.raises(ParityError, match="not all logits are finite"):
        compared(file, lambda x: right(x) * torch.nan, images, backbone)
    with pytest.raises(ParityError, match="torch"):
        compared(file, lambda x: right(x)[:, :2], images, backbone)
    with pytest.raises(InvalidInputError, match="at least one image"):
        compared(file, right, [], backbone, resized(backbone, images)[:0])

    cfg = {**backbone.config.pretrained_cfg, "crop_pct": 0.5}
    cropped = Backbone(
        backbone.module, replace(backbone.config, pretrained_cfg=cfg), preprocessing_of(cfg)
    )
    with pytest.raises(ParityError, match="grey levels"):
        compared(file, right, images, cropped)


def test_a_difference_from_end_to_end_is_found(vit: Exported) -> None:
    """Torch agrees on the pixels that are compared, and those are nearly what the graph makes."""
    backbone, template = vit
    model = learned(backbone, 2)
    images = [noise(40, 50, 3)] * 2
    small = resized(backbone, images)
    small = np.where(noise(*small.shape) < 100, small.clip(0, 254) + 1, small).astype(np.uint8)
    whole = session(graph.materialise(template, model, 1))
    (ours,) = whole.run([graph.EMBEDDING], {graph.IMAGES: images[0][None]})
    identity = np.eye(backbone.config.embedding_size, dtype=np.float32)
    features = torch_model(
        backbone, replace(model, head_weight=identity, head_bias=0 * identity[0])
    )
    theirs = features(backbone.normalise(torch.from_numpy(small[:1]))).numpy()
    # One class on either side of what lies between the two.
    apart = (theirs - ours)[0]
    rows = 0.02 * np.stack([apart, -apart]) / (apart @ apart)
    biased = replace(model, head_weight=rows, head_bias=-rows @ (ours + theirs)[0] / 2)
    file = graph.materialise(template, biased, 1)
    with pytest.raises(ParityError, match="2 of 2 images differently, end to end"):
        compared(file, torch_model(backbone, biased), images, backbone, small)


def no_backbone() -> onnx.ModelProto:
    """``pixels`` to their mean colour, in place of a network."""
    nodes = [
        helper.make_node("GlobalAveragePool", [graph.PIXELS], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], [graph.EMBEDDING]),
    ]
    floats = TensorProto.FLOAT
    made = helper.make_graph(
        nodes,
        "mean",
        [helper.make_tensor_value_info(graph.PIXELS, floats, ("b", 3, None, None))],
        [helper.make_tensor_value_info(graph.EMBEDDING, floats, ("b", 3))],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", graph.OPSET)])


@cache
def preprocess(config: str) -> tuple[Backbone, ort.InferenceSession]:
    """Preprocessing alone, in torch and as a graph, for a data configuration in JSON."""
    data: dict[str, Any] = json.loads(config)
    prepared = preprocessing_of(data)
    backbone = Backbone(nn.Identity(), BackboneConfig("none", {}, data), prepared)
    model = graph.compose(no_backbone(), (), 3, prepared)
    return backbone, session(graph.split(model)[0])


def grey_levels(config: dict[str, Any], image: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Differences of the graph's pixels from timm's, in grey levels, (S, S', 3)."""
    backbone, part = preprocess(json.dumps(config, sort_keys=True))
    pixels = part.run(None, {graph.IMAGES: image[None]})[0][0]
    to = backbone.preprocessing
    assert pixels.shape == (3, to.height, to.width)
    levels = 255 * (pixels.transpose(1, 2, 0) * np.float64(to.std) + to.mean)
    return np.abs(levels - backbone.resize(image))


CONFIGS = st.fixed_dictionaries(
    {
        "input_size": st.sampled_from([[3, 32, 32], [3, 48, 48], [3, 32, 56], [3, 64, 24]]),
        "interpolation": st.sampled_from(["bicubic", "bilinear"]),
        "crop_mode": st.sampled_from(["center", "squash"]),
        "crop_pct": st.sampled_from([1.0, 0.9, 0.875]),
    }
)


@settings(max_examples=100, deadline=None)
@given(
    config=CONFIGS,
    height=st.integers(2, 300),
    width=st.integers(2, 300),
    seed=st.integers(0, 2**31),
)
def test_preprocessing_is_timms(config: dict[str, Any], height: int, width: int, seed: int) -> None:
    """Also on noise, the hardest case for the roundings between the two passes."""
    assert grey_levels(config, noise(height, width, 3, seed=seed)).mean() <= 1


def differences(config: dict[str, Any], image: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Differences of a server's pixels from those of timm's own transform, in grey levels."""
    backbone, _ = preprocess(json.dumps(config, sort_keys=True))
    stated = backbone.config.pretrained_cfg
    # use_prefetcher leaves scaling and normalising out: uint8 (3, height, width) comes back.
    transform = create_transform(
        **{**stated, "input_size": tuple(stated["input_size"])}, use_prefetcher=True
    )
    expected = np.asarray(transform(Image.fromarray(image)).permute(1, 2, 0), np.int64)
    ours = without_torch(image, backbone.preprocessing)
    np.testing.assert_array_equal(
        ours, without_torch(Image.fromarray(image), backbone.preprocessing)
    )
    assert ours.shape == expected.shape
    return np.abs(ours - expected)


@settings(max_examples=100, deadline=None)
@given(config=CONFIGS, height=st.integers(2, 300), width=st.integers(2, 300), seed=st.integers(0))
def test_a_servers_preprocessing_is_timms(
    config: dict[str, Any], height: int, width: int, seed: int
) -> None:
    """To the bit where nothing is cropped; else a rounding or two apart, bilinear sums often."""
    found = differences(config, noise(height, width, 3, seed=seed))
    all_of_it = config["crop_mode"] == "squash" and config["crop_pct"] == 1.0
    assert found.max() <= (0 if all_of_it else 2)
    assert found.mean() <= (0.02 if config["interpolation"] == "bicubic" else 0.25)


AT_224 = {"input_size": [3, 224, 224], "interpolation": "bicubic", "crop_pct": 0.9}


@pytest.mark.parametrize(
    "size",
    [(375, 500), (500, 375), (480, 640), (1080, 1920), (1920, 1080), (3024, 4032), (887, 308)],
)
def test_of_photos_few_values_are_not_timms(size: tuple[int, int]) -> None:
    """Tall ones too, of which Pillow 13 resizes the columns first."""
    found = differences(AT_224, noise(*size, 3))
    assert found.max() <= 1
    assert found.mean() <= 0.001


@pytest.mark.parametrize(
    ("size", "made"),
    [
        ((375, 500), (232, 232)),  # not 330 x 248
        ((500, 375), (232, 232)),
        ((224, 400), (232, 248)),  # enlarged
        ((887, 308), (248, 714)),  # Pillow 13 resizes its columns first
        ((4100, 6000), (362, 248)),  # the part would be large
        ((248, 311), (311, 248)),
    ],
)
def test_no_more_is_resized_than_the_crop_leaves(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], made: tuple[int, int]
) -> None:
    """At the most; what is as large as it should be is as it was."""
    asked: list[tuple[int, int]] = []
    resize = Image.Image.resize

    def recorded(image: Image.Image, to: tuple[int, int], *how: Any) -> Image.Image:
        asked.append(to)
        return resize(image, to, *how)

    backbone, _ = preprocess(json.dumps(AT_224, sort_keys=True))
    image = noise(*size, 3)
    monkeypatch.setattr(Image.Image, "resize", recorded)
    pixels = without_torch(image, backbone.preprocessing)
    assert pixels.shape == (224, 224, 3)
    ((width, height),) = asked
    assert width <= made[0]
    assert height <= made[1]
    if size == (248, 311):
        np.testing.assert_array_equal(pixels, image[12:236, 44:268])


@settings(max_examples=50, deadline=None)
@given(config=CONFIGS, height=st.integers(16, 300), seed=st.integers(0, 2**31))
def test_preprocessing_of_wide_images_is_timms_nearly_to_the_bit(
    config: dict[str, Any], height: int, seed: int
) -> None:
    """Pillow resizes these as the graph does: rows first. Bilinear sums often end at a half."""
    image = noise(height, 2 * height + 100, 3, seed=seed)
    config = {**config, "input_size": [3, 32, 32], "crop_mode": "center"}
    limit = 0.02 if config["interpolation"] == "bicubic" else 0.25
    assert grey_levels(config, image).mean() <= limit


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    "size", [(480, 640), (1203, 803), (224, 224), (225, 224), (248, 311), (97, 1300), (3, 2)]
)
def test_preprocessing_at_224_pixels(interpolation: str, size: tuple[int, int]) -> None:
    config = {"input_size": [3, 224, 224], "interpolation": interpolation, "crop_pct": 0.9}
    assert grey_levels(config, noise(*size, 3)).mean() <= 0.6


@pytest.mark.parametrize("crop_mode", ["center", "squash"])
def test_an_image_of_the_models_size_is_not_changed(crop_mode: str) -> None:
    config = {"input_size": [3, 40, 40], "crop_mode": crop_mode, "crop_pct": 1.0}
    assert grey_levels(config, noise(40, 40, 3)).max() < 1e-3


def test_parts_together_are_the_whole(vit: Exported) -> None:
    backbone, template = vit
    file = graph.materialise(template, learned(backbone, 3), 1)
    first, second = graph.split(file)
    images = noise(2, 70, 33, 3)
    pixels = session(first).run(None, {graph.IMAGES: images})[0]
    parts = session(second).run(list(graph.OUTPUTS), {graph.PIXELS: pixels})
    whole = session(file).run(list(graph.OUTPUTS), {graph.IMAGES: images})
    for part, expected in zip(parts, whole, strict=True):
        np.testing.assert_allclose(part, expected, atol=1e-5)


def test_composing_refuses_what_it_cannot_keep() -> None:
    to = preprocessing_of({})
    with pytest.raises(UnsupportedBackboneError, match=r"lacks blocks\.0\.attn\.key\.weight"):
        graph.compose(no_backbone(), ("blocks.0.attn",), 3, to)
    contrib = no_backbone()
    contrib.graph.node[0].domain = "com.microsoft"
    with pytest.raises(UnsupportedBackboneError, match="not plain ONNX"):
        graph.compose(contrib, (), 3, to)
    clash = no_backbone()
    clash.graph.node[0].output[0] = clash.graph.node[1].input[0] = graph.LOGITS
    with pytest.raises(UnsupportedBackboneError, match="a name of ours: 'logits'"):
        graph.compose(clash, (), 3, to)


@pytest.mark.skipif(not DEIT_TINY.is_file(), reason="the weights of DeiT-tiny are not here")
def test_deit_tiny_as_published() -> None:
    backbone = create_backbone(str(DEIT_TINY))
    model = learned(backbone, 10)
    model = replace(model, head_weight=model.head_weight / 10)
    file = graph.materialise(export_template(backbone), model, 1)
    images = [noise(200, 300, 3, seed=i) for i in range(3)]
    expected = torch_model(backbone, model)
    report = compared(file, expected, images, backbone)
    assert report.max_abs_diff <= 1e-4
