"""Streams as users have them: one class at a time, and known classes that look different.

    python -m tests.benchmarks.unusual

The 50 classes of the stream (40 training images each) and the ten digits (40 each), on the bundled
backbone at 32 px:

* *one by one*: 60 tasks of one class, beside the same classes in 6 tasks of ten;
* *shifted*: 40 classes of 20 images each in four tasks of ten; then ten of them again, in 20 new
  images with inverted colours (255 - x), alone and beside five new classes.

Prints one JSON object as its last line.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from inflora_core import bundled
from inflora_core.backbone import Backbone, create_backbone
from inflora_core.compute import Compute
from inflora_core.config import preset
from inflora_core.model import ContinualModel, LabelledImages
from tests.benchmarks import layouts, runs, teaching
from tests.benchmarks.accuracy import STREAM
from tests.benchmarks.checkout import ROOT
from tests.benchmarks.runs import Array

EACH = 40
"""Training images of a class."""

AGAIN = (0, 3, 7, 12, 15, 18, 22, 27, 31, 36)
"""Classes that come again in other colours: two or three of each task."""

FRESH = (40, 41, 42, 43, 44)
"""Classes that come with them for the first time."""


@dataclass(frozen=True)
class Class:
    """One class's images at model size, (n, S, S', 3) uint8."""

    name: str
    train: Array
    test: Array


@dataclass
class Stream:
    """A model that is taught task by task."""

    backbone: Backbone
    blank: ContinualModel
    settings: dict[str, Any]

    def teach(
        self, model: ContinualModel, classes: Sequence[Class], images: Sequence[Array]
    ) -> tuple[ContinualModel, dict[str, Any]]:
        """Learn ``images`` of ``classes`` as one task."""
        labels = np.repeat(np.arange(len(classes)), [len(part) for part in images])
        names = tuple(part.name for part in classes)
        data = LabelledImages(np.concatenate(images), labels.astype(np.int64), names)
        config = preset("default").updated(**self.settings)
        return teaching.teach(model, self.backbone, data, f"task-{model.tasks}", config, Compute())

    def accuracy(
        self,
        model: ContinualModel,
        classes: Sequence[Class],
        change: Callable[[Array], Array] = lambda images: images,
    ) -> float:
        """Return the share of test images of ``classes`` that are named right among all classes."""
        known = teaching.classes_of(model)
        truth = np.repeat(
            [known.index(part.name) for part in classes], [len(part.test) for part in classes]
        )
        images = np.concatenate([change(part.test) for part in classes])
        features = teaching.features_of(self.backbone, model, images, runs.BATCH)
        return float((teaching.logits(model, features).argmax(1) == truth).mean())


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run both; see ``--help``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", default=str(STREAM), help="an npz file or a folder, with digits")
    parser.add_argument("--only", choices=("one-by-one", "shifted"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    settings = {key: json.loads(value) for key, value in (part.split("=") for part in options.set)}
    backbone = create_backbone(str(bundled.PATH))
    stream = Stream(backbone, teaching.untaught(backbone), settings)
    classes = [part for source in (options.data, "digits") for part in load(source, backbone)]
    figures: dict[str, Any] = {}
    if options.only != "shifted":
        figures |= one_by_one(stream, classes, 10) | one_by_one(stream, classes, 1)
    if options.only != "one-by-one":
        figures |= shifted(stream, classes)
    print(json.dumps(figures), flush=True)
    return figures


def load(source: str, backbone: Backbone) -> list[Class]:
    """Return the classes of ``source`` at model size."""
    splits = layouts.splits_of("plain", source, 0)
    images = runs.prepare(splits, backbone, ROOT / "build" / "accuracy", print)
    return [
        Class(
            name,
            np.array(images.train[images.train_labels == i][:EACH]),
            np.array(images.test[images.test_labels == i]),
        )
        for i, name in enumerate(images.names)
    ]


def one_by_one(stream: Stream, classes: Sequence[Class], size: int) -> dict[str, Any]:
    """Learn all classes in tasks of ``size``."""
    model, reports, start = stream.blank, [], time.monotonic()
    for first in range(0, len(classes), size):
        part = classes[first : first + size]
        before = model
        model, report = stream.teach(model, part, [entry.train for entry in part])
        update = [
            float(np.linalg.norm(model.layers[name].key_value - layer.key_value))
            for name, layer in before.layers.items()
            if layer.protected < len(layer.basis)
        ]
        reports.append(report | {"smallest_update": min(update, default=None)})
        print(f"{len(model.classes)} classes, {report['seconds']:.0f} s", flush=True)
    return {
        f"tasks_of_{size}": {
            "final_accuracy": stream.accuracy(model, classes),
            "leak": max(report["leak"] for report in reports),
            "smallest_update": min(report["smallest_update"] for report in reports),
            "capacity": reports[-1]["capacity"],
            "class_bytes": reports[-1]["class_bytes"],
            "shared_bytes": reports[-1]["shared_bytes"],
            "seconds": time.monotonic() - start,
        }
    }


def shifted(stream: Stream, classes: Sequence[Class]) -> dict[str, Any]:
    """Teach known classes in inverted colours."""
    model, half = stream.blank, EACH // 2
    for first in range(0, 40, 10):
        part = classes[first : first + 10]
        model, _ = stream.teach(model, part, [entry.train[:half] for entry in part])
    again = [classes[i] for i in AGAIN]
    others = [classes[i] for i in range(40) if i not in AGAIN]
    fresh = [classes[i] for i in FRESH]
    inverted = [invert(entry.train[half:]) for entry in again]
    alone, _ = stream.teach(model, again, inverted)
    mixed, _ = stream.teach(model, [*again, *fresh], inverted + [entry.train for entry in fresh])
    return {
        name: {
            "shifted": stream.accuracy(state, again, invert),
            "as_before": stream.accuracy(state, again),
            "others": stream.accuracy(state, others),
        }
        for name, state in (("before", model), ("known_alone", alone), ("known_and_new", mixed))
    }


def invert(images: Array) -> Array:
    """Return images (n, S, S', 3) uint8 in inverted colours: the shift of this benchmark."""
    return 255 - images


if __name__ == "__main__":
    main()
