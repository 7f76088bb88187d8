"""A CSV or JSON lines of paths and labels, as a task."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from inflora_client import Example
from inflora_client.cli.sources.common import (
    Choice,
    Source,
    SourceError,
    listed,
    normalised,
    select,
)

PATH_COLUMNS = ("path", "file", "file_name", "image")
LABEL_COLUMNS = ("label", "class")
"""Names of columns, in the order in which they are looked for; case does not matter."""

DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON_LINES = ".jsonl"


@dataclass(frozen=True, slots=True)
class Columns:
    """Names of the columns that matter."""

    image: str
    label: str


def columns_of(table: Path, names: Sequence[str], choice: Choice) -> Columns:
    """Find the columns of images and labels.

    Raises:
        SourceError: One of them is not there.
    """

    def find(asked: str | None, known: Sequence[str], option: str) -> str:
        wanted = [asked] if asked is not None else known
        by_name = {name: name for name in names}
        if asked is None:
            by_name = {name.strip().casefold(): name for name in reversed(names)}
        for name in wanted:
            if name in by_name:
                return by_name[name]
        raise SourceError(
            f"{table} has no column {' or '.join(wanted)}; there are {listed(names) or 'none'}: "
            f"name one with {option}"
        )

    return Columns(
        find(choice.path_column, PATH_COLUMNS, "--path-column"),
        find(choice.label_column, LABEL_COLUMNS, "--label-column"),
    )


@dataclass(frozen=True, slots=True)
class Place:
    """Where a table lies, and what its paths may lead to.

    Attributes:
        table: The file; relative paths are relative to its folder.
        inside: Whether paths may not lead out of that folder, not by a link either. What was
            downloaded must not choose which files of this machine are uploaded.
    """

    table: Path
    inside: bool = False

    def file(self, row: str, path: str) -> Path:
        """Return the file that a path in a row means.

        Raises:
            SourceError: There is none, or it may not be used.
        """
        pure = PurePath(path)
        found = self.table.parent / pure
        if self.inside and (pure.is_absolute() or ".." in pure.parts):
            raise self._elsewhere(row, path)
        if not found.is_file():
            raise SourceError(
                f"{self.table}, {row}: there is no file {found}; paths are relative to the table's "
                "folder"
            )
        if self.inside and not found.resolve().is_relative_to(self.table.parent.resolve()):
            raise self._elsewhere(row, path)
        return found

    def _elsewhere(self, row: str, path: str) -> SourceError:
        return SourceError(
            f"{self.table}, {row}: {path!r} leads out of the table's folder; put it there"
        )

    def label(self, row: str, value: object, names: Sequence[str] = ()) -> str:
        """Return the label that a cell means.

        Args:
            row: Where the cell is.
            value: Text, or a number.
            names: What numbers stand for; they are labels themselves if it is empty.

        Raises:
            SourceError: It means none.
        """
        if isinstance(value, int) and not isinstance(value, bool):
            if not names:
                return str(value)
            if 0 <= value < len(names):
                return normalised(names[value])
            raise SourceError(
                f"{self.table}, {row}: label {value}, but there are names of {len(names)}"
            )
        if value is None or value == "":
            raise SourceError(
                f"{self.table}, {row}: has no label; give it one, or leave the row out"
            )
        if not isinstance(value, str):
            raise SourceError(f"{self.table}, {row}: {value!r} is neither text nor a whole number")
        return normalised(value)


def read_table(place: Place, choice: Choice) -> Source:
    """List the images that a CSV (``.csv``, ``.tsv``) or JSON lines (``.jsonl``) names.

    Raises:
        SourceError: It is not such a table, or a row of it is not acceptable.
        OSError: It cannot be read.
    """
    table = place.table
    rows = _json_rows(table) if table.suffix.lower() == JSON_LINES else _csv_rows(table)
    try:
        examples = list(_examples(place, rows, choice))
    except UnicodeDecodeError as error:
        raise SourceError(f"{table} is not text in UTF-8, save it as that: {error}") from error
    return Source(select(examples, choice, table))


def _examples(
    place: Place, rows: Iterable[tuple[str, dict[str, Any]]], choice: Choice
) -> Iterator[Example]:
    columns: Columns | None = None
    for row, cells in rows:
        columns = columns or columns_of(place.table, list(cells), choice)
        path = cells.get(columns.image)
        if not isinstance(path, str) or not path:
            raise SourceError(f"{place.table}, {row}: has no path in column {columns.image}")
        label = place.label(row, cells.get(columns.label))
        yield Example(place.file(row, path), label)


def _csv_rows(table: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with table.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(
            file, delimiter=DELIMITERS[table.suffix.lower()], skipinitialspace=True, strict=True
        )
        try:
            for cells in reader:
                row = f"line {reader.line_num}"
                if None in cells:
                    raise SourceError(
                        f"{table}, {row}: has more fields than the first line; put quotes around "
                        "one with a comma in it"
                    )
                yield row, cells
        except csv.Error as error:
            raise SourceError(f"{table}, line {reader.reader.line_num}: {error}") from error


def _json_rows(table: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with table.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            row = f"line {number}"
            if not line.strip():
                continue
            try:
                cells = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise SourceError(f"{table}, {row}: is no JSON: {error}") from error
            if not isinstance(cells, dict):
                raise SourceError(f"{table}, {row}: is no JSON object")
            yield row, cells
