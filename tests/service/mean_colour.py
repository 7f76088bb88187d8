"""The smallest model that really answers: its embedding is an image's mean colour."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from inflora_core.config import Limits
from inflora_core.graph import compose, materialise
from inflora_core.images import decode
from inflora_core.model import (
    BackboneConfig,
    ClassEntry,
    HeldOut,
    LayerReport,
    Learned,
    ParityReport,
    Preprocessing,
    Stage,
    TaskReport,
)
from inflora_core.spool import read_spool
from inflora_core.store import Store

SIDE = 8
SHARPNESS = 100.0


def make_backbone(store: Store) -> None:
    """Give ``store`` a backbone without attention layers, unless it has one."""
    if store.has_backbone():
        return
    pixels = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ("batch", 3, SIDE, SIDE))
    embedding = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ("batch", 3))
    nodes = [
        helper.make_node("GlobalAveragePool", ["pixels"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["embedding"]),
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "mean-colour", [pixels], [embedding]),
        opset_imports=[helper.make_opsetid("", 20)],
    )
    preprocessing = Preprocessing(
        SIDE, SIDE, SIDE, SIDE, "bilinear", "squash", (0.0,) * 3, (1.0,) * 3
    )
    template = compose(model, [], 3, preprocessing).SerializeToString()
    config = BackboneConfig("mean-colour", {}, {}, (), 3)
    store.set_backbone(config, {"unused": np.zeros(1, np.float32)}, template)


def publish_task(store: Store, command: dict[str, Any]) -> int:
    """Publish what a learning worker was told to learn; return the version."""
    colours: dict[str, list[np.ndarray[Any, Any]]] = {}
    for image, label in read_spool(Path(command["spool"])):
        colours.setdefault(label, []).append(decode(image, Limits()).mean(axis=(0, 1)) / 255)
    means = {label: np.mean(rows, axis=0) for label, rows in colours.items()}
    return publish_colours(store, command["task"], means, command["parent"], command["settings"])


def publish_colours(
    store: Store,
    task: str,
    colours: dict[str, Any],
    parent: int | None = None,
    settings: dict[str, Any] | None = None,
) -> int:
    """Publish the version after ``parent`` that knows ``colours`` (0 to 1) by name, too."""
    before = store.load_model(parent)
    means = np.array(list(colours.values()), np.float32)
    after = replace(
        before,
        head_weight=np.concatenate([before.head_weight, 2 * SHARPNESS * means]).astype(np.float32),
        head_bias=np.concatenate([before.head_bias, -SHARPNESS * (means**2).sum(axis=1)]).astype(
            np.float32
        ),
        novelty=replace(
            before.novelty,
            weight=np.concatenate([before.novelty.weight, means]).astype(np.float32),
            bias=np.zeros(len(before.classes) + len(means), np.float32),
        ),
        classes=(*before.classes, *(ClassEntry(label, task) for label in colours)),
        tasks=before.tasks + 1,
    )
    report = TaskReport(
        layers=(LayerReport("blocks.0.attn", 4, 2, 4, 3, 1e-7, 0.25),),
        threshold=0.95,
        training_accuracy=1.0,
        held_out_accuracy_task_known=None,
        held_out_accuracy=None,
        held_out_counts={},
        held_out_method=HeldOut.NONE,
        temperature=1.0,
        tasks_left=None,
        class_bytes=100,
        shared_bytes=1000,
        epoch_losses=(0.75, 0.5),
        stage_seconds={Stage.DECODING: 0.25, Stage.TRAINING: 1.5},
        settings=settings or {},
        device="cpu",
        warnings=("the learner is a stand-in",),
        parity=ParityReport(1, 1e-7, 0.5, 1.0),
    )
    template = store.backbone().template_path.read_bytes()
    onnx = materialise(template, after, store.next_number())
    return store.publish(Learned(after, {}, report), task, onnx).number
