"""Uploading a task and following it, with a progress bar or JSON lines."""

from __future__ import annotations

import re
from collections.abc import Sequence

import typer

from inflora_client import (
    Client,
    Example,
    InvalidArgumentError,
    LearnOptions,
    Task,
    TaskFailedError,
    TaskState,
)
from inflora_client.cli import render
from inflora_client.cli.folder import CountedExamples
from inflora_client.cli.session import EXIT_INTERRUPTED, EXIT_REFUSED, Session, fail, note

_EXAMPLE_FIELD = re.compile(r"examples\[(\d+)\]")


def how_to_go_on(task_id: str) -> str:
    """Say which commands deal with a task that goes on by itself."""
    return f"follow it with 'inflora watch {task_id}', stop it with 'inflora cancel {task_id}'"


def upload(client: Client, examples: Sequence[Example], options: LearnOptions) -> Task:
    """Upload a task under a progress bar; return it as queued."""
    try:
        with render.progress_bar() as bar:
            total = len(examples)
            counted = CountedExamples(
                examples, lambda n: bar(f"uploading  image {n}/{total}", n / total)
            )
            return client.learn(counted, **options)
    except InvalidArgumentError as error:
        fail(f"{error}{_files_at_fault(error, examples)}", EXIT_REFUSED)
    except KeyboardInterrupt:
        note("upload stopped; the server keeps nothing of it")
        raise typer.Exit(EXIT_INTERRUPTED) from None


def queued(session: Session, client: Client, task: Task, detach: bool) -> None:
    """Follow a task that was accepted just now, or say how that can be done later."""
    if detach:
        state = f"task {task.id} is {task.state.lower()}"
        session.show([task], f"{state}; {how_to_go_on(task.id)}")
    else:
        follow(session, client, task.id)


def follow(session: Session, client: Client, task_id: str) -> None:
    """Show a task's progress until it ends, then what became of it.

    Raises:
        TaskFailedError: It ended in another way than by being published.
    """
    try:
        task = _watch(session, client, task_id)
    except KeyboardInterrupt:
        note(f"\ntask {task_id} goes on without you; {how_to_go_on(task_id)}")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    if task.state != TaskState.PUBLISHED:
        raise TaskFailedError(task)
    if not session.as_json:
        session.show((), render.summary_table(task))


def _watch(session: Session, client: Client, task_id: str) -> Task:
    with render.progress_bar() as bar:
        for task in client.watch(task_id):
            if session.as_json:
                session.show([task], "")
            else:
                bar(render.describe(task), task.fraction_done)
    return task


def _files_at_fault(error: InvalidArgumentError, examples: Sequence[Example]) -> str:
    """The server counts examples; a person knows files."""
    matches = (_EXAMPLE_FIELD.search(v.field) for v in error.field_violations)
    numbers = (int(match[1]) for match in matches if match)
    return "".join(f"; that is {examples[n].image!s}" for n in numbers if n < len(examples))
