"""Commands for who runs a server: start one, check its store, make tokens."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from inflora_client.cli import starting, tokens
from inflora_client.cli.commands.arguments import JsonOption, examples
from inflora_client.cli.session import EXIT_USAGE, Session, fail

app = typer.Typer()

_PANEL = "Run a server"
_PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command(
    context_settings=_PASSED_ON,
    add_help_option=False,
    rich_help_panel=_PANEL,
    epilog=examples("inflora serve", "inflora serve --store shop --port 50052"),
)
def serve(context: typer.Context) -> None:
    """Start a server here; all arguments are the server's (try: inflora serve --help)."""
    _become(starting.SERVER, [*starting.config_arguments(context), *context.args])


@app.command(
    context_settings=_PASSED_ON,
    add_help_option=False,
    rich_help_panel=_PANEL,
    epilog=examples("inflora doctor inflora-store", "inflora doctor --repair inflora-store"),
)
def doctor(context: typer.Context) -> None:
    """Check the store of a server that is stopped, and repair it (try: inflora doctor --help)."""
    session: Session = context.obj
    _become("inflora_service.doctor", [*context.args, *(["--json"] if session.as_json else [])])


@app.command(
    context_settings=_PASSED_ON,
    add_help_option=False,
    rich_help_panel=_PANEL,
    epilog=examples("inflora report --store inflora-store --output report.html"),
)
def report(context: typer.Context) -> None:
    """Write what a store has learned as one HTML file (try: inflora report --help)."""
    session: Session = context.obj
    _become("inflora_service.report", [*context.args, *(["--json"] if session.as_json else [])])


@app.command(
    rich_help_panel=_PANEL,
    epilog=examples("inflora token shop-camera --role predict --out camera.token"),
)
def token(
    context: typer.Context,
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Who it is for, as the audit log will have it.")
    ],
    role: Annotated[tokens.Role, typer.Option(help="What they may do.")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where to write it (default: NAME.token); a new file."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a token, and print what the server's --tokens file is to know of it."""
    session = Session.of(context, None, as_json)
    made = tokens.make(name, role, out or Path(f"{name}.token"))
    session.show([made], tokens.entry(made))


def _become(module: str, arguments: list[str]) -> NoReturn:
    if not starting.is_installed():
        fail(starting.NOT_INSTALLED, EXIT_USAGE)
    # Replaced, not wrapped: signals and the exit code are the server's own.
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])
