"""A folder in a layout of Hugging Face's `datasets`, as a task: one of its splits."""

from __future__ import annotations

import re
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from inflora_client.cli.sources.common import Choice, Source, SourceError, is_image, listed, select
from inflora_client.cli.sources.folder import read_folder, visible
from inflora_client.cli.sources.parquet import Parquet, Reader
from inflora_client.cli.sources.table import Place, read_table

DEFAULT_SPLIT = "train"
_SPLITS = frozenset({"dev", "eval", "test", "train", "val", "valid", "validation"})
"""Names of folders that are splits, and no classes."""

_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_SHARD = re.compile(
    r"(?P<numbered>\w+(?:\.\w+)*)-\d+-of-\d+(?:-[0-9a-f]+)?\.parquet"
    rf"|(?P<whole>{'|'.join(sorted(_SPLITS))})\.parquet"
)
"""A file of a split with a name of any kind, or a whole split."""


@dataclass(slots=True)
class Split:
    """Where the images of a split are: one of these.

    Attributes:
        shards: Parquet files with the images inside.
        metadata: A table beside the images.
        classes: A folder with one sub-folder for each class.
    """

    shards: list[Path] = field(default_factory=list)
    metadata: Path | None = None
    classes: Path | None = None


def splits_of(folder: Path) -> dict[str, Split]:
    """Return the splits of a folder; none if it has no such layout.

    Raises:
        OSError: The folder cannot be read.
    """
    splits: dict[str, Split] = {}
    folders = {path.name: path for path in visible(folder) if path.is_dir()}
    for parent in (folder, *(folders[name] for name in ("data",) if name in folders)):
        for path in sorted(parent.glob("*.parquet")):
            if path.name not in _METADATA and (match := _SHARD.fullmatch(path.name)):
                name = match["numbered"] or match["whole"]
                splits.setdefault(name, Split()).shards.append(path)
    if metadata := _metadata_in(folder):
        splits.setdefault(DEFAULT_SPLIT, Split()).metadata = metadata
    for name in sorted(_SPLITS & folders.keys()):
        found = _split_in(folders[name])
        if found is not None:
            splits.setdefault(name, found)
    return splits


def read_layout(folder: Path, choice: Choice, splits: dict[str, Split], stack: ExitStack) -> Source:
    """List the images of the split that was asked for.

    Args:
        folder: Where the splits are.
        choice: What to take.
        splits: What there is.
        stack: Closes at the end what is left open for reading.

    Raises:
        SourceError: There is no such split, or it is no task.
        OSError: It cannot be read.
    """
    name = choice.split or DEFAULT_SPLIT
    if name not in splits:
        raise SourceError(
            f"{folder} has no split {name}; there are {listed(splits)}: choose with --split"
        )
    split = splits[name]
    if split.metadata is not None and split.metadata.suffix != ".parquet":
        return read_table(Place(split.metadata, inside=True), choice)
    if split.classes is not None:
        return read_folder(split.classes, choice)
    tables = [split.metadata] if split.metadata is not None else split.shards
    reader = stack.enter_context(Reader())
    examples = [
        example
        for table in tables
        for example in Parquet(Place(table, inside=True), reader).examples(choice)
    ]
    return Source(select(examples, choice, folder))


def _split_in(folder: Path) -> Split | None:
    if metadata := _metadata_in(folder):
        return Split(metadata=metadata)
    inside = visible(folder)
    if shards := [path for path in inside if path.suffix == ".parquet"]:
        return Split(shards=shards)
    # With images of its own it is a class that happens to be called so.
    if any(path.is_dir() for path in inside) and not any(is_image(p.name) for p in inside):
        return Split(classes=folder)
    return None


def _metadata_in(folder: Path) -> Path | None:
    return next((path for name in _METADATA if (path := folder / name).is_file()), None)
