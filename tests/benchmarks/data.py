"""Labelled images as a stream of tasks: the handwritten digits, a folder, or an npz file."""

from __future__ import annotations

import io
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

Example = tuple[bytes, str]
Splits = dict[str, tuple[list[bytes], list[bytes]]]
"""Encoded images to teach and to test with, by class."""

KINDS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
"""What files with images end in."""


@dataclass(frozen=True)
class TaskData:
    """One task: encoded images with labels, to teach and to test."""

    labels: tuple[str, ...]
    train: tuple[Example, ...]
    test: tuple[Example, ...]


def load(source: str, tasks: int | None, train_per_class: int | None, seed: int) -> list[TaskData]:
    """Cut ``source`` into ``tasks`` tasks of as equal a number of classes as can be.

    Args:
        source: ``digits``; a folder with one sub-folder for each class; or an npz file with
            ``{train,test}_{bytes,offset,label}`` and ``names``.
        tasks: Number of tasks; None for five, or one for each class if there are fewer.
        train_per_class: At most so many training images of a class; None for all.
        seed: Decides which images of digits and folders are for testing (a third of them).
    """
    splits = split_by_class(source, seed)
    names = list(splits)
    tasks = tasks or min(5, len(names))
    if tasks > len(names):
        raise SystemExit(f"{len(names)} classes cannot make {tasks} tasks")
    return [
        TaskData(
            tuple(names[i] for i in group),
            tuple((x, names[i]) for i in group for x in splits[names[i]][0][:train_per_class]),
            tuple((x, names[i]) for i in group for x in splits[names[i]][1]),
        )
        for group in np.array_split(np.arange(len(names)), tasks)
    ]


def split_by_class(source: str, seed: int) -> Splits:
    """Return the training and the test images of every class of ``source``; see ``load``."""
    if source == "digits":
        splits = cut(_digits(), seed)
    elif source.endswith(".npz"):
        splits = _npz(Path(source))
    else:
        splits = cut(_folder(Path(source)), seed)
    if not splits:
        raise SystemExit(f"{source} holds no sub-folder with images")
    return splits


def _digits() -> dict[str, list[bytes]]:
    from sklearn.datasets import load_digits

    digits, images = load_digits(), defaultdict(list)
    for pixels, target in zip(digits.images, digits.target, strict=True):
        file = io.BytesIO()
        Image.fromarray(np.uint8(pixels * (255 / 16))).save(file, "PNG")
        images[f"digit {target}"].append(file.getvalue())
    return dict(sorted(images.items()))


def _folder(root: Path) -> dict[str, list[bytes]]:
    images = {
        folder.name: [x.read_bytes() for x in sorted(folder.iterdir()) if x.suffix.lower() in KINDS]
        for folder in sorted(root.iterdir())
        if folder.is_dir()
    }
    return {name: files for name, files in images.items() if files}


def cut(images: dict[str, list[bytes]], seed: int) -> Splits:
    """Set a third of every class's images aside for testing, at least one."""
    generator, splits = np.random.default_rng(seed), {}
    for name, files in images.items():
        order = generator.permutation(len(files))
        tests = max(1, len(files) // 3)
        splits[name] = [files[i] for i in order[tests:]], [files[i] for i in order[:tests]]
    return splits


def _npz(path: Path) -> Splits:
    with np.load(path) as archive:
        names = [str(name) for name in archive["names"]]
        splits: Splits = {name: ([], []) for name in names}
        for side, split in enumerate(("train", "test")):
            content, offset = archive[f"{split}_bytes"].tobytes(), archive[f"{split}_offset"]
            for start, end, label in zip(
                offset[:-1], offset[1:], archive[f"{split}_label"], strict=True
            ):
                splits[names[label]][side].append(content[start:end])
    return splits
