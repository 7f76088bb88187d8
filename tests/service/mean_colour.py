"""The smallest model that really answers: its embedding is an image's mean colour."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper
from pydantic import TypeAdapter

from inflora_core import edits, gate
from inflora_core.config import Gate, Limits
from inflora_core.graph import compose, materialise
from inflora_core.images import decode
from inflora_core.model import (
    BackboneConfig,
    Edit,
    HeldOut,
    LayerReport,
    Learned,
    ParityReport,
    Preprocessing,
    Stage,
    TaskReport,
    new_classes,
    position_of,
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
    """Publish what a learning worker was told to do; return the version."""
    if command["command"] == "edit":
        edit: Edit = TypeAdapter(Edit).validate_python(command["edit"])
        before = store.load_model(command["parent"])
        edited = edits.apply(before, edit, store.tables_for(edit))
        template = store.backbone().template_path.read_bytes()
        onnx = materialise(template, edited.model, store.next_number())
        return store.publish_edit(edited, command["task"], onnx).number
    colours: dict[str, list[np.ndarray[Any, Any]]] = {}
    for image, label in read_spool(Path(command["spool"])):
        colours.setdefault(label, []).append(decode(image, Limits()).mean(axis=(0, 1)) / 255)
    means = {label: np.mean(rows, axis=0) for label, rows in colours.items()}
    limits = Gate.model_validate(command["gate"])
    task, parent, settings = (command[key] for key in ("task", "parent", "settings"))
    return publish_colours(store, task, means, parent, settings, limits)


def publish_colours(
    store: Store,
    task: str,
    colours: dict[str, Any],
    parent: int | None = None,
    settings: dict[str, Any] | None = None,
    limits: Gate | None = None,
) -> int:
    """Publish the version after ``parent`` that knows ``colours`` (0 to 1) by name, too.

    Of a class that is known already, the new colour replaces the old one. Black disturbs all that
    is known, with an interference of 1: the publish gate holds it back.
    """
    before = store.load_model(parent)
    new = [label for label in colours if position_of(before.classes, label) is None]
    classes = before.classes + new_classes(new, task)
    means = np.concatenate([before.class_means, np.zeros((len(new), 3))]).astype(np.float32)
    for label, colour in colours.items():
        at = position_of(classes, label)
        assert at is not None
        means[at] = colour
    after = replace(
        before,
        head_weight=2 * np.float32(SHARPNESS) * means,
        head_bias=-np.float32(SHARPNESS) * (means**2).sum(axis=1),
        novelty=replace(before.novelty, weight=means, bias=np.zeros(len(classes), np.float32)),
        class_means=means,
        class_counts=np.ones(len(classes), np.int64),
        classes=classes,
        tasks=before.tasks + 1,
    )
    interference = 0.25 if all(np.any(colour) for colour in colours.values()) else 1.0
    report = TaskReport(
        layers=(LayerReport("blocks.0.attn", 4, 2, 4, 3, 1e-7, interference),),
        threshold=0.95,
        training_accuracy=1.0,
        held_out_accuracy_task_known=None,
        held_out_accuracy=None,
        held_out_counts=dict.fromkeys(colours, 1),
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
    learned = Learned(after, {}, report)
    if limits is not None:
        report = replace(report, checks=gate.checks(learned, limits))
    return store.publish(replace(learned, report=report), task, onnx).number
