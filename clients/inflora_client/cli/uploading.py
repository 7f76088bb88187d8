"""Uploading the images of a folder, with a progress bar and errors that name the file."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import typer

from inflora_client import Example, InvalidArgumentError
from inflora_client.cli import render
from inflora_client.cli.folder import CountedExamples, FolderError, read_folder
from inflora_client.cli.session import EXIT_INTERRUPTED, EXIT_REFUSED, EXIT_USAGE, fail, note

T = TypeVar("T")

_EXAMPLE_FIELD = re.compile(r"examples\[(\d+)\]")


def examples_of(folder: Path, classes: Sequence[str]) -> Sequence[Example]:
    """List the images of a folder's classes; end the command if it is no such folder."""
    try:
        found = read_folder(folder, classes)
    except (FolderError, OSError) as error:
        fail(str(error), EXIT_USAGE)
    if found.left_out:
        note(f"left out: {found.left_out} files that are not images by their suffix")
    return found.examples


def upload(examples: Sequence[Example], send: Callable[[Sequence[Example]], T]) -> T:
    """Return what ``send`` makes of the examples, which it takes under a progress bar."""
    try:
        with render.progress_bar() as bar:
            total = len(examples)
            return send(
                CountedExamples(examples, lambda n: bar(f"uploading  image {n}/{total}", n / total))
            )
    except InvalidArgumentError as error:
        fail(f"{error}{_files_at_fault(error, examples)}", EXIT_REFUSED)
    except KeyboardInterrupt:
        note("upload stopped; nothing is learned of it")
        raise typer.Exit(EXIT_INTERRUPTED) from None


def _files_at_fault(error: InvalidArgumentError, examples: Sequence[Example]) -> str:
    """The server counts examples; a person knows files."""
    matches = (_EXAMPLE_FIELD.search(v.field) for v in error.field_violations)
    numbers = (int(match[1]) for match in matches if match)
    return "".join(f"; that is {examples[n].image!s}" for n in numbers if n < len(examples))
