"""Uploading the images of a source, with a progress bar and errors that name the file."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar, overload

import typer

from inflora_client import Example, InvalidArgumentError
from inflora_client.cli.progress import busy, progress_bar
from inflora_client.cli.session import (
    EXIT_INTERRUPTED,
    EXIT_REFUSED,
    EXIT_USAGE,
    fail,
    note,
    of_file,
)
from inflora_client.cli.sources import Choice, SourceError, open_source

T = TypeVar("T")

_EXAMPLE_FIELD = re.compile(r"examples\[(\d+)\]")


@contextmanager
def examples_of(source: Path, choice: Choice) -> Iterator[Sequence[Example]]:
    """List the labelled images of a source; end the command if it is none."""
    with ExitStack() as stack:
        try:
            with busy(f"reading {source}"):
                found = open_source(source, choice, stack)
        except SourceError as error:
            fail(str(error), EXIT_USAGE)
        except OSError as error:
            fail(of_file(error), EXIT_USAGE)
        if found.left_out:
            files = "1 file" if found.left_out == 1 else f"{found.left_out} files"
            note(f"left out: {files} without the suffix of an image, or in the folder of no class")
        yield found.examples


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


def upload(examples: Sequence[Example], send: Callable[[Sequence[Example]], T]) -> T:
    """Return what ``send`` makes of the examples, which it takes under a progress bar."""
    try:
        with progress_bar() as bar:
            total = len(examples)
            return send(
                CountedExamples(examples, lambda n: bar(f"uploading  image {n}/{total}", n / total))
            )
    except InvalidArgumentError as error:
        fail(f"{error}{_files_at_fault(error, examples)}", EXIT_REFUSED)
    except SourceError as error:
        fail(f"{error}; nothing is learned of it", EXIT_USAGE)
    except KeyboardInterrupt:
        note("upload stopped; nothing is learned of it")
        raise typer.Exit(EXIT_INTERRUPTED) from None


def _files_at_fault(error: InvalidArgumentError, examples: Sequence[Example]) -> str:
    """The server counts examples; a person knows files."""
    matches = (_EXAMPLE_FIELD.search(v.field) for v in error.field_violations)
    numbers = (int(match[1]) for match in matches if match)
    files = ", ".join(str(examples[n].image) for n in numbers if n < len(examples))
    return f"; that is {files}: replace it, or take it out, and repeat the command" if files else ""
