"""Loading, refusing and rebuilding backbones; preprocessing as timm does it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data.transforms_factory import create_transform

from inflora_core.backbone import (
    Backbone,
    attention_layers,
    build_backbone,
    create_backbone,
    fold_biases,
    preprocessing_of,
    state_of,
)
from inflora_core.errors import (
    DamagedError,
    InfloraError,
    InvalidInputError,
    UnavailableError,
    UnsupportedBackboneError,
)
from inflora_core.model import BackboneConfig

DEIT_TINY = Path(__file__).parents[3] / "shared/data/deit_tiny_patch16_224.fp16.safetensors"

SMALL: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
}


@dataclass(frozen=True)
class Family:
    """A kind of ViT in its smallest form."""

    architecture: str
    args: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def model_args(self) -> dict[str, Any]:
        return {**SMALL, **self.args}


FAMILIES = {
    "vit": Family("vit_tiny_patch16_224"),
    "deit": Family("deit_tiny_patch16_224", {"num_heads": 4, "embed_dim": 48}),
    "deit-distilled": Family("deit_tiny_distilled_patch16_224"),
    "registers-avg-pool": Family("vit_medium_patch16_reg4_gap_256", {"img_size": [32, 48]}),
    "dinov2": Family("vit_small_patch14_reg4_dinov2", {"img_size": 42, "patch_size": 14}),
    "qk-norm": Family("vit_tiny_patch16_224", {"qk_norm": True, "qkv_bias": False}),
    "clip": Family("vit_base_patch32_clip_quickgelu_224"),
    "siglip": Family("vit_base_patch16_siglip_224", {}, {"crop_mode": "squash", "crop_pct": 0.8}),
    "dinov3": Family("vit_small_patch16_dinov3_qkvb"),
    "eva": Family("eva_giant_patch14_224", {}, {"interpolation": "bilinear"}),
    "rope-mixed": Family("vit_small_patch16_rope_mixed_224"),
}
"""Every kind that must work, from the file to the exported graph."""


def write(path: Path, family: Family, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """Write ``family`` with lively random weights and the metadata that says what it is."""
    torch.manual_seed(seed)
    module = timm.create_model(family.architecture, num_classes=0, **family.model_args)
    # As they are made, tokens and LayerScale are so small that a wrong one would not be seen.
    state = {
        key: (value + 0.1 * torch.randn_like(value)).to(dtype).contiguous()
        for key, value in module.state_dict().items()
    }
    config = {
        "architecture": family.architecture,
        "model_args": family.model_args,
        "pretrained_cfg": family.data,
    }
    save_file(state, path, metadata={"timm_config": json.dumps(config)})
    return path


@pytest.fixture(scope="module", params=FAMILIES, ids=str)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    path = tmp_path_factory.mktemp("family") / "weights.safetensors"
    return create_backbone(str(write(path, FAMILIES[request.param])))


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    return write(tmp_path / "weights.safetensors", FAMILIES["vit"])


def rewrite(path: Path, change: Any, metadata: dict[str, str] | None = None) -> None:
    """Change a file's tensors in place; keep its metadata unless other is given."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        kept = file.metadata() if metadata is None else metadata
    change(state)
    save_file(state, path, metadata=kept)


def test_families_load_frozen_with_their_attention_layers(loaded: Backbone) -> None:
    assert loaded.config.layers == ("blocks.0.attn", "blocks.1.attn")
    assert loaded.preprocessing.height in (32, 42), "the size asked for, not the published one"
    assert list(loaded.layers) == list(loaded.config.layers)
    assert not loaded.module.training
    for parameter in loaded.module.parameters():
        assert not parameter.requires_grad
        assert parameter.dtype == torch.float32
    size = (loaded.preprocessing.height, loaded.preprocessing.width)
    with torch.inference_mode():
        embedding = loaded.module(torch.randn(3, 3, *size))
    assert embedding.shape == (3, loaded.config.embedding_size)
    for name in loaded.config.layers:
        assert loaded.qkv(name) is loaded.layers[name].get_submodule("qkv")


def test_a_replaced_qkv_is_what_attention_calls(loaded: Backbone) -> None:
    class Recording(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner, self.calls = inner, 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return self.inner(x)

    size = (loaded.preprocessing.height, loaded.preprocessing.width)
    pixels = torch.randn(2, 3, *size)
    with torch.inference_mode():
        before = loaded.module(pixels)
        for attention in loaded.layers.values():
            attention.qkv = Recording(attention.qkv)
        try:
            assert torch.equal(loaded.module(pixels), before)
            assert [layer.qkv.calls for layer in loaded.layers.values()] == [1, 1]
        finally:
            for attention in loaded.layers.values():
                attention.qkv = attention.qkv.inner


def test_a_backbone_is_rebuilt_from_what_is_kept(loaded: Backbone) -> None:
    said = json.loads(json.dumps(loaded.config.__dict__))
    config = BackboneConfig(**{**said, "layers": tuple(said["layers"])})
    state = state_of(loaded)
    assert all(array.flags.c_contiguous for array in state.values())
    again = build_backbone(config, state)
    assert again.config == loaded.config
    assert again.preprocessing == loaded.preprocessing
    size = (loaded.preprocessing.height, loaded.preprocessing.width)
    pixels = torch.randn(2, 3, *size)
    with torch.inference_mode():
        assert torch.equal(again.module(pixels), loaded.module(pixels))


def test_state_is_a_copy(vit: Path) -> None:
    backbone = create_backbone(str(vit))
    state_of(backbone)["cls_token"][:] = 7
    assert not (state_of(backbone)["cls_token"] == 7).any()


@pytest.mark.parametrize("family", ["dinov3", "eva"])
def test_folding_biases_changes_no_output(family: str) -> None:
    torch.manual_seed(1)
    kind = FAMILIES[family]
    module = timm.create_model(kind.architecture, num_classes=0, **kind.model_args).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for block in module.blocks:  # zero in every timm model, but a folded one must not need it
            block.attn.k_bias.add_(torch.randn_like(block.attn.k_bias))
        pixels = torch.randn(2, 3, 32, 32)
        before = module(pixels)
        with pytest.raises(UnsupportedBackboneError, match="not called as a module"):
            attention_layers(module)
        fold_biases(module)
        assert len(attention_layers(module)) == 2
        torch.testing.assert_close(module(pixels), before, rtol=0, atol=1e-5)
        assert module.blocks[0].attn.qkv.bias.abs().sum() > 0


@pytest.mark.parametrize(
    ("architecture", "args", "reason"),
    [
        (
            "swin_tiny_patch4_window7_224",
            {
                "img_size": 32,
                "window_size": 4,
                "embed_dim": 24,
                "depths": (1, 1, 1, 1),
                "num_heads": (1, 1, 1, 1),
            },
            "SwinTransformer .* windows",
        ),
        ("convnext_atto", {"depths": (1, 1, 1, 1)}, "ConvNeXt .* no attention layers"),
        ("resnet18", {}, "ResNet .* no attention layers"),
        ("vit_base_patch16_xp_224", SMALL, "ParallelScalingBlock.*parallel"),
        ("vit_small_patch16_18x2_224", SMALL, "ParallelThingsBlock.*parallel"),
        ("eva02_base_patch14_224", SMALL, "separate layers, not one fused qkv"),
        ("beit_base_patch16_224", SMALL, "Beit is not a plain"),
        ("vit_tiny_patch16_224", {**SMALL, "attn_layer": "diff"}, "DiffAttention is not supported"),
        (
            "vit_small_patch16_rope_mixed_224",
            {**SMALL, "qkv_fused": False, "num_kv_heads": 1},
            "grouped-query",
        ),
    ],
)
def test_other_models_are_refused_with_the_reason(
    architecture: str, args: dict[str, Any], reason: str
) -> None:
    module = timm.create_model(architecture, num_classes=0, **args)
    fold_biases(module)
    with pytest.raises(UnsupportedBackboneError, match=reason):
        attention_layers(module)


@pytest.mark.parametrize(
    ("args", "data", "reason"),
    [
        ({"in_chans": 1}, {"input_size": [1, 32, 32]}, "1 channels, not RGB"),
        ({"global_pool": ""}, {}, "one vector for each image"),
        ({}, {"crop_mode": "border"}, "crop_mode 'border'"),
        ({}, {"interpolation": "lanczos"}, "interpolation 'lanczos'"),
    ],
)
def test_what_the_graph_cannot_do_is_refused(
    tmp_path: Path, args: dict[str, Any], data: dict[str, Any], reason: str
) -> None:
    path = write(tmp_path / "x.safetensors", Family("vit_tiny_patch16_224", args, data))
    with pytest.raises(UnsupportedBackboneError, match=reason):
        create_backbone(str(path))


def test_a_qkv_that_is_not_called_is_refused(vit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from timm.layers.attention import Attention

    def forward(self: Attention, x: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        rows = torch.nn.functional.linear(x, self.qkv.weight, self.qkv.bias)
        return self.proj(rows[..., : x.shape[-1]])

    monkeypatch.setattr(Attention, "forward", forward)
    with pytest.raises(UnsupportedBackboneError, match="called 0 times as a module"):
        create_backbone(str(vit))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_widened(tmp_path: Path, dtype: torch.dtype) -> None:
    path = write(tmp_path / "half.safetensors", FAMILIES["vit"], dtype=dtype)
    backbone = create_backbone(str(path))
    full = create_backbone(str(write(tmp_path / "full.safetensors", FAMILIES["vit"])))
    expected = full.module.state_dict()["cls_token"].to(dtype).float()
    assert torch.equal(backbone.module.state_dict()["cls_token"], expected)


def strip_metadata(path: Path) -> None:
    rewrite(path, lambda state: None, metadata={})


def test_the_configuration_may_lie_beside_the_file(vit: Path) -> None:
    strip_metadata(vit)
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 1000,
        "model_args": {**SMALL, "num_classes": 1000},
        "pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.1, 0.2, 0.3], "url": ""},
    }
    vit.with_name("config.json").write_text(json.dumps(config))
    backbone = create_backbone(str(vit))
    assert backbone.preprocessing.mean == (0.1, 0.2, 0.3)
    assert "num_classes" not in backbone.config.model_args
    assert backbone.config.pretrained_cfg["input_size"] == [3, 32, 32]


def test_the_file_name_may_be_the_architecture(tmp_path: Path) -> None:
    module = timm.create_model("test_vit", num_classes=10)
    path = tmp_path / "test_vit.fp16.v1.safetensors"
    save_file({key: value.half() for key, value in module.state_dict().items()}, path)
    by_name = create_backbone(str(path))
    assert by_name.config.architecture == "test_vit"
    assert by_name.preprocessing.height == module.patch_embed.img_size[0]
    other = tmp_path / "weights.safetensors"
    path.rename(other)
    with pytest.raises(InvalidInputError, match="does not say which timm model"):
        create_backbone(str(other))
    assert create_backbone(str(other), architecture="test_vit").config == by_name.config


def test_classifier_weights_are_dropped(tmp_path: Path) -> None:
    family = FAMILIES["deit-distilled"]
    path = write(tmp_path / "x.safetensors", family)
    before = create_backbone(str(path))

    def add_heads(state: dict[str, torch.Tensor]) -> None:
        for head in ("head", "head_dist"):
            state[f"{head}.weight"], state[f"{head}.bias"] = torch.ones(5, 32), torch.ones(5)

    rewrite(path, add_heads)
    pixels = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(create_backbone(str(path)).module(pixels), before.module(pixels))


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        (lambda s: s.pop("blocks.1.mlp.fc1.bias"), InvalidInputError, "blocks.1.mlp.fc1.bias"),
        (lambda s: s.update(surplus=torch.ones(1)), InvalidInputError, "unexpected.*surplus"),
        (lambda s: s.update(cls_token=torch.ones(1, 1, 31)), InvalidInputError, "cls_token"),
        (lambda s: s.update(cls_token=torch.ones(1, 1, 32).int()), InvalidInputError, "int32"),
        (lambda s: s["norm.weight"].fill_(torch.nan), DamagedError, "norm.weight is not finite"),
        (lambda s: s["norm.bias"].fill_(torch.inf), DamagedError, "norm.bias is not finite"),
    ],
)
def test_weights_that_do_not_fit_are_named(
    vit: Path, change: Any, error: type[InfloraError], named: str
) -> None:
    rewrite(vit, change)
    with pytest.raises(error, match=named):
        create_backbone(str(vit))


def test_stored_weights_that_do_not_fit_are_damage(vit: Path) -> None:
    backbone = create_backbone(str(vit))
    state = state_of(backbone)
    state.pop("cls_token")
    with pytest.raises(DamagedError, match="cls_token"):
        build_backbone(backbone.config, state)


@pytest.mark.parametrize("keep", [0, 4, 100, 3000])
def test_a_truncated_file_is_damaged(vit: Path, keep: int) -> None:
    vit.write_bytes(vit.read_bytes()[:keep])
    with pytest.raises(DamagedError, match=r"weights\.safetensors"):
        create_backbone(str(vit))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ("{", "not a timm model's config"),
        ("[]", "not a timm model's config"),
        ("{}", "architecture"),
        ('{"architecture": 3}', "architecture is not a str"),
        ('{"architecture": "vit_tinny_patch16_224"}', "did you mean vit_tiny_patch16_224"),
        ('{"architecture": "local-dir:/tmp"}', "no model"),
        ('{"architecture": "vit_tiny_patch16_224", "model_args": [1]}', "model_args is not a"),
        ('{"architecture": "vit_tiny_patch16_224", "model_args": {"x": 1}}', "cannot build"),
        (
            '{"architecture": "vit_tiny_patch16_224", "model_args": {"checkpoint_path": "x"}}',
            "checkpoint_path",
        ),
        (
            '{"architecture": "vit_tiny_patch16_224", "pretrained_cfg": 7}',
            "pretrained_cfg is not a dict",
        ),
    ],
)
def test_a_configuration_that_makes_no_sense(vit: Path, config: str, named: str) -> None:
    rewrite(vit, lambda state: None, metadata={"timm_config": config})
    with pytest.raises(InvalidInputError, match=named):
        create_backbone(str(vit))


@pytest.mark.parametrize(
    "data",
    [
        {"mean": [0.5, 0.5]},
        {"std": [1.0, 0.0, 1.0]},
        {"mean": ["a", 0, 0]},
        {"crop_pct": 1.5},
        {"crop_pct": -1},
        {"input_size": [3, 0, 32]},
        {"input_size": 32},
    ],
)
def test_a_data_configuration_that_makes_no_sense(data: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError):
        preprocessing_of(data)


def test_sources_that_are_not_there(tmp_path: Path, vit: Path) -> None:
    with pytest.raises(InvalidInputError, match="there is no file"):
        create_backbone(str(tmp_path / "nothing.safetensors"))
    with pytest.raises(InvalidInputError, match=r"did you mean .*vit_tiny_patch16_224"):
        create_backbone("vit_tinny_patch16_224")
    with pytest.raises(InvalidInputError, match="for a local file"):
        create_backbone("vit_tiny_patch16_224", architecture="vit_tiny_patch16_224")
    with pytest.raises(InvalidInputError, match="not 'deit_tiny_patch16_224'"):
        create_backbone(str(vit), architecture="deit_tiny_patch16_224")


def test_no_network_points_to_a_local_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UnavailableError, match=r"local \.safetensors file"):
        create_backbone("vit_tiny_patch16_224.augreg_in21k")


def test_a_timm_name_loads_through_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model
    asked = []

    def pretrained(name: str, *, pretrained: bool, **args: Any) -> torch.nn.Module:
        asked.append((name, pretrained))
        return create(name.partition(".")[0], pretrained=False, **args)

    monkeypatch.setattr(timm, "create_model", pretrained)
    backbone = create_backbone("test_vit.r160_in1k")
    assert asked == [("test_vit.r160_in1k", True)]
    assert backbone.config.architecture == "test_vit"
    monkeypatch.undo()
    assert build_backbone(backbone.config, state_of(backbone)).config == backbone.config


@pytest.mark.parametrize("family", ["vit", "registers-avg-pool", "siglip", "eva"])
def test_resizing_and_normalising_are_timms_own(tmp_path: Path, family: str) -> None:
    backbone = create_backbone(str(write(tmp_path / "x.safetensors", FAMILIES[family])))
    cfg = backbone.config.pretrained_cfg
    transform = create_transform(**{**cfg, "input_size": tuple(cfg["input_size"])})
    rng = np.random.default_rng(0)
    for shape in ((90, 41, 3), (32, 32, 3), (17, 200, 3)):
        image = rng.integers(0, 256, shape, dtype=np.uint8)
        resized = backbone.resize(image)
        assert resized.shape == (backbone.preprocessing.height, backbone.preprocessing.width, 3)
        assert resized.dtype == np.uint8
        assert resized.flags.c_contiguous
        assert resized.flags.writeable
        assert np.array_equal(resized, backbone.resize(Image.fromarray(image)))
        pixels = backbone.normalise(torch.from_numpy(resized[None]))
        apart = (pixels[0] - transform(Image.fromarray(image))).abs()
        level = 1 / 255 / min(backbone.preprocessing.std)
        assert apart.max() < 2.01 * level  # some sums are rounded otherwise
        assert apart.mean() < 0.05 * level


def test_grey_images_become_rgb(vit: Path) -> None:
    grey = Image.fromarray(np.full((40, 50), 9, np.uint8))
    assert (create_backbone(str(vit)).resize(grey) == 9).all()


@pytest.mark.skipif(not DEIT_TINY.is_file(), reason="the weights of DeiT-tiny are not here")
def test_deit_tiny_as_published() -> None:
    backbone = create_backbone(str(DEIT_TINY))
    assert backbone.config.architecture == "deit_tiny_patch16_224"
    assert len(backbone.config.layers) == 12
    assert backbone.config.embedding_size == 192
    assert backbone.preprocessing.resize_height == 248
    assert backbone.preprocessing.mean == (0.485, 0.456, 0.406)
