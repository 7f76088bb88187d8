"""A backbone that learns in milliseconds, and images that it can tell apart."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file

from inflora_core.backbone import Backbone, create_backbone
from inflora_core.model import ContinualModel, LabelledImages, Novelty
from inflora_core.spool import SpoolWriter
from inflora_core.store import initial_layer

SIDE = 16
WIDTH = 32
ARCHITECTURE = "vit_tiny_patch16_224"
MODEL_ARGS: dict[str, Any] = {
    "img_size": SIDE,
    "patch_size": 4,
    "embed_dim": WIDTH,
    "depth": 2,
    "num_heads": 2,
    "class_token": False,
    "global_pool": "avg",
}

COLOURS = ("red", "green", "blue", "yellow", "cyan", "magenta", "white", "black")
_RGB = {
    "red": (220, 30, 30),
    "green": (30, 200, 30),
    "blue": (30, 30, 220),
    "yellow": (220, 220, 30),
    "cyan": (30, 220, 220),
    "magenta": (220, 30, 220),
    "white": (235, 235, 235),
    "black": (20, 20, 20),
}


def write_backbone(folder: Path, *, depth: int = 2, side: int = SIDE) -> Path:
    """Write a tiny ViT with random weights as a backbone file, and return its path."""
    torch.manual_seed(0)
    args = {**MODEL_ARGS, "depth": depth, "img_size": side}
    module = timm.create_model(ARCHITECTURE, num_classes=0, **args)
    # As they are made, the weights are so small that attention hardly does anything.
    state = {
        key: (value + 0.1 * torch.randn_like(value)).contiguous()
        for key, value in module.state_dict().items()
    }
    data = {"input_size": [3, side, side], "mean": [0.5] * 3, "std": [0.25] * 3, "crop_pct": 1.0}
    config = {"architecture": ARCHITECTURE, "model_args": args, "pretrained_cfg": data}
    path = folder / "tiny.safetensors"
    save_file(state, path, metadata={"timm_config": json.dumps(config)})
    return path


def make_backbone(folder: Path) -> Backbone:
    """Return a tiny ViT with random weights."""
    return create_backbone(str(write_backbone(folder)))


def untaught(backbone: Backbone) -> ContinualModel:
    """Return the state before the first task, as the store makes it."""
    layers = {
        name: initial_layer(backbone.qkv(name).get_parameter("weight").numpy())
        for name in backbone.config.layers
    }
    return ContinualModel.untaught(layers, backbone.config.embedding_size)


def novelty(classes: int, embedding_size: int) -> Novelty:
    """Return what scores novelty by random directions, one for each class."""
    rng = np.random.default_rng(classes)

    def array(*shape: int) -> Any:
        return rng.normal(size=shape).astype(np.float32)

    e = embedding_size
    directions = array(classes, e)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return Novelty(directions, array(classes) / 10, np.eye(e, dtype=np.float32), array(e) / 10)


def pattern(label: str, number: int, side: int = SIDE, variety: float = 0.3) -> NDArray[np.uint8]:
    """Image ``number`` of a class, (side, side, 3): its colour in stripes, each in its own light.

    ``label`` is a colour, or a colour and anything after a space, which turns the stripes.
    ``variety`` is the share of the light. Images of a class that hardly differ would be told apart
    with absurd certainty, by logits of many thousands.
    """
    colour, _, rest = label.partition(" ")
    rng = np.random.default_rng([COLOURS.index(colour), *rest.encode(), number])
    rows, columns = np.indices((side, side))
    stripes = (rows + columns * (1 + len(rest) % 3) + number) // (2 + sum(rest.encode()) % 3) % 2
    light = (1 - variety) * np.array(_RGB[colour]) + variety * rng.uniform(0, 255, 3)
    image = light * (0.6 + 0.4 * stripes[..., None]) + rng.normal(0, 40, (side, side, 3))
    return image.clip(0, 255).astype(np.uint8)


def images(labels: Iterable[str], each: int, *, first: int = 0) -> LabelledImages:
    """Return ``each`` images of every class, class by class."""
    names = tuple(labels)
    pixels = [pattern(name, first + i) for name in names for i in range(each)]
    shape = (len(pixels), SIDE, SIDE, 3)
    classes = np.repeat(np.arange(len(names)), each).astype(np.int64)
    return LabelledImages(np.array(pixels, np.uint8).reshape(shape), classes, names)


def png(label: str, number: int, side: int = SIDE, variety: float = 0.3) -> bytes:
    """Return image ``number`` of a class as a file."""
    file = io.BytesIO()
    Image.fromarray(pattern(label, number, side, variety)).save(file, "PNG")
    return file.getvalue()


def write_spool(
    folder: Path, labels: Iterable[str], each: int, side: int = SIDE, variety: float = 0.3
) -> Path:
    """Write a spool of ``each`` images of every class, and return its folder."""
    with SpoolWriter(folder) as spool:
        for label in labels:
            for number in range(each):
                spool.add(png(label, number, side, variety), label)
        spool.finish()
    return folder
