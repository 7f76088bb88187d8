"""A folder with one sub-folder for each class, as a task."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

from inflora_client import Example

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".webp"})


class FolderError(Exception):
    """A folder is not a task: it has no classes, not those asked for, or one without images."""


@dataclass(frozen=True, slots=True)
class Folder:
    """What a folder holds.

    Attributes:
        examples: The images, class by class in the order of the labels.
        left_out: Files that are not images by their suffix. Hidden ones are not counted.
    """

    examples: list[Example]
    left_out: int


def read_folder(folder: Path, classes: Sequence[str] = ()) -> Folder:
    """List the images of a folder; none is opened yet.

    Args:
        folder: Holds one sub-folder for each class, named like the class.
        classes: Labels to take, each entry one label or several with commas between; all if empty.

    Raises:
        FolderError: The folder is not a task.
        OSError: The folder cannot be read.
    """
    by_label: dict[str, list[Path]] = {}
    for path in _visible(folder):
        if path.is_dir():
            # File systems differ in the Unicode form of names; the server knows labels in NFC.
            by_label.setdefault(unicodedata.normalize("NFC", path.name), []).append(path)
    if not by_label:
        raise FolderError(f"{folder} has no sub-folders: make one for each class")

    examples: list[Example] = []
    left_out = 0
    for label in _chosen(classes, by_label) or by_label:
        files = [f for path in by_label[label] for f in _visible(path) if f.is_file()]
        images = [f for f in files if f.suffix.lower() in IMAGE_SUFFIXES]
        if not images:
            raise FolderError(f"{by_label[label][0]} holds no {_suffixes()} files")
        examples += [Example(image, label) for image in images]
        left_out += len(files) - len(images)
    return Folder(examples, left_out)


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _chosen(classes: Sequence[str], known: dict[str, list[Path]]) -> list[str]:
    chosen: dict[str, None] = {}  # a set that keeps its order
    for entry in (unicodedata.normalize("NFC", c) for c in classes):
        # A label may hold a comma itself.
        chosen |= dict.fromkeys([entry] if entry in known else map(str.strip, entry.split(",")))
    if unknown := [label for label in chosen if label not in known]:
        raise FolderError(f"no sub-folder for {', '.join(unknown)}; there are {_join(known)}")
    return list(chosen)


def _join(labels: dict[str, list[Path]], limit: int = 10) -> str:
    more = f" and {len(labels) - limit} more" if len(labels) > limit else ""
    return ", ".join(list(labels)[:limit]) + more


def _suffixes() -> str:
    return ", ".join(sorted(IMAGE_SUFFIXES))


class CountedExamples(Sequence[Example]):
    """Examples that tell how many of them were taken.

    A sequence, unlike a generator that counts, can be uploaded again after a break.

    Args:
        examples: The examples.
        taken: Called with the number of examples taken so far, in the thread that takes them.
    """

    def __init__(self, examples: Sequence[Example], taken: Callable[[int], object]) -> None:
        self._examples = examples
        self._taken = taken

    def __len__(self) -> int:
        return len(self._examples)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        if isinstance(index, int):
            example = self._examples[index]
            self._taken(index + 1)
            return example
        return self._examples[index]
