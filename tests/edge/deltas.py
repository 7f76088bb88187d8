"""Deltas between models of a real shape: how large, how long, and whether all of them are right."""

from __future__ import annotations

import argparse
import hashlib
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from inflora_core import delta
from inflora_core.delta import OnnxFile
from inflora_core.export import export_template
from inflora_core.graph import materialise
from inflora_core.merge import merge
from inflora_core.model import ClassEntry, ContinualModel, Factors, Novelty
from inflora_edge.delta import apply
from tests.benchmarks import teaching
from tests.benchmarks.learning import BASE, TINY, random_backbone

RANK = 10
CLASSES = 10
"""Of each task."""
LINE = 20
"""Versions in a row."""


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Make deltas and apply them on one processor; see the module."""
    everywhere = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(everywhere)})
    try:
        with tempfile.TemporaryDirectory() as name:
            return of_a_task(Path(name)) | of_a_line(Path(name))
    finally:
        os.sched_setaffinity(0, everywhere)


@dataclass
class Line:
    """A model that grows by tasks, whose weights are random: they cost what learned ones do."""

    model: ContinualModel
    template: bytes
    generator: np.random.Generator

    @classmethod
    def of(cls, architecture: str) -> Line:
        """Return the model before its first task."""
        backbone = random_backbone(architecture, torch.device("cpu"))
        template = export_template(backbone)
        return cls(teaching.untaught(backbone), template, np.random.default_rng(0))

    def learn(self) -> Mapping[str, Factors]:
        """Learn one more task; return what it added."""
        model = self.model
        factors = {
            name: Factors(
                self._normal(len(layer.key_value), RANK), self._normal(RANK, len(layer.basis))
            )
            for name, layer in model.layers.items()
        }
        layers = {
            name: replace(layer, key_value=merge(layer.key_value, factors[name]))
            for name, layer in model.layers.items()
        }
        e, count = model.head_weight.shape[1], len(model.classes) + CLASSES
        classes = tuple(
            ClassEntry(f"class {i}", f"task {i // CLASSES}", f"key {i}") for i in range(count)
        )
        self.model = replace(
            model,
            layers=layers,
            classes=classes,
            # All rows change with each task: they are made from statistics that all classes share.
            head_weight=self._normal(count, e),
            head_bias=self._normal(count),
            novelty=Novelty(
                self._normal(count, e),
                self._normal(count),
                np.tril(self._normal(e, e)),  # as a Cholesky factor is
                self._normal(e),
            ),
        )
        return factors

    def file(self, version: int) -> OnnxFile:
        """Return the file as it would be published now."""
        return OnnxFile(version, materialise(self.template, self.model, version))

    def _normal(self, *shape: int) -> Any:
        return (self.generator.normal(size=shape) / 50).astype(np.float32)


def of_a_task(folder: Path) -> dict[str, Any]:
    """Return size and time of one task's delta, of a ViT-B."""
    line = Line.of(BASE)
    line.learn()
    before = line.file(1)
    factors = line.learn()
    after = line.file(2)
    made = delta.make(before, after, [factors])
    base, target = folder / "base.onnx", folder / "target.onnx"
    base.write_bytes(before.content)
    seconds = []
    for _ in range(3):
        begun = time.perf_counter()
        apply(base, made, target)
        seconds.append(time.perf_counter() - begun)
    equal = hashlib.sha256(target.read_bytes()).hexdigest() == after.end.sha256
    return {
        "delta_share": len(made) / len(after.content),
        "delta_bytes": len(made),
        "file_bytes": len(after.content),
        "apply_seconds": min(seconds),
        "delta_of_a_task_equal": equal,
    }


def of_a_line(folder: Path) -> dict[str, Any]:
    """Apply many deltas in a row, and one over all of them; of a DeiT-tiny."""
    line = Line.of(TINY)
    line.learn()
    first = before = line.file(1)
    step, leap = folder / "step.onnx", folder / "leap.onnx"
    for path in (step, leap):
        path.write_bytes(first.content)
    factors, mismatches, sizes = [], 0, []
    for number in range(2, LINE + 2):
        factors.append(line.learn())
        after = line.file(number)
        made = delta.make(before, after, factors[-1:])
        apply(step, made, step)
        mismatches += step.read_bytes() != after.content
        sizes.append(len(made) / len(after.content))
        before = after
    made = delta.make(first, before, factors)
    apply(leap, made, leap)
    mismatches += leap.read_bytes() != before.content
    return {
        "deltas": LINE + 1,
        "delta_mismatches": mismatches,
        "tiny_delta_share": max(sizes),
        "tiny_delta_share_over_all": len(made) / len(before.content),
    }
