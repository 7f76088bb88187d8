"""``python -m inflora_service.report``: what a store has learned, as one file to hand round.

Reads the store of a server that runs or is stopped, and changes nothing in it. Needs neither torch
nor onnxruntime. The pictures are those of the console.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import sqlite3
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from PIL import Image

from inflora_core import durable
from inflora_core.errors import InfloraError, InvalidInputError, UnavailableError
from inflora_core.model import Task, now
from inflora_core.store import Store
from inflora_service import pictures, records, views
from inflora_service.evaluations import Evaluations
from inflora_service.lineage import Lineage
from inflora_service.overview import Fared, Lesson, Overview, finite, overview
from inflora_service.pictures import Picture
from inflora_service.records import TaskRecords
from inflora_service.views import View

log = logging.getLogger(__name__)

DONE, CANNOT = 0, 2
"""Exit statuses."""

PNG_ZOOM = 3
"""Of pictures as PNG: fine enough for paper."""

MOST_TASKS = 1000
"""Newest tasks in the report."""

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class Found:
    """What a store has to tell.

    Attributes:
        store: Its folder.
        backbone: What its backbone is called; "" before there is one.
        overview: What it has learned.
        tasks: Its tasks, newest first.
    """

    store: Path
    backbone: str
    overview: Overview
    tasks: tuple[Task, ...]


def look(root: Path) -> Found:
    """Look at a store, and leave it as it is.

    Raises:
        InfloraError: it cannot be read; the message says what is at fault.
        OSError: likewise.
    """
    store = Store.existing(root)
    with tempfile.TemporaryDirectory() as folder:
        try:
            records.copy(root, Path(folder))
        except sqlite3.Error as error:
            raise UnavailableError(f"the records of {root} cannot be read: {error}") from error
        copied = TaskRecords(Path(folder))
        try:
            evaluations = Evaluations(copied)
            tasks = tuple(snapshot.task for _, snapshot in copied.page(None, MOST_TASKS))
        finally:
            copied.close()
    found = overview(store, Lineage(store), evaluations, store.current())
    backbone = store.backbone().config.architecture if store.has_backbone() else ""
    return Found(root, backbone, found, tasks)


def page(found: Found, shown: Sequence[View]) -> str:
    """Return the report as a page that needs nothing else.

    Args:
        found: What the store has to tell.
        shown: The same, drawn.
    """
    made = f"{now():%Y-%m-%d %H:%M} UTC"
    head = [
        f"Store {found.store.absolute().name}",
        f"backbone {found.backbone}" if found.backbone else "no backbone yet",
        f"version {found.overview.version}" if found.overview.version else "no version yet",
        made,
    ]
    style = resources.files("inflora_service").joinpath("page", "report.css").read_text()
    sections = "".join(_section(view.title, view.drawn, wide=not view.folded) for view in shown)
    # Tables last: on paper nothing can be opened.
    sections += "".join(
        _section(f"{view.title}: figures" if view.folded else view.title, view.table, wide=True)
        for view in shown
        if view.table
    )
    if found.tasks:
        sections += _section("Tasks", views.tasks_table(found.tasks), wide=True)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        "<title>InfLoRA report</title>"
        f"<style>{pictures.stylesheet()}{style}</style></head><body>"
        f"<header><h1>InfLoRA report</h1><p>{escape(' · '.join(head))}</p></header>"
        f"<main><dl>{views.tiles_html(views.tiles(found.overview))}</dl>{sections}</main>"
        "</body></html>\n"
    )


def _section(title: str, content: str, *, wide: bool) -> str:
    kind = ' class="wide"' if wide else ""
    return f"<section{kind}><h2>{escape(title)}</h2>{content}</section>"


def figures(found: Found) -> dict[str, Any]:
    """Return what is in the report as plain data, for programs."""
    seen = found.overview
    accuracy, lost = seen.mean_accuracy, seen.mean_lost
    return {
        "store": str(found.store),
        "backbone": found.backbone,
        "version": seen.version,
        "classes": seen.classes,
        "mean_accuracy": accuracy[0] if accuracy else None,
        "mean_forgetting": lost[0] if lost else None,
        "tasks": [_task(each) for each in seen.fared],
        "accuracies": [
            {"after": after, "task": position, **asdict(cell), "time": cell.time.isoformat()}
            for (after, position), cell in sorted(seen.cells.items())
        ],
        "versions": [
            {
                "version": node.step.number,
                "parent": node.step.parent,
                "task": node.step.task,
                "status": node.status,
                "pinned": node.pinned,
                "classes": node.step.classes,
            }
            for node in seen.nodes
        ],
    }


def _task(each: Fared) -> dict[str, Any]:
    lesson: Lesson = each.lesson
    report = lesson.report
    return {
        "position": lesson.position,
        "task": lesson.task,
        "version": lesson.version,
        "classes": list(lesson.labels),
        "time": lesson.create_time.isoformat(),
        "best_accuracy": each.best.accuracy if each.best else None,
        "accuracy": each.now.accuracy if each.now else None,
        "forgetting": each.lost,
        "leak": report.leak,
        "interference": report.interference,
        "canary_loss": lesson.canary_loss,
        "capacity": report.capacity,
        "layers": [asdict(layer) for layer in report.layers],
        "tasks_left": report.tasks_left,
    }


def write_pngs(drawn: Sequence[Picture], folder: Path) -> list[Path]:
    """Write pictures as PNG, each under its name.

    Args:
        drawn: The pictures.
        folder: Where they go; made if it is not there.

    Raises:
        InvalidInputError: what draws them is not installed.
        UnavailableError: it finds no font here, and would leave out all text.
        OSError: they cannot be written.
    """
    try:
        import resvg_py
    except ImportError as error:
        raise InvalidInputError(
            "PNGs need the package 'resvg-py': install 'inflora-server' with the extra 'png'",
            field="png",
        ) from error
    if not _drawn(resvg_py.svg_to_bytes(svg_string=_LETTER)):
        raise UnavailableError("there is no font here to write into PNGs with: install one")
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for picture in drawn:
        content = resvg_py.svg_to_bytes(svg_string=picture.alone(), zoom=PNG_ZOOM)
        paths.append(folder / f"{picture.name}.png")
        durable.replace(paths[-1], content)
    return paths


_LETTER = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="20" height="20">'
    f'<text x="2" y="16" style="font-family: {pictures.FONT}">x</text></svg>'
)


def _drawn(content: bytes) -> bool:
    with Image.open(io.BytesIO(content)) as image:
        return image.getbbox() is not None


def _replaceable(path: Path) -> Path:
    """Return which file is to be replaced: a link leads to it, and stays.

    Raises:
        InvalidInputError: something else is there, such as a device.
    """
    found = path.resolve() if path.is_symlink() else path
    if found.exists() and not found.is_file():
        raise InvalidInputError(f"{path} is no file that could be replaced", field="output")
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="inflora report",
        description="Write what a store has learned into one HTML file: accuracy, forgetting, "
        "capacity, interference, versions and tasks. The store is read, never changed; its server "
        "may run.",
        epilog="Exit status: 0 done, 2 the store cannot be read or a file not be written. "
        "Example: inflora report --store shop --output shop.html --png figures/",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--store", type=Path, default=Path("inflora-store"), help="folder of the store"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("report.html"), help="file to write, replaced if there"
    )
    parser.add_argument(
        "--png", type=Path, metavar="FOLDER", help="where to write the same pictures as PNG, too"
    )
    parser.add_argument(
        "--json", action="store_true", help="print the figures as one JSON object, too"
    )
    return parser


def main() -> int:
    """Write a report; return the exit status."""
    arguments = _parser().parse_args()
    logging.basicConfig(level="WARNING", format="%(levelname)s %(name)s: %(message)s")
    try:
        found = look(arguments.store)
        shown = views.views(found.overview)
        content = page(found, shown).encode(errors="backslashreplace")
        drawn = [view.picture for view in shown if view.picture is not None]
        written = [] if arguments.png is None else write_pngs(drawn, arguments.png)
        durable.replace(_replaceable(arguments.output), content)
    except (InfloraError, OSError) as error:
        sys.stderr.write(f"inflora report: error: {error}\n")
        return CANNOT
    written.append(arguments.output)
    if arguments.json:
        answer = {**figures(found), "files": [os.fspath(path) for path in written]}
        sys.stdout.write(f"{json.dumps(finite(answer), allow_nan=False)}\n")
    else:
        sys.stdout.write("".join(f"wrote {path}\n" for path in written))
    return DONE


if __name__ == "__main__":
    sys.exit(main())
