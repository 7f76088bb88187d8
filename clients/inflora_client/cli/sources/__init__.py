"""What `inflora learn` and `inflora evaluate` take: folders, tables, archives and `datasets`."""

from __future__ import annotations

import re
import tarfile
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path

from inflora_client.cli.sources.archive import Archive, read_archive
from inflora_client.cli.sources.common import Choice, Source, SourceError
from inflora_client.cli.sources.folder import read_folder
from inflora_client.cli.sources.layout import read_layout, splits_of
from inflora_client.cli.sources.parquet import Parquet, Reader, read_parquet
from inflora_client.cli.sources.table import DELIMITERS, JSON_LINES, Place, read_table

__all__ = ["Choice", "Kind", "Source", "SourceError", "kind_of", "open_source"]


class Kind(StrEnum):
    """Kinds of sources, as people call them."""

    FOLDER = "a folder of classes"
    TABLE = "a table of paths"
    PARQUET = "a Parquet file"
    ARCHIVE = "a tar archive"
    LAYOUT = "a datasets folder"


_ARCHIVE = re.compile(r".*\.(tar(\.\w+)?|tgz|tbz2?|txz)", re.IGNORECASE | re.DOTALL)
_WITH_COLUMNS = (Kind.TABLE, Kind.PARQUET, Kind.LAYOUT)


def kind_of(path: Path) -> Kind:
    """Tell what a source is: by its layout, its suffix, or, of archives, by its content.

    Raises:
        SourceError: It is none.
        OSError: It cannot be read.
    """
    if path.is_dir():
        return Kind.LAYOUT if splits_of(path) else Kind.FOLDER
    suffix = path.suffix.lower()
    if suffix in DELIMITERS or suffix == JSON_LINES:
        return Kind.TABLE
    if suffix == ".parquet":
        return Kind.PARQUET
    if _ARCHIVE.fullmatch(path.name) or tarfile.is_tarfile(path):
        return Kind.ARCHIVE
    raise SourceError(
        f"{path} is nothing to learn from: give a folder with a sub-folder for each class, a table "
        f"of paths and labels ({', '.join(DELIMITERS)}, {JSON_LINES}, .parquet), a tar archive of "
        "such a folder, or a folder in a layout of Hugging Face's datasets"
    )


def open_source(path: Path, choice: Choice, stack: ExitStack) -> Source:
    """List the images of a source of any kind; none is read yet.

    Args:
        path: The source.
        choice: What to take of it.
        stack: Closes at the end what is left open for reading the images.

    Raises:
        SourceError: It is no task, or there is not what was asked for.
        OSError: It cannot be read.
    """
    kind = kind_of(path)
    if choice.split is not None and kind is not Kind.LAYOUT:
        raise SourceError(f"--split is for {Kind.LAYOUT}, but {path} is {kind}: leave it out")
    if (choice.path_column or choice.label_column) and kind not in _WITH_COLUMNS:
        raise SourceError(
            f"--path-column and --label-column are for tables, but {path} is {kind}: leave them out"
        )
    match kind:
        case Kind.FOLDER:
            return read_folder(path, choice)
        case Kind.TABLE:
            return read_table(Place(path), choice)
        case Kind.PARQUET:
            return read_parquet(Parquet(Place(path), stack.enter_context(Reader())), choice)
        case Kind.ARCHIVE:
            return read_archive(stack.enter_context(Archive(path)), choice)
        case Kind.LAYOUT:
            return read_layout(path, choice, splits_of(path), stack)
