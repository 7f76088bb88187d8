"""A folder with one sub-folder for each class, as a task."""

from __future__ import annotations

from pathlib import Path

from inflora_client import Example
from inflora_client.cli.sources.common import (
    SUFFIXES,
    Choice,
    Source,
    SourceError,
    chosen,
    is_image,
    normalised,
)


def read_folder(folder: Path, choice: Choice) -> Source:
    """List the images of a folder, class by class; none is opened yet.

    Raises:
        SourceError: The folder is not a task.
        OSError: The folder cannot be read.
    """
    by_label: dict[str, list[Path]] = {}
    left_out = 0
    for path in visible(folder):
        if path.is_dir():
            by_label.setdefault(normalised(path.name), []).append(path)
        else:
            left_out += 1
    if not by_label:
        raise SourceError(f"{folder} has no sub-folders: make one for each class")

    examples: list[Example] = []
    for label in chosen(choice.classes, by_label, folder):
        files = [f for path in by_label[label] for f in visible(path) if f.is_file()]
        images = [f for f in files if is_image(f.name)]
        if not images:
            raise SourceError(
                f"{by_label[label][0]} holds no {SUFFIXES} files: put images of the class there, "
                "or leave it out with --classes"
            )
        examples += [Example(image, label) for image in images]
        left_out += len(files) - len(images)
    return Source(examples, left_out)


def visible(folder: Path) -> list[Path]:
    """List what is in a folder and not hidden."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
