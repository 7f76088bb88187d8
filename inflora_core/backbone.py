"""Frozen timm vision transformers: loading, attention layers, preprocessing.

A backbone can be taught when every block's attention computes query, key and value with one
fused ``qkv`` linear layer that is *called* as a module, because the adapter takes its place as
``attn.qkv``. Everything else is refused with the reason.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError, safe_open
from timm.data.config import resolve_data_config
from timm.layers.attention import Attention, AttentionRope
from timm.models import load_model_config_from_hf, split_model_name_tag
from timm.models.eva import Eva, EvaAttention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from inflora_core.errors import (
    DamagedError,
    InfloraError,
    InvalidInputError,
    UnavailableError,
    UnsupportedBackboneError,
)
from inflora_core.images import resized
from inflora_core.model import BackboneConfig, Preprocessing
from inflora_core.sparing import sparing

CONFIG_KEY = "timm_config"
"""Key of a safetensors file's metadata whose value is the ``config.json`` of a timm hub model."""

INTERPOLATIONS = ("bicubic", "bilinear")
CROP_MODES = ("center", "squash")

_CLASSIFIERS = ("head", "head_dist")
_MODEL_ARGS_REFUSED = frozenset(
    {
        "cache_dir",
        "checkpoint_path",
        "features_only",
        "model_name",
        "pretrained",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "pretrained_model_args",
    }
)
_FIELD = "backbone"


@dataclass(frozen=True)
class Backbone:
    """A frozen feature extractor and what belongs to it.

    Attributes:
        module: timm model without classifier, in eval mode, float32, without gradients; maps
            pixels (n, 3, S, S') float32 to embeddings (n, e) float32.
        config: How to build ``module`` again; ``layers`` and ``embedding_size`` are filled in.
        preprocessing: From a decoded image to ``module``'s input.
    """

    module: nn.Module
    config: BackboneConfig
    preprocessing: Preprocessing

    @property
    def layers(self) -> dict[str, nn.Module]:
        """The attention layers by name, first to last; each has a ``qkv`` (d to 3a)."""
        return {name: self.module.get_submodule(name) for name in self.config.layers}

    def qkv(self, name: str) -> nn.Module:
        """Return the fused projection (d to 3a) of the attention layer called ``name``."""
        return self.module.get_submodule(f"{name}.qkv")

    def resize(self, image: Image.Image | NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Resize and crop one image as timm's own evaluation transform does, as ``resized`` says.

        Args:
            image: PIL image, or (h, w, 3) uint8 RGB.

        Returns:
            (S, S', 3) uint8, contiguous, writable.
        """
        picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        return np.array(resized(picture.convert("RGB"), self.preprocessing), order="C")

    def normalise(self, images: Tensor) -> Tensor:
        """Make resized images the module's input.

        Args:
            images: (n, S, S', 3) uint8, on any device.

        Returns:
            (n, 3, S, S') float32 on the same device, contiguous.
        """
        mean, std = self._mean_and_std(images.device)
        pixels = images.permute(0, 3, 1, 2).to(mean, memory_format=torch.contiguous_format)
        return pixels.div_(255).sub_(mean).div_(std)

    def features(self, images: Tensor) -> Tensor:
        """Return embeddings (n, e) of resized images (n, S, S', 3) uint8, on the same device."""
        with self.passing() as features:
            return features(images)

    @contextmanager
    def passing(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Yield ``features`` for many passes, from several threads if need be."""
        with sparing(self.module):
            yield lambda images: self.module(self.normalise(images))

    def _mean_and_std(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return both as (1, 3, 1, 1) on ``device``, where making them anew would wait for it."""
        if device not in self._constants:
            # What is made in inference mode cannot be used outside of it.
            with torch.inference_mode(False):
                mean, std = (
                    torch.tensor(values, device=device).view(1, 3, 1, 1)
                    for values in (self.preprocessing.mean, self.preprocessing.std)
                )
            self._constants[device] = mean, std
        return self._constants[device]

    @cached_property
    def _constants(self) -> dict[torch.device, tuple[Tensor, Tensor]]:
        return {}


def create_backbone(source: str, *, architecture: str | None = None) -> Backbone:
    """Load a pretrained backbone.

    The architecture and arguments of a local file are read from its safetensors metadata
    (``timm_config``), else from a ``config.json`` beside it, else they are ``architecture``, else
    the part of the file's name before the first dot.

    Args:
        source: Path of a local ``.safetensors`` file, or a timm name
            (``vit_base_patch16_224.augreg_in21k``, ``hf-hub:owner/model``), which needs a network
            or a filled cache.
        architecture: timm's name of a local file's model, where the file does not say.

    Returns:
        The backbone, its classifier dropped, its weights widened to float32.

    Raises:
        InvalidInputError: if the source, its configuration or its weights do not fit together.
        UnsupportedBackboneError: if the model cannot be taught.
        DamagedError: if the file cannot be read, or a weight is not finite.
        UnavailableError: if the weights cannot be downloaded.
    """
    if not _is_local(source):
        if architecture is not None:
            raise InvalidInputError(
                "an architecture is for a local file; a timm name already says it",
                field="architecture",
            )
        return _from_timm(source)
    path = Path(source)
    if not path.is_file():
        raise InvalidInputError(f"there is no file {source}", field=_FIELD)
    metadata, weights = _read_weights(path)
    name, model_args, data = _local_config(path, metadata, architecture)
    module = _create_module(name, model_args)
    # Before anything that a ConvNet would fail at for another reason than that it is one.
    attention_layers(module)
    if "img_size" not in model_args and "input_size" in data:
        model_args["img_size"] = data["input_size"][1:]
        module = _create_module(name, model_args)
    data = {**_default_data(module), **data}
    dropped = _classifier_prefixes(module)
    weights = {key: value for key, value in weights.items() if not key.startswith(dropped)}
    _load(module, fold_bias_weights(weights), f"{source} as {name}", InvalidInputError)
    return _finish(module, name, model_args, data)


def build_backbone(
    config: BackboneConfig, weights: Mapping[str, Tensor | NDArray[Any]]
) -> Backbone:
    """Build a backbone again from what ``state_of`` and ``Backbone.config`` gave.

    Raises:
        DamagedError: if a weight is missing, unexpected, of another shape or not finite.
        InvalidInputError: if this timm cannot build ``config``.
        UnsupportedBackboneError: if the model cannot be taught.
    """
    module = _create_module(config.architecture, config.model_args)
    _load(module, weights, f"the stored weights of {config.architecture}", DamagedError)
    backbone = _finish(module, config.architecture, config.model_args, config.pretrained_cfg)
    if config.layers and backbone.config.layers != config.layers:
        raise DamagedError(f"{config.architecture} has other attention layers than were stored")
    return backbone


def state_of(backbone: Backbone) -> dict[str, NDArray[Any]]:
    """Return copies of all weights under the module's own names.

    Floating-point weights are float32; counters, where a model has any, keep their type.
    """
    return {
        name: np.array(tensor.detach().cpu().numpy(), order="C", copy=True)
        for name, tensor in backbone.module.state_dict().items()
    }


def attention_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Find the attention layers of a timm ViT, first to last.

    Args:
        module: A timm ``VisionTransformer`` or ``Eva``, or a subclass of one.

    Returns:
        Attention modules by name (``blocks.0.attn``). Each has a linear ``qkv`` (d to 3a) and
        reads its queries, keys and values from ``attn.qkv(x)``. An attention-pool head is not
        among them.

    Raises:
        UnsupportedBackboneError: saying why, if any block has no such layer.
    """
    kind = type(module).__name__
    if not isinstance(module, VisionTransformer | Eva):
        fused = any(name.endswith("qkv") for name, _ in module.named_modules())
        reason = (
            "its attention works in windows, stages or with relative positions"
            if fused
            else "it has no attention layers with a fused qkv projection"
        )
        raise UnsupportedBackboneError(
            f"{kind} is not a plain vision transformer (timm's VisionTransformer or Eva): {reason}",
            field=_FIELD,
        )
    layers: dict[str, nn.Module] = {}
    for index, block in enumerate(module.blocks):
        name = f"blocks.{index}.attn"
        attention: nn.Module | None = getattr(block, "attn", None)
        refusal = _refusal(attention)
        if attention is None or refusal is not None:
            raise UnsupportedBackboneError(
                f"{kind}, {name} of {type(block).__name__}: {refusal}", field=_FIELD
            )
        layers[name] = attention
    if not layers:
        raise UnsupportedBackboneError(f"{kind} has no blocks", field=_FIELD)
    return layers


def fold_biases(module: nn.Module) -> None:
    """Move the separate q, k and v biases of EVA attention into ``qkv.bias``, in place.

    ``EvaAttention`` with biases of its own reads ``qkv.weight`` and never calls ``qkv``, so that
    an adapter in its place would not be seen. The outputs stay the same.
    """
    for attention in module.modules():
        if not isinstance(attention, EvaAttention):
            continue
        parts: list[Any] = [getattr(attention, f"{letter}_bias") for letter in "qkv"]
        if parts[0] is not None:
            attention.qkv.bias = nn.Parameter(torch.cat([part.detach() for part in parts]))
            for letter in "qkv":
                setattr(attention, f"{letter}_bias", None)


def fold_bias_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``weights`` with each ``q_bias`` and ``v_bias`` pair as one ``qkv.bias``.

    The weights' side of ``fold_biases``: a timm file of an EVA model holds the pair (and no
    ``k_bias``, which is zero).
    """
    folded = dict(weights)
    for key in weights:
        prefix = key.removesuffix("q_bias")
        if prefix == key or f"{prefix}v_bias" not in weights:
            continue
        query, value = folded.pop(key), folded.pop(f"{prefix}v_bias")
        key_bias = folded.pop(f"{prefix}k_bias", torch.zeros_like(query))
        folded[f"{prefix}qkv.bias"] = torch.cat([query, key_bias, value])
    return folded


def preprocessing_of(pretrained_cfg: Mapping[str, Any]) -> Preprocessing:
    """Read timm's data configuration, with timm's defaults for what it lacks.

    Raises:
        UnsupportedBackboneError: if it asks for what the exported graph cannot do.
        InvalidInputError: if a value makes no sense.
    """
    data = _data_config(pretrained_cfg)
    channels, height, width = data["input_size"]
    if channels != 3:
        raise UnsupportedBackboneError(
            f"the model reads images of {channels} channels, not RGB", field=_FIELD
        )
    for key, known in (("interpolation", INTERPOLATIONS), ("crop_mode", CROP_MODES)):
        if data[key] not in known:
            raise UnsupportedBackboneError(
                f"{key} {data[key]!r} is not supported; there are: {', '.join(known)}", field=_FIELD
            )
    mean, std = tuple(map(float, data["mean"])), tuple(map(float, data["std"]))
    crop = float(data["crop_pct"])
    if len(mean) != 3 or len(std) != 3 or not all(map(math.isfinite, mean + std)) or min(std) <= 0:
        raise InvalidInputError(f"mean {mean} and std {std} are not 3 channels'", field=_FIELD)
    if not 0 < crop <= 1:
        raise InvalidInputError(f"crop_pct {crop} is not in (0, 1]", field=_FIELD)
    return Preprocessing(
        height=height,
        width=width,
        resize_height=math.floor(height / crop),
        resize_width=math.floor(width / crop),
        interpolation=data["interpolation"],
        crop_mode=data["crop_mode"],
        mean=(mean[0], mean[1], mean[2]),
        std=(std[0], std[1], std[2]),
    )


def _is_local(source: str) -> bool:
    if source.startswith(("hf-hub:", "hf_hub:")):
        return False
    return source.endswith(".safetensors") or "/" in source or "\\" in source


def _from_timm(source: str) -> Backbone:
    name, model_args = source, {}
    hub = ":" in source
    if not hub:
        name = split_model_name_tag(source)[0]
        _check_architecture(name)
    try:
        if hub:
            _, name, model_args = load_model_config_from_hf(source.split(":", 1)[1])
        module = timm.create_model(source, pretrained=True, num_classes=0)
    except Exception as error:  # the download clients share no base class
        raise UnavailableError(
            f"cannot load {source} through timm: {error}. "
            "Without a network, give the path of a local .safetensors file instead",
            field=_FIELD,
        ) from error
    model_args = {key: value for key, value in model_args.items() if key != "num_classes"}
    fold_biases(module)
    data = _default_data(module)
    weights = module.state_dict()
    _load(module, weights, source, InvalidInputError)
    return _finish(module, name, model_args, data)


def _check_architecture(name: str) -> None:
    if timm.is_model(name):
        return
    near = difflib.get_close_matches(name, timm.list_models(), n=3)
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    raise InvalidInputError(f"timm {timm.__version__} has no model {name!r}{hint}", field=_FIELD)


def _read_weights(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            return metadata, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise DamagedError(
            f"{path} is not a readable safetensors file: {error}", field=_FIELD
        ) from error


def _local_config(
    path: Path, metadata: Mapping[str, str], architecture: str | None
) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Return architecture, model arguments and what is said of the data configuration."""
    beside = path.with_name("config.json")
    text, origin = metadata.get(CONFIG_KEY), f"the metadata of {path}"
    if text is None and beside.is_file():
        text, origin = beside.read_text("utf-8"), str(beside)
    if text is None:
        name = architecture or path.name.split(".", 1)[0]
        if architecture is None and not timm.is_model(name):
            raise InvalidInputError(
                f"{path} does not say which timm model it holds: give an architecture, put a "
                "config.json beside it, or name the file after one",
                field="architecture",
            )
        _check_architecture(name)
        return name, {}, {}
    config = _parse_config(text, origin)
    name = config["architecture"]
    if architecture not in (None, name):
        raise InvalidInputError(
            f"{origin} says architecture {name!r}, not {architecture!r}", field="architecture"
        )
    _check_architecture(name)
    model_args = {key: value for key, value in config["model_args"].items() if key != "num_classes"}
    if refused := _MODEL_ARGS_REFUSED.intersection(model_args):
        raise InvalidInputError(f"{origin}: model_args may not hold {min(refused)!r}", field=_FIELD)
    return name, model_args, config["pretrained_cfg"]


def _parse_config(text: str, origin: str) -> dict[str, Any]:
    try:
        config = json.loads(text)
        # Hub models from before 2023 keep the data configuration beside the architecture.
        parsed = {
            "architecture": config["architecture"],
            "model_args": config.get("model_args") or {},
            "pretrained_cfg": config.get("pretrained_cfg", config),
        }
        kinds = {"architecture": str, "model_args": dict, "pretrained_cfg": dict}
        for key, kind in kinds.items():
            if not isinstance(parsed[key], kind):
                raise TypeError(f"{key} is not a {kind.__name__}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidInputError(
            f"{origin} is not a timm model's config.json: {error!r}", field=_FIELD
        ) from error
    return {**parsed, "pretrained_cfg": _stated_data(parsed["pretrained_cfg"])}


def _stated_data(pretrained_cfg: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    return {key: pretrained_cfg[key] for key in keys if pretrained_cfg.get(key) is not None}


def _default_data(module: nn.Module) -> dict[str, Any]:
    """Return the data configuration of timm's weights for this architecture, but for the size."""
    data = _stated_data(resolve_data_config({}, model=module))
    return {key: value for key, value in data.items() if key != "input_size"}


def _data_config(pretrained_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return timm's full data configuration as plain numbers, text and tuples."""
    data = resolve_data_config({}, pretrained_cfg=_stated_data(pretrained_cfg) or {"_": None})
    try:
        size = tuple(int(side) for side in data["input_size"])
        mean, std = tuple(map(float, data["mean"])), tuple(map(float, data["std"]))
        crop = float(data["crop_pct"])
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"data configuration: {error}", field=_FIELD) from error
    if len(size) != 3 or min(size) < 1:
        raise InvalidInputError(f"input_size {size} is not (c, h, w)", field=_FIELD)
    return {**data, "input_size": size, "mean": mean, "std": std, "crop_pct": crop}


def _create_module(architecture: str, model_args: Mapping[str, Any]) -> nn.Module:
    _check_architecture(architecture)
    try:
        module: nn.Module = timm.create_model(
            architecture, pretrained=False, num_classes=0, **model_args
        )
    except (TypeError, ValueError, AssertionError, RuntimeError, KeyError) as error:
        raise InvalidInputError(
            f"timm cannot build {architecture} with {dict(model_args)}: {error}", field=_FIELD
        ) from error
    fold_biases(module)
    return module


def _classifier_prefixes(module: nn.Module) -> tuple[str, ...]:
    # timm's models say which of their layers are the classifier; in CLIP towers that is the
    # projection into the text space.
    named = getattr(module, "pretrained_cfg", {}).get("classifier") or ()
    names = (named,) if isinstance(named, str) else tuple(named)
    return tuple(f"{name}." for name in dict.fromkeys((*_CLASSIFIERS, *names)))


def _load(
    module: nn.Module,
    weights: Mapping[str, Tensor | NDArray[Any]],
    origin: str,
    error: type[InfloraError],
) -> None:
    """Copy ``weights`` into ``module``: each key once, of the right shape and kind, finite."""
    expected: dict[str, Tensor] = module.state_dict()
    for what, keys in (
        ("lacks", expected.keys() - weights.keys()),
        ("has unexpected", weights.keys() - expected.keys()),
    ):
        if keys:
            names = ", ".join(sorted(keys)[:5])
            more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
            raise error(f"{origin} {what} weights: {names}{more}", field=_FIELD)
    state: dict[str, Tensor] = {}
    for key, slot in expected.items():
        value = torch.as_tensor(weights[key])
        if value.shape != slot.shape or value.is_floating_point() != slot.is_floating_point():
            raise error(
                f"{origin}: {key} is {tuple(value.shape)} {value.dtype}, "
                f"not {tuple(slot.shape)} {slot.dtype}",
                field=_FIELD,
            )
        state[key] = value.to(slot.dtype)
        if value.is_floating_point() and not bool(torch.isfinite(state[key]).all()):
            raise DamagedError(f"{origin}: {key} is not finite", field=_FIELD)
    module.load_state_dict(state, strict=True)


def _finish(
    module: nn.Module, architecture: str, model_args: Mapping[str, Any], data: Mapping[str, Any]
) -> Backbone:
    module = module.float().eval().requires_grad_(False)
    layers = attention_layers(module)
    # timm may take the image size from a tag's configuration; written down, it cannot change.
    patches = module.get_submodule("patch_embed")
    built_size = [int(side) for side in getattr(patches, "img_size", None) or ()]
    model_args = {**model_args, "img_size": built_size} if built_size else dict(model_args)
    if built_size and (getattr(patches, "strict_img_size", True) or "input_size" not in data):
        data = {**data, "input_size": (data.get("input_size", (3,))[0], *built_size)}
    preprocessing = preprocessing_of(data)
    size = _probe(module, layers, preprocessing)
    # Through JSON, so that a stored configuration equals the one that was never stored.
    try:
        plain = json.loads(json.dumps([model_args, _stated_data(_data_config(data))]))
    except TypeError as error:
        raise InvalidInputError(f"model_args are not JSON: {error}", field=_FIELD) from error
    config = BackboneConfig(architecture, plain[0], plain[1], tuple(layers), size)
    return Backbone(module, config, preprocessing)


@torch.inference_mode()
def _probe(module: nn.Module, layers: Mapping[str, nn.Module], preprocessing: Preprocessing) -> int:
    """Run ``module`` once; return e. Each layer's ``qkv`` must have been called, once."""
    calls = dict.fromkeys(layers, 0)

    def count(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            calls[name] += 1

        return hook

    handles = [
        layer.get_submodule("qkv").register_forward_hook(count(name))
        for name, layer in layers.items()
    ]
    try:
        pixels = torch.zeros(1, 3, preprocessing.height, preprocessing.width)
        embedding = module(pixels)
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        raise InvalidInputError(
            f"the model does not accept its own input size {tuple(pixels.shape)}: {error}",
            field=_FIELD,
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    for name, times in calls.items():
        if times != 1:
            raise UnsupportedBackboneError(
                f"{name}.qkv is called {times} times as a module, not once", field=_FIELD
            )
    if not isinstance(embedding, Tensor) or embedding.ndim != 2:
        shape = tuple(embedding.shape) if isinstance(embedding, Tensor) else type(embedding)
        raise UnsupportedBackboneError(
            f"the model's features are {shape}, not one vector for each image (no pooling?)",
            field=_FIELD,
        )
    return int(embedding.shape[1])


def _refusal(attention: nn.Module | None) -> str | None:
    """Say why ``attention`` cannot be taught, or None if it can."""
    if attention is None:
        return "the block has no attention layer of its own (parallel or mixed blocks)"
    if not isinstance(attention, Attention | AttentionRope | EvaAttention):
        return f"attention of type {type(attention).__name__} is not supported"
    if getattr(attention, "num_kv_groups", 1) != 1:
        return "several queries share a key and a value (grouped-query attention)"
    qkv: nn.Module | None = getattr(attention, "qkv", None)
    if qkv is None:
        return "query, key and value are separate layers, not one fused qkv"
    if not isinstance(qkv, nn.Linear):
        return f"qkv is a {type(qkv).__name__}, not a linear layer"
    width = int(attention.num_heads) * int(attention.head_dim)
    if qkv.out_features != 3 * width:
        return f"qkv has {qkv.out_features} outputs, not 3 x {width}"
    if getattr(attention, "q_bias", None) is not None:
        return "qkv is not called as a module: its biases are kept apart (see fold_biases)"
    return None
