"""Arguments and options that several commands have, and the examples in their help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from inflora_client.cli import completing
from inflora_client.cli.session import JsonOption, ServerOption

__all__ = [
    "ClassesOption",
    "DetachOption",
    "JsonOption",
    "LabelColumnOption",
    "LabelsArgument",
    "PathColumnOption",
    "ServerOption",
    "SourceArgument",
    "SplitOption",
    "TaskArgument",
    "VersionArgument",
    "VersionOption",
    "examples",
    "label_argument",
]

TaskArgument = Annotated[
    str,
    typer.Argument(
        metavar="TASK", help="Id or full name of a task.", autocompletion=completing.task_ids
    ),
]
VersionArgument = Annotated[
    str,
    typer.Argument(
        metavar="N", help="Number of a version.", autocompletion=completing.version_numbers
    ),
]
VersionOption = Annotated[
    str | None,
    typer.Option(
        help="Ask this version instead of the current one.",
        autocompletion=completing.version_numbers,
    ),
]
LabelsArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="LABEL...",
        help="Labels or aliases of classes.",
        autocompletion=completing.labels,
    ),
]
DetachOption = Annotated[bool, typer.Option("--detach", help="Return once the task is queued.")]

SourceArgument = Annotated[
    Path,
    typer.Argument(
        metavar="SOURCE",
        exists=True,
        help="A folder with a sub-folder of images for each class; a table of paths and labels "
        "(CSV, TSV, JSON lines, Parquet); a tar archive; a folder of Hugging Face's datasets.",
    ),
]
ClassesOption = Annotated[
    list[str] | None,
    typer.Option(help="Only these classes, with commas between; may be repeated."),
]
SplitOption = Annotated[
    str | None,
    typer.Option(help="Which split of a datasets folder. (default: train)", metavar="NAME"),
]
PathColumnOption = Annotated[
    str | None,
    typer.Option(
        help="A table's column of images. (default: path, file, file_name or image)",
        metavar="NAME",
    ),
]
LabelColumnOption = Annotated[
    str | None,
    typer.Option(help="A table's column of labels. (default: label or class)", metavar="NAME"),
]


def label_argument(metavar: str) -> Any:
    """Return the argument that names one class."""
    return typer.Argument(
        metavar=metavar,
        help="Label of a class, or an alias.",
        autocompletion=completing.labels,
    )


def examples(*lines: str) -> str:
    """Return the end of a command's help: lines that can be typed as they are."""
    return "\n".join(["Example:" if len(lines) == 1 else "Examples:", *lines])
