"""What is shown on a terminal while something goes on; elsewhere there is nothing to see."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text


class ProgressBar(Protocol):
    """Shows one line and how much is done."""

    def __call__(self, text: str, share: float) -> None:
        """Show a line of text and a share from 0 to 1."""


class TimeLeft:
    """How long the rest takes, if it goes on as it went since it was first looked at.

    What began before that does not count: the clock of the server, which knows when that was, need
    not be ours.
    """

    def __init__(self) -> None:
        self._first: tuple[float, float] | None = None

    def __call__(self, share: float, now: float) -> float | None:
        """Return seconds, or None if nothing tells yet.

        Args:
            share: How much is done, 0 to 1. If it falls, the work began again.
            now: Seconds of a clock that only goes forward.
        """
        if self._first is None or share < self._first[1]:
            self._first = (now, share)
        began, done = self._first
        if share <= done:
            return None
        return (now - began) * (1 - share) / (share - done)


def in_words(seconds: float) -> str:
    """Say a duration as exactly as an estimate deserves."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{round(whole / 60)} min"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


@contextmanager
def progress_bar() -> Iterator[ProgressBar]:
    """Show a live bar on stderr, where there is a terminal to show it on."""
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}", markup=False),
        console=console,
        disable=not console.is_terminal,
    ) as progress:
        bar = progress.add_task("", total=1.0, left="")
        time_left = TimeLeft()

        def show(text: str, share: float) -> None:
            seconds = time_left(share, time.monotonic())
            left = f"about {in_words(seconds)} left" if seconds is not None and share < 1 else ""
            progress.update(bar, description=text, completed=share, left=left)

        yield show


@contextmanager
def busy(doing: str) -> Iterator[None]:
    """Show that something is under way of which nobody knows how long it takes."""
    console = Console(stderr=True)
    if console.is_terminal:
        with console.status(Text(f"{doing} ...")):  # a path may have [brackets]
            yield
    else:
        yield
