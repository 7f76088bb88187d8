"""Commands for versions: see them, choose one, keep one, take one along."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from inflora_client import Client, Version
from inflora_client._base import DEFAULT_ARTIFACT
from inflora_client.cli import completing, render
from inflora_client.cli.commands.arguments import (
    JsonOption,
    ServerOption,
    VersionArgument,
    examples,
)
from inflora_client.cli.session import EXIT_USAGE, Session, fail, note

app = typer.Typer()

_PANEL = "Versions"


@app.command(
    rich_help_panel=_PANEL,
    epilog=examples("inflora versions", "inflora versions 3", "inflora versions --flat"),
)
def versions(
    context: typer.Context,
    version: Annotated[
        str | None,
        typer.Argument(
            metavar="[N]",
            help="Show this one with its classes, or 'current'.",
            autocompletion=completing.version_numbers,
        ),
    ] = None,
    flat: Annotated[
        bool, typer.Option("--flat", help="As a table, newest first, and not as a tree.")
    ] = False,
    server: ServerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the lineage of versions, oldest first; branches are indented below where they began."""
    session = Session.of(context, server, as_json)
    with session.client() as client:
        if version is not None:
            one = client.version(version)
            session.show([one], render.version_view(one))
            return
        found = list(client.versions())
        if found:
            session.show(found, render.version_table(found) if flat else render.version_tree(found))
        else:
            note("no versions yet: teach the first with 'inflora learn SOURCE'")


@app.command(
    rich_help_panel=_PANEL, epilog=examples("inflora promote 1", "inflora promote 4 --force")
)
def promote(
    context: typer.Context,
    version: VersionArgument,
    force: Annotated[
        bool, typer.Option("--force", help="Take a candidate that was held back, too.")
    ] = False,
    server: ServerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a version answer; promoting an older one rolls back."""
    _show(Session.of(context, server, as_json), lambda client: client.promote(version, force=force))


@app.command(rich_help_panel=_PANEL, epilog=examples("inflora pin 3"))
def pin(
    context: typer.Context,
    version: VersionArgument,
    server: ServerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Keep a version however old it is."""
    _show(Session.of(context, server, as_json), lambda client: client.pin(version))


@app.command(rich_help_panel=_PANEL, epilog=examples("inflora unpin 3"))
def unpin(
    context: typer.Context,
    version: VersionArgument,
    server: ServerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let a pinned version go when it is old."""
    _show(Session.of(context, server, as_json), lambda client: client.unpin(version))


def _show(session: Session, change: Callable[[Client], Version]) -> None:
    with session.client() as client:
        found = [change(client)]
        session.show(found, render.version_table(found))


class Form(StrEnum):
    """Smaller forms of a version's file."""

    FP16 = "fp16"
    INT8 = "int8"


@app.command(
    rich_help_panel=_PANEL,
    epilog=examples("inflora export --output model.onnx", "inflora export --version 3 --form int8"),
)
def export(
    context: typer.Context,
    version: Annotated[
        str,
        typer.Option(
            help="Number of a version, or 'current'.", autocompletion=completing.version_numbers
        ),
    ] = "current",
    form: Annotated[
        Form | None, typer.Option(help="A smaller form of it; see docs/edge.md.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="File to write, or a folder. (default: model.onnx, or the form's name)"),
    ] = None,
    server: ServerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Download a version as an ONNX file, and verify it."""
    session = Session.of(context, server, as_json)
    with session.client() as client:
        artifact = f"model.{form.value}.onnx" if form else DEFAULT_ARTIFACT
        if output == Path("-"):  # would become a file of that name
            fail("a version is verified before it is a file: give --output a name", EXIT_USAGE)
        file = client.download(version, artifact, to=output or artifact)
        session.show(
            [file],
            f"{file.path}: version {render.short(file.version)}, {file.artifact.size} bytes, "
            f"SHA-256 {file.artifact.sha256}",
        )
