"""All commands that `inflora` has, as its own parser knows them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer

from inflora_client.cli import app

PROGRAM: Any = typer.main.get_command(app)


def commands(command: Any = PROGRAM, words: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yield every command that does something, by the words that call it."""
    below = getattr(command, "commands", None)
    if below is None:
        yield " ".join(words), command
    for name, each in (below or {}).items():
        yield from commands(each, (*words, name))


COMMANDS = dict(commands())
PROCESSES = ("serve", "doctor", "report")
"""Commands that become another program."""
