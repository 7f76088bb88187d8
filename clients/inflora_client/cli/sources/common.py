"""What all kinds of sources have in common: what is asked of them, and what they give."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from inflora_client import Example

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".webp"})
SUFFIXES = ", ".join(sorted(IMAGE_SUFFIXES))
"""The same for people."""

_SHOWN = 10
"""Most names that an error lists of what there is."""


class SourceError(Exception):
    """A source is no task, or not the one that was asked for; the message names file and row."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What to take of a source.

    Attributes:
        classes: Labels, each entry one label or several with commas between; all if empty.
        split: Which part of a `datasets` folder; None for ``train``.
        path_column: The column of a table that has the images; None to find it by its name.
        label_column: The column that has the labels; likewise.
    """

    classes: Sequence[str] = ()
    split: str | None = None
    path_column: str | None = None
    label_column: str | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """What a source holds.

    Attributes:
        examples: The images, none of which has been read yet. ``str`` of one says where it is.
        left_out: Files that are not images by their suffix, or lie beside the folders of classes.
            Hidden ones are not counted.
    """

    examples: Sequence[Example]
    left_out: int = 0


def is_image(name: str) -> bool:
    """Whether a file is an image by its suffix."""
    return Path(name).suffix.lower() in IMAGE_SUFFIXES


def normalised(label: str) -> str:
    """Return a label as the server knows it: file systems and tables differ in the Unicode form.

    Raises:
        SourceError: It is no Unicode text, so that it could not even be sent.
    """
    if any("\ud800" <= character <= "\udfff" for character in label):
        raise SourceError(f"label {label!r} is not Unicode text: rename the class")
    return unicodedata.normalize("NFC", label)


def chosen(classes: Sequence[str], known: Collection[str], source: Path) -> list[str]:
    """Return the labels to take, in the order they were asked for.

    Raises:
        SourceError: one of them is not known.
    """
    labels: dict[str, None] = {}  # a set that keeps its order
    for entry in map(normalised, classes):
        # A label may hold a comma itself.
        labels |= dict.fromkeys([entry] if entry in known else map(str.strip, entry.split(",")))
    if unknown := [label for label in labels if label not in known]:
        raise SourceError(f"no class {', '.join(unknown)} in {source}; there are {listed(known)}")
    return list(labels or known)


def select(examples: Sequence[Example], choice: Choice, source: Path) -> Sequence[Example]:
    """Return the examples of the classes that were asked for, in the order they are in.

    Raises:
        SourceError: a class is not there, or there is no example at all.
    """
    if not examples:
        raise SourceError(f"{source} holds no images: put some in, or name another")
    if not choice.classes:
        return examples
    known = dict.fromkeys(example.label for example in examples)
    labels = set(chosen(choice.classes, known, source))
    return [example for example in examples if example.label in labels]


def listed(names: Iterable[str]) -> str:
    """Return the first names, and how many there are beside them."""
    all_names = list(names)
    more = f" and {len(all_names) - _SHOWN} more" if len(all_names) > _SHOWN else ""
    return ", ".join(all_names[:_SHOWN]) + more
