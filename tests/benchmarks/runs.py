"""Streams learned in this process, task by task: cached, and resumed where they were killed.

A run is a folder. After each task it holds ``task-NN.npz`` (features and answers of all test
images of all classes, features of the task's training images before and after it was learned),
``model-NN.npz`` (only of the last task) and ``task-NN.json``, which is written last: a task without
it never happened. Every file is written beside its place and renamed.

Labels are positions of classes in the order of the stream.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inflora_core import durable
from inflora_core.backbone import Backbone, state_of
from inflora_core.compute import Compute
from inflora_core.config import LearnConfig, Limits
from inflora_core.images import decode
from inflora_core.model import ContinualModel, LabelledImages
from tests.benchmarks import layouts, teaching
from tests.benchmarks.head_study import RidgeHead, Statistics, TaskFeatures, nearest_mean

Array = NDArray[Any]
Say = Callable[[str], None]

BATCH = 64
"""Images of one forward pass where nothing is trained."""

ROWS = {
    "frozen-ncm": "frozen, nearest class mean",
    "frozen-ridge": "frozen, ridge on random features (RanPAC)",
    "sequential": "sequential LoRA, nothing protected",
    "plain": "plain InfLoRA (published)",
    "frozen-head": "our default's head, frozen backbone",
    "default": "our default",
    "joint": "joint training, our default",
}
"""In the order of the table."""

TRAINED = ("sequential", "plain", "frozen-head", "default", "joint")


@dataclass(frozen=True)
class ImageSet:
    """All images at model size: ``train`` and ``test`` (n, S, S', 3) uint8, labels in ``names``."""

    names: tuple[str, ...]
    train: Array
    train_labels: Array
    test: Array
    test_labels: Array
    digest: str


@dataclass(frozen=True)
class Plan:
    """What a run is: with equal plans, the answers are the same.

    Attributes:
        row: A key of ``ROWS``.
        order: Of the classes: 0 is the order of names, another the seed of a permutation.
        tasks: Number of tasks.
        settings: ``LearnConfig`` as a dictionary; empty where nothing is trained.
        data: Digest of the images at model size.
        backbone: Digest of weights and preprocessing.
        code: Digest of the method.
        half: Whether training multiplies in bfloat16.
    """

    row: str
    order: int
    tasks: int
    settings: dict[str, Any]
    data: str
    backbone: str
    code: str
    half: bool = False

    @property
    def name(self) -> str:
        """The run's folder."""
        text = json.dumps(asdict(self), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        return f"{self.row}-order{self.order}-tasks{self.tasks}-{digest[:12]}"


class BusyError(Exception):
    """Another process works on this run."""


def class_order(count: int, order: int) -> Array:
    """Return a permutation of ``count`` classes: their own order for 0."""
    return np.arange(count) if order == 0 else np.random.default_rng(order).permutation(count)


def task_sizes(count: int, tasks: int) -> list[int]:
    """Return how many of ``count`` classes each task has, as equal as can be."""
    return [len(part) for part in np.array_split(np.arange(count), tasks)]


def prepare(splits: layouts.Splits, backbone: Backbone, out: Path, say: Say) -> ImageSet:
    """Decode all images to model size, once: later calls map the files that the first one wrote."""
    size = backbone.preprocessing
    shape = repr(
        (size.height, size.width, size.resize_height, size.resize_width, size.interpolation,
         size.crop_mode)
    )  # fmt: skip
    digest = hashlib.sha256(f"{layouts.digest(splits)}{shape}".encode()).hexdigest()
    folder = out / f"images-{digest[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    arrays = []
    for side, split in enumerate(("train", "test")):
        images = [image for sides in splits.values() for image in sides[side]]
        labels = np.repeat(np.arange(len(splits)), [len(sides[side]) for sides in splits.values()])
        path = folder / f"{split}.npy"
        if not path.exists():
            say(f"decoding {len(images)} images for {split}")
            _decode(images, backbone, path)
        arrays += [np.load(path, mmap_mode="r"), labels]
    return ImageSet(tuple(splits), *arrays, digest=digest)


def _decode(images: list[layouts.Named], backbone: Backbone, path: Path) -> None:
    size = backbone.preprocessing
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    shape = (len(images), size.height, size.width, 3)
    pixels = np.lib.format.open_memmap(draft, "w+", np.uint8, shape)

    def bring_to_size(index: int) -> None:
        content = layouts.read(images[index])
        image = decode(content, Limits()) if isinstance(content, bytes) else content
        pixels[index] = backbone.resize(image)

    try:
        if images:
            bring_to_size(0)  # sets up the transform before threads share it
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(pool.map(bring_to_size, range(1, len(images))))
        pixels.flush()
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def backbone_digest(backbone: Backbone) -> str:
    """Return a hash of weights, architecture and normalisation."""
    content = hashlib.sha256(repr((backbone.config, backbone.preprocessing)).encode())
    for name, value in sorted(state_of(backbone).items()):
        content.update(name.encode())
        content.update(value)
    return content.hexdigest()


@dataclass(frozen=True)
class Bench:
    """What all runs share.

    Attributes:
        backbone: On the device to learn on.
        blank: The state before the first task.
        images: All images.
        frozen: Features of ``images`` under the backbone as it came, by "train" and "test"; and
            the "seconds" that they took.
        out: Where the folders of runs are made.
        say: Told what is done.
    """

    backbone: Backbone
    blank: ContinualModel
    images: ImageSet
    frozen: dict[str, Array]
    out: Path
    say: Say

    @classmethod
    def open(cls, backbone: Backbone, images: ImageSet, digest: str, out: Path, say: Say) -> Bench:
        """Compute the features of the frozen backbone, unless they are there."""
        blank = teaching.untaught(backbone)
        path = out / f"frozen-{images.digest[:12]}-{digest[:12]}.npz"
        if not path.exists():
            say("features of the frozen backbone")
            start = time.monotonic()
            train = teaching.features_of(backbone, blank, images.train, BATCH)
            seconds = time.monotonic() - start
            test = teaching.features_of(backbone, blank, images.test, BATCH)
            write_arrays(path, train=train, test=test, seconds=np.array(seconds))
        return cls(backbone, blank, images, read_arrays(path), out, say)


def execute(plan: Plan, bench: Bench) -> Path:
    """Do what is left to do of a run; return its folder.

    Raises:
        BusyError: another process is at it.
    """
    folder = bench.out / "runs" / plan.name
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        sizes = task_sizes(len(bench.images.names), plan.tasks)
        if finished_tasks(folder) == len(sizes):
            return folder
        durable.replace(folder / "plan.json", json.dumps(asdict(plan), indent=1).encode())
        if plan.row in TRAINED:
            _train(plan, bench, folder, sizes)
        else:
            _from_frozen_features(plan, bench, folder, sizes)
    return folder


def finished_tasks(folder: Path) -> int:
    """Return how many tasks of a run are done."""
    count = 0
    while (folder / f"task-{count + 1:02}.json").exists():
        count += 1
    return count


def _train(plan: Plan, bench: Bench, folder: Path, sizes: list[int]) -> None:
    images, order = bench.images, class_order(len(bench.images.names), plan.order)
    position = np.argsort(order)
    config = LearnConfig.model_validate(plan.settings)
    compute = Compute(next(bench.backbone.module.parameters()).device, plan.half)
    done = finished_tasks(folder)
    model = bench.blank
    if done:
        model = teaching.load((folder / f"model-{done:02}.npz").read_bytes())
    train_labels, test_labels = position[images.train_labels], position[images.test_labels]
    for number in range(done, len(sizes)):
        start, end = sum(sizes[:number]), sum(sizes[: number + 1])
        mine = np.flatnonzero((train_labels >= start) & (train_labels < end))
        # Class after class: the order in which the images of a task arrive must not depend on how
        # the classes of the data set are sorted.
        mine = mine[np.argsort(train_labels[mine], kind="stable")]
        data = LabelledImages(
            np.array(images.train[mine]),
            train_labels[mine] - start,
            tuple(images.names[i] for i in order[start:end]),
        )
        frozen = plan.row == "frozen-head"
        if frozen:
            model = teaching.without_room(model)
        elif plan.row == "sequential":
            model = teaching.without_protection(model)
        arrays: dict[str, Array] = {"train_labels": train_labels[mine], "test_labels": test_labels}
        arrays["train_before"] = (
            bench.frozen["train"][mine]
            if frozen or number == 0
            else teaching.features_of(bench.backbone, model, data.images, BATCH)
        )
        model, report = teaching.teach(
            model, bench.backbone, data, f"task-{number + 1}", config, compute
        )
        expected = [images.names[i] for i in order[:end]]
        if teaching.classes_of(model) != expected:
            raise RuntimeError(f"the model's classes are {teaching.classes_of(model)}")
        if frozen:
            arrays["train_after"], arrays["test"] = (
                bench.frozen["train"][mine],
                bench.frozen["test"],
            )
        else:
            for name, pixels in (("train_after", data.images), ("test", images.test)):
                arrays[name] = teaching.features_of(bench.backbone, model, pixels, BATCH)
        arrays["logits"] = teaching.logits(model, arrays["test"])
        arrays["novelty"] = teaching.novelty(model, arrays["test"])
        if end == len(images.names):
            arrays["fresh"] = (
                bench.frozen["train"]
                if frozen
                else teaching.features_of(bench.backbone, model, images.train, BATCH)
            )
            arrays["fresh_labels"] = train_labels
        write_arrays(folder / f"task-{number + 1:02}.npz", **arrays)
        durable.replace(folder / f"model-{number + 1:02}.npz", teaching.dump(model))
        report["state"] = teaching.state_bytes(model)
        report["classes"] = list(data.names)
        write_report(folder, number + 1, report)
        (folder / f"model-{number:02}.npz").unlink(missing_ok=True)
        share = (arrays["logits"].argmax(1) == test_labels)[test_labels < end].mean()
        bench.say(
            f"{plan.row}, order {plan.order}: task {number + 1} of {len(sizes)}, "
            f"{report['seconds']:.0f} s, {100 * share:.1f}% of all seen so far"
        )


def _from_frozen_features(plan: Plan, bench: Bench, folder: Path, sizes: list[int]) -> None:
    """The two rows that train nothing: every stage's answers from statistics that add up."""
    images, order = bench.images, class_order(len(bench.images.names), plan.order)
    position = np.argsort(order)
    train_labels, test_labels = position[images.train_labels], position[images.test_labels]
    train, test = bench.frozen["train"], bench.frozen["test"]
    size, classes = train.shape[1], len(order)
    statistics, ridge = Statistics.empty(classes, size), RidgeHead.empty(size, classes)
    for number in range(len(sizes)):
        begun = time.monotonic()
        start, end = sum(sizes[:number]), sum(sizes[: number + 1])
        mine = (train_labels >= start) & (train_labels < end)
        if plan.row == "frozen-ncm":
            statistics = statistics.plus(train[mine], train_labels[mine])
            scores = nearest_mean(statistics.first(end), test)
            state = {"per_class": 4 * size + 8, "shared": 0, "memory": 0}
        else:
            ridge = ridge.learn(train[mine], train_labels[mine], seed=number)
            scores = ridge.scores(test, end)
            count = len(ridge.kept.gram)
            state = {"per_class": 4 * count, "shared": 4 * count * count, "memory": 0}
        seconds = time.monotonic() - begun + float(bench.frozen["seconds"]) * mine.mean()
        write_arrays(
            folder / f"task-{number + 1:02}.npz",
            logits=scores.astype(np.float32),
            test_labels=test_labels,
        )
        names = [images.names[i] for i in order[start:end]]
        write_report(folder, number + 1, {"seconds": seconds, "state": state, "classes": names})
    bench.say(f"{plan.row}, order {plan.order}, {plan.tasks} tasks: done")


def write_report(folder: Path, task: int, report: dict[str, Any]) -> None:
    """Say that a task is done."""
    durable.replace(folder / f"task-{task:02}.json", json.dumps(report, indent=1).encode())


def write_arrays(path: Path, **arrays: Array) -> None:
    """Write an npz file, whole or not at all."""
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **arrays)
    durable.replace(path, file.getvalue())


def read_arrays(path: Path) -> dict[str, Array]:
    """Return what ``write_arrays`` wrote."""
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run; the lock ends with the process, also with one that is killed."""
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BusyError(folder.name) from error
        yield


@dataclass(frozen=True)
class Recorded:
    """A finished run, read from its folder."""

    plan: Plan
    reports: list[dict[str, Any]]
    stages: list[dict[str, Array]]

    @property
    def sizes(self) -> list[int]:
        """Classes of each task."""
        return [len(report["classes"]) for report in self.reports]

    @property
    def truth(self) -> Array:
        """Classes (n,) of the test images."""
        return self.stages[-1]["test_labels"]

    def tasks(self, count: int | None = None) -> list[TaskFeatures]:
        """Return the training features of the first ``count`` tasks."""
        return [
            TaskFeatures(stage["train_before"], stage["train_after"], stage["train_labels"])
            for stage in self.stages[:count]
        ]

    def fresh(self) -> list[Array]:
        """Return features with the last backbone, of the same images as ``tasks``."""
        last = self.stages[-1]
        order = np.argsort(last["fresh_labels"], kind="stable")
        ends = np.cumsum([len(stage["train_labels"]) for stage in self.stages])[:-1]
        return np.split(last["fresh"][order], ends)


def read(folder: Path) -> Recorded:
    """Return a finished run."""
    plan = Plan(**json.loads((folder / "plan.json").read_text()))
    numbers = range(1, plan.tasks + 1)
    return Recorded(
        plan,
        [json.loads((folder / f"task-{i:02}.json").read_text()) for i in numbers],
        [read_arrays(folder / f"task-{i:02}.npz") for i in numbers],
    )
