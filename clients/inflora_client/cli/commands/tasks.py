"""Commands for tasks that are there already."""

from __future__ import annotations

from collections.abc import Callable

import typer

from inflora_client import Client, Task
from inflora_client.cli import learning, render
from inflora_client.cli.commands.arguments import (
    JsonOption,
    ServerOption,
    TaskArgument,
    examples,
)
from inflora_client.cli.session import Session

app = typer.Typer()

_PANEL = "Tasks"
_ID = "20270115-104500-3f2a"


@app.command(rich_help_panel=_PANEL, epilog=examples("inflora tasks", "inflora --json tasks"))
def tasks(context: typer.Context, server: ServerOption = None, as_json: JsonOption = False) -> None:
    """List the tasks, newest first."""
    session = Session.of(context, server, as_json)
    with session.client() as client:
        found = list(client.tasks())
        session.show(found, render.task_table(found))


@app.command(rich_help_panel=_PANEL, epilog=examples(f"inflora watch {_ID}"))
def watch(
    context: typer.Context,
    task: TaskArgument,
    server: ServerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the progress of a task until it ends.

    Ctrl-C asks whether to leave the task to itself or to cancel it.
    """
    session = Session.of(context, server, as_json)
    with session.client() as client:
        learning.follow(session, client, task)


@app.command(rich_help_panel=_PANEL, epilog=examples(f"inflora cancel {_ID}"))
def cancel(
    context: typer.Context,
    task: TaskArgument,
    server: ServerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give up a task that has not ended."""
    _show(Session.of(context, server, as_json), lambda client: client.cancel(task))


@app.command(rich_help_panel=_PANEL, epilog=examples(f"inflora retry {_ID}"))
def retry(
    context: typer.Context,
    task: TaskArgument,
    server: ServerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Try a task again that was set aside."""
    _show(Session.of(context, server, as_json), lambda client: client.retry(task))


def _show(session: Session, change: Callable[[Client], Task]) -> None:
    with session.client() as client:
        found = [change(client)]
        session.show(found, render.task_table(found))
