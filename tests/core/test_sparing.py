"""The same features and gradients as timm's, with less work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inflora_core import sparing as sparing_module
from inflora_core.adapters import adapted
from inflora_core.backbone import Backbone, create_backbone
from inflora_core.sparing import sparing
from tests.core.test_backbone import FAMILIES, write


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    folder = tmp_path_factory.mktemp("family")
    return create_backbone(str(write(folder / "weights.safetensors", FAMILIES[request.param])))


def images(backbone: Backbone) -> Tensor:
    size = backbone.preprocessing.height, backbone.preprocessing.width
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, *size, 3), dtype=torch.uint8, generator=generator)


def features_and_gradients(family: Backbone, run: Callable[[], Tensor]) -> list[Tensor]:
    """Return the features that ``run`` gives beside branches, and the gradients of those."""
    reductions = {
        name: torch.eye(family.qkv(name).get_parameter("weight").shape[1])[:3]
        for name in family.config.layers
    }
    with adapted(family.layers, reductions) as branches:
        expansions = [branch.expansion for branch in branches.values()]
        for expansion in expansions:
            expansion.data.fill_(0.01)
        features = run().float()
        return [features.detach(), *torch.autograd.grad(features.square().sum(), expansions)]


def test_features_and_gradients_are_those_of_timm(family: Backbone) -> None:
    pixels = family.normalise(images(family))
    plainly = features_and_gradients(family, lambda: family.module(pixels))
    with sparing(family.module):
        sparingly = features_and_gradients(family, lambda: family.module(pixels))
    for plain, spared in zip(plainly, sparingly, strict=True):
        assert torch.allclose(plain, spared, atol=1e-4 * float(plain.abs().max()))


@pytest.mark.parametrize("shares", [2**21, 0], ids=["products", "fused"])
def test_bfloat16_is_as_near_whatever_multiplies(
    family: Backbone, shares: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparing_module, "_MOST_SHARES", shares)
    fused: list[torch.dtype] = []

    def attend(*args: Any, **kwargs: Any) -> Tensor:
        fused.append(args[0].dtype)
        return attention(*args, **kwargs)

    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    pixels = images(family)
    whole = features_and_gradients(family, lambda: family.features(pixels))
    with torch.autocast("cpu", torch.bfloat16):
        half = features_and_gradients(family, lambda: family.features(pixels))
    for plain, rounded in zip(whole, half, strict=True):
        assert (plain - rounded).norm() <= 0.05 * plain.norm()
    plain_layers = sum(map(sparing_module._is_plain, family.module.modules()))
    alone = sparing_module._reads_first_token(family.module)  # attends for one token, and is fused
    products = fused.count(torch.float32) - fused.count(torch.bfloat16)
    assert products == (plain_layers - alone if shares else 0)


def test_fewer_tokens_go_through_the_last_block(tmp_path: Path) -> None:
    backbone = create_backbone(str(write(tmp_path / "weights.safetensors", FAMILIES["vit"])))
    seen: list[int] = []

    def count(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].shape[1])

    blocks = backbone.module.get_submodule("blocks")
    last = list(blocks.children())[-1]
    last.get_submodule("mlp").register_forward_pre_hook(count)
    with torch.no_grad():
        plain = backbone.module(backbone.normalise(images(backbone)))
        spared = backbone.features(images(backbone))
        again = backbone.module(backbone.normalise(images(backbone)))
    assert seen[0] == seen[2] > 1
    assert seen[1] == 1
    assert torch.equal(plain, again)
    assert torch.allclose(plain, spared, atol=1e-5)


def test_a_pass_that_fails_leaves_the_block_as_it_was(tmp_path: Path) -> None:
    backbone = create_backbone(str(write(tmp_path / "weights.safetensors", FAMILIES["vit"])))
    block = list(backbone.module.get_submodule("blocks").children())[-1]
    with pytest.raises((AssertionError, RuntimeError)):
        backbone.features(torch.zeros((1, 5, 5, 3), dtype=torch.uint8))
    assert "forward" not in vars(block)
