"""Parquet of labels and paths, or of labels and images as Hugging Face writes them, as a task."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from inflora_client import Example
from inflora_client.cli.sources.common import Choice, Source, SourceError, select
from inflora_client.cli.sources.table import Place, columns_of

_HUGGING_FACE = b"huggingface"
"""Where `datasets` writes what its columns mean."""


class Reader:
    """Reads Parquet files, of which one is open, and one group of rows in memory, at a time.

    So a source of many files needs no more than its largest group.
    """

    def __init__(self) -> None:
        # As in an archive: two threads can be reading.
        self._lock = threading.Lock()
        self._table: Path | None = None
        self._file: Any = None
        self._kept: tuple[str, int] | None = None
        self._cells: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close()

    @contextmanager
    def opened(self, table: Path) -> Iterator[Any]:
        """Give a file as pyarrow has it, to one thread at a time.

        Raises:
            SourceError: It is no such file, cannot be read, or pyarrow is not installed.
        """
        try:
            from pyarrow import ArrowException, parquet
        except ImportError as error:
            raise SourceError(
                f"reading {table} needs pyarrow: pip install 'inflora-server[parquet]'"
            ) from error
        try:
            with self._lock:
                if self._table != table:
                    self._close()
                    self._file, self._table = parquet.ParquetFile(table), table
                yield self._file
        except (ArrowException, OSError, LookupError, UnicodeDecodeError) as error:
            raise SourceError(
                f"{table} cannot be read as Parquet, copy or make it again: {error}"
            ) from error

    def column(self, table: Path, name: str, group: int) -> list[Any]:
        """Return a column of a group of rows, which is not kept.

        Raises:
            SourceError: The file cannot be read.
        """
        with self.opened(table) as file:
            return list(_column(file, name, group).to_pylist())

    def cell(self, table: Path, name: str, group: int, index: int) -> Any:
        """Return a cell; those of the same column and group that follow come soon.

        Raises:
            SourceError: The file cannot be read.
        """
        with self.opened(table) as file:
            if self._kept != (name, group):
                self._cells = self._kept = None  # before there is another
                self._cells, self._kept = _column(file, name, group), (name, group)
            return self._cells[index].as_py()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._table = self._file = self._kept = self._cells = None


def _column(file: Any, name: str, group: int) -> Any:
    return file.read_row_group(group, columns=[name]).column(name)


class Parquet:
    """A Parquet file.

    Args:
        place: Where it is.
        reader: What it is read with.

    Raises:
        SourceError: It is no such file, or pyarrow is not installed.
    """

    def __init__(self, place: Place, reader: Reader) -> None:
        self.place = place
        self._reader = reader
        with reader.opened(place.table) as file:
            self._schema = file.schema_arrow
            self._groups = file.num_row_groups

    def examples(self, choice: Choice) -> Iterator[Example]:
        """Yield the examples in the order of the rows, without their images.

        Raises:
            SourceError: A row is not acceptable, or a column not there.
        """
        columns = columns_of(self.place.table, self._schema.names, choice)
        names = self._names_of(columns.label)
        kind = self._kind_of(columns.image)
        number = 0
        for group in range(self._groups):
            labels = self._reader.column(self.place.table, columns.label, group)
            paths = (
                self._reader.column(self.place.table, columns.image, group)
                if kind == "text"
                else None
            )
            for index, value in enumerate(labels):
                number += 1
                row = f"row {number}"
                label = self.place.label(row, value, names)
                if paths is None:
                    yield Example(RowImage(self, columns.image, group, index, row), label)
                elif paths[index]:
                    yield Example(self.place.file(row, paths[index]), label)
                else:
                    raise SourceError(f"{self.place.table}, {row}: has no path")

    def image(self, column: str, group: int, index: int, row: str) -> bytes:
        """Return the image of a row.

        Raises:
            SourceError: There is none, or the file is damaged.
            OSError: It is in another file, which cannot be read.
        """
        cell = self._reader.cell(self.place.table, column, group, index)
        if isinstance(cell, dict):
            path = cell.get("path")
            if cell.get("bytes") is None and isinstance(path, str) and path:
                # `datasets` writes these: they name files that came with the table.
                return replace(self.place, inside=True).file(row, path).read_bytes()
            cell = cell.get("bytes")
        if not isinstance(cell, bytes):
            raise SourceError(f"{self.place.table}, {row}: has no image")
        return cell

    def _kind_of(self, column: str) -> str:
        """Return what images are given as: ``text`` (paths) or ``bytes``."""
        from pyarrow import types

        kind = self._schema.field(column).type
        if types.is_dictionary(kind):
            kind = kind.value_type
        if types.is_string(kind) or types.is_large_string(kind):
            return "text"
        if types.is_struct(kind):
            kind = next((each.type for each in kind if each.name == "bytes"), kind)
        if types.is_binary(kind) or types.is_large_binary(kind):
            return "bytes"
        raise SourceError(
            f"{self.place.table}: column {column} is {kind}, but images are paths, bytes, or a "
            "struct of bytes and path: name another with --path-column"
        )

    def _names_of(self, column: str) -> list[str]:
        """Return what the numbers of a column stand for, nothing if the file does not say."""
        metadata = self._schema.metadata or {}
        try:
            features = json.loads(metadata[_HUGGING_FACE])["info"]["features"]
            return [str(name) for name in features[column]["names"]]
        except (KeyError, TypeError, ValueError, RecursionError):
            return []


@dataclass(frozen=True, slots=True)
class RowImage:
    """An image in a Parquet file.

    Attributes:
        table: Where it is.
        column: In which column.
        group: In which group of rows.
        index: Where in that.
        row: The row, for people.
    """

    table: Parquet
    column: str
    group: int
    index: int
    row: str

    def __str__(self) -> str:
        return f"{self.table.place.table}, {self.row}"

    def read_bytes(self) -> bytes:
        """Return the encoded bytes."""
        return self.table.image(self.column, self.group, self.index, self.row)


def read_parquet(table: Parquet, choice: Choice) -> Source:
    """List the images of a Parquet file.

    Raises:
        SourceError: It is not a task, or a row of it is not acceptable.
    """
    return Source(select(list(table.examples(choice)), choice, table.place.table))
