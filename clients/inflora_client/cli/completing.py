"""What a shell offers when someone presses Tab: what there is on the server, if that says it soon.

Nothing is ever said of what goes wrong: it would appear in the middle of a command.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import typer

from inflora_client import Client, RetryPolicy
from inflora_client.cli import render
from inflora_client.cli.session import Session

_SECONDS = 1.0
_MOST = 100
"""Newest ones that are offered."""

_WORD = re.compile(r"\w[\w@%+./-]*")
_DESCRIPTION = re.compile(r"[\w@%+./:, -]*")
"""What no shell reads as anything but itself. Labels are anybody's, and Zsh evaluates both."""

Offer = tuple[str, str]
"""A word, and what it is."""


def task_ids(ctx: typer.Context, incomplete: str) -> list[Offer]:
    """Offer the ids of tasks, newest first."""
    return _offered(
        ctx,
        incomplete,
        lambda client: ((task.id, render.describe(task)) for task in client.tasks()),
    )


def version_numbers(ctx: typer.Context, incomplete: str) -> list[Offer]:
    """Offer the numbers of versions, newest first."""
    return _offered(
        ctx,
        incomplete,
        lambda client: ((str(v.number), render.in_lineage(v)) for v in client.versions()),
    )


def labels(ctx: typer.Context, incomplete: str) -> list[Offer]:
    """Offer the labels that the current version knows."""
    return _offered(
        ctx, incomplete, lambda client: ((each.label, "") for each in client.version().classes)
    )


def _offered(
    context: typer.Context, incomplete: str, find: Callable[[Client], Iterable[Offer]]
) -> list[Offer]:
    with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(Exception):
        return list(islice(_matching(_session(context), incomplete, find), _MOST))
    return []


def _matching(
    session: Session, incomplete: str, find: Callable[[Client], Iterable[Offer]]
) -> Iterator[Offer]:
    at_once = RetryPolicy(max_attempts=1)
    with Client(
        session.server, timeout=_SECONDS, retry=at_once, **session.access.arguments()
    ) as client:
        for word, description in find(client):
            if word.startswith(incomplete) and _WORD.fullmatch(word):
                yield word, description if _DESCRIPTION.fullmatch(description) else ""


def _session(context: typer.Context) -> Session:
    """Return the session that the command would have: Tab runs no callbacks."""
    root: Any = context.find_root()
    root.invoke(root.command.callback, **root.params)
    return Session.of(root, context.params.get("server"), as_json=False)
