"""What the accuracy benchmark needs of the learner: the one place that knows its interface.

When ``learn_task``, the head or the model's fields change, this file follows, and nothing else
under ``tests/benchmarks``.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import inflora_core
from inflora_core import gate
from inflora_core import model as plain_data
from inflora_core.backbone import Backbone
from inflora_core.compute import Compute
from inflora_core.config import Gate, LearnConfig
from inflora_core.heads import novelty_shares
from inflora_core.learner import class_bytes, learn_task, load_weights
from inflora_core.model import ContinualModel, LabelledImages
from inflora_core.progress import Tracker
from inflora_core.store import initial_layer

Floats = NDArray[Any]

METHOD = (
    "adapters",
    "compute",
    "config",
    "group",
    "heads",
    "learner",
    "memory",
    "merge",
    "model",
    "moments",
    "recording",
    "sparing",
    "subspace",
    "training",
)
"""Modules of ``inflora_core`` that decide what is learned."""


def method_digest() -> str:
    """Return a hash of the method's code; comments, docstrings and layout do not count."""
    content = hashlib.sha256()
    for name in METHOD:
        path = Path(inflora_core.__file__).with_name(f"{name}.py")
        content.update(code_digest(path).encode())
    return content.hexdigest()


def code_digest(path: Path) -> str:
    """Return a hash of what a Python file does."""
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            # Texts that stand alone: docstrings of modules, classes, functions and attributes.
            node.body = [line for line in node.body if not _is_text(line)] or [ast.Pass()]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()


def _is_text(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def untaught(backbone: Backbone) -> ContinualModel:
    """Return the state before the first task; the backbone must be as it was loaded."""
    layers = {
        name: initial_layer(backbone.qkv(name).get_parameter("weight").cpu().numpy())
        for name in backbone.config.layers
    }
    return ContinualModel.untaught(layers, backbone.config.embedding_size)


def without_room(model: ContinualModel) -> ContinualModel:
    """Return ``model`` with all directions protected: its backbone stays frozen."""
    return _with_protected(model, None)


def without_protection(model: ContinualModel) -> ContinualModel:
    """Return ``model`` with no direction protected: what it learns next may overwrite anything."""
    return _with_protected(model, 0)


def _with_protected(model: ContinualModel, count: int | None) -> ContinualModel:
    layers = {
        name: dataclasses.replace(
            layer, protected=len(layer.basis) if count is None else count
        )
        for name, layer in model.layers.items()
    }  # fmt: skip
    return dataclasses.replace(model, layers=layers)


def teach(
    model: ContinualModel,
    backbone: Backbone,
    data: LabelledImages,
    task: str,
    config: LearnConfig,
    compute: Compute,
) -> tuple[ContinualModel, dict[str, Any]]:
    """Learn one task; return the new state and what the figures need of the report."""
    tracker = Tracker()
    start = time.monotonic()
    learned = learn_task(model, backbone, data, task, config, tracker, compute=compute)
    tracker.finish()
    report = learned.report
    return learned.model, {
        "seconds": time.monotonic() - start,
        "stage_seconds": {str(stage): value for stage, value in report.stage_seconds.items()},
        "leak": report.leak,
        "interference": report.interference,
        "capacity": report.capacity,
        "protected": [layer.dimension - layer.free_after for layer in report.layers],
        "ranks": [layer.rank for layer in report.layers],
        "training_accuracy": report.training_accuracy,
        "held_out_accuracy": report.held_out_accuracy,
        "held_out_method": str(report.held_out_method),
        "temperature": report.temperature,
        "class_bytes": report.class_bytes,
        "shared_bytes": report.shared_bytes,
        "epoch_losses": list(report.epoch_losses),
        "warnings": list(report.warnings),
        "settings": report.settings,
        "device": report.device,
    }


def judge(
    model: ContinualModel, backbone: Backbone, data: LabelledImages, task: str, config: LearnConfig
) -> dict[str, Any]:
    """Learn one task; return what the publish gate says of it with its default limits."""
    learned = learn_task(model, backbone, data, task, config, Tracker())
    checks = gate.checks(learned, Gate())
    return {
        "values": {check.name: check.value for check in checks},
        "failed": [check.name for check in checks if not check.passed],
        "alike": [
            (learned.model.classes[found.position].label, found.told)
            for found in learned.evidence.likenesses
        ],
        "warnings": list(gate.warnings(learned, Gate())),
        "interference": learned.report.interference,
        "leak": learned.report.leak,
    }


def classes_of(model: ContinualModel) -> list[str]:
    """Return the classes that the model knows, in the order of its logits."""
    return [entry.label for entry in model.classes]


@torch.inference_mode()
def features_of(backbone: Backbone, model: ContinualModel, images: Floats, batch: int) -> Floats:
    """Return final features (n, e) float32 of ``images`` (n, S, S', 3) uint8."""
    load_weights(backbone, model)
    device = next(backbone.module.parameters()).device
    rows = [np.empty((0, backbone.config.embedding_size), np.float32)]
    for start in range(0, len(images), batch):
        pixels = torch.from_numpy(np.array(images[start : start + batch])).to(device)
        rows.append(backbone.module(backbone.normalise(pixels)).float().cpu().numpy())
    return np.concatenate(rows)


def logits(model: ContinualModel, features: Floats) -> Floats:
    """Return the model's logits (n, classes) float32; its probabilities are their softmax."""
    return model.logits(features)


def novelty(model: ContinualModel, features: Floats) -> Floats:
    """Return the novelty (n,) of each image, as the exported file answers it: 0 to 1."""
    return novelty_shares(model, features)


def state_bytes(model: ContinualModel) -> dict[str, int]:
    """Return the bytes of the state: what every class adds, what all share, and the memory."""
    shared = (
        model.class_scatter,
        model.novelty.whitening,
        model.novelty.offset,
        model.calibration.losses,
        model.calibration.scores,
    )
    memory = sum(
        value.nbytes
        for layer in model.layers.values()
        for value in (layer.basis, layer.moment)
    )  # fmt: skip
    return {
        "per_class": class_bytes(model),
        "shared": sum(array.nbytes for array in shared),
        "memory": memory,
    }


def dump(model: ContinualModel) -> bytes:
    """Return the model as an npz file: arrays as they are, all else as JSON."""
    arrays: dict[str, Floats] = {}

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            fields = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
            return {"class": type(value).__name__, "fields": fields}
        if isinstance(value, np.ndarray):
            arrays[f"array{len(arrays)}"] = value
            return {"array": f"array{len(arrays) - 1}"}
        if isinstance(value, tuple):
            return {"tuple": [plain(part) for part in value]}
        if isinstance(value, dict):
            return {"dict": [[plain(key), plain(part)] for key, part in value.items()]}
        return value.item() if isinstance(value, np.generic) else value

    tree = np.frombuffer(json.dumps(plain(model)).encode(), np.uint8)
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, tree=tree, **arrays)
    return file.getvalue()


def load(content: bytes) -> ContinualModel:
    """Return the model that ``dump`` wrote."""
    with np.load(io.BytesIO(content)) as file:
        arrays = {name: file[name] for name in file.files}

    def whole(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if "array" in value:
            return arrays[value["array"]]
        if "tuple" in value:
            return tuple(whole(part) for part in value["tuple"])
        if "dict" in value:
            return {whole(key): whole(part) for key, part in value["dict"]}
        kind = getattr(plain_data, value["class"])
        return kind(**{name: whole(part) for name, part in value["fields"].items()})

    model = whole(json.loads(arrays.pop("tree").tobytes()))
    assert isinstance(model, ContinualModel)
    return model
