"""Following a task, with a progress bar or JSON lines."""

from __future__ import annotations

import typer
from rich.console import Console
from rich.prompt import Prompt
from rich.text import Text

from inflora_client import Client, Task, TaskState
from inflora_client.cli import render
from inflora_client.cli.progress import progress_bar
from inflora_client.cli.session import EXIT_INTERRUPTED, Session, note, someone_answers
from inflora_client.errors import error_of_task

_DETACH, _CANCEL = "detach", "cancel"


def how_to_go_on(task_id: str) -> str:
    """Say which commands deal with a task that goes on by itself."""
    return f"follow it with 'inflora watch {task_id}', stop it with 'inflora cancel {task_id}'"


def queued(session: Session, client: Client, task: Task, detach: bool) -> None:
    """Follow a task that was accepted just now, or say how that can be done later."""
    if detach:
        state = f"task {task.id} is {task.state.lower().replace('_', ' ')}"
        session.show([task], f"{state}; {how_to_go_on(task.id)}")
    else:
        follow(session, client, task.id)


def follow(session: Session, client: Client, task_id: str) -> None:
    """Show a task's progress until it ends, then what became of it.

    Ctrl-C asks whether to cancel the task, where there is someone to answer.

    Raises:
        TaskFailedError: It ended in another way than by being published.
    """
    try:
        task = _watch(session, client, task_id)
    except KeyboardInterrupt:
        if _wants_to_cancel(task_id):
            cancelled = client.cancel(task_id)
            note(f"task {cancelled.id} is {cancelled.state.lower()}")
        else:
            note(f"\ntask {task_id} goes on without you; {how_to_go_on(task_id)}")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    if task.state in (TaskState.PUBLISHED, TaskState.HELD_BACK) and not session.as_json:
        session.show((), render.summary_table(task))
    if task.state != TaskState.PUBLISHED:
        raise error_of_task(task)


def _watch(session: Session, client: Client, task_id: str) -> Task:
    with progress_bar() as bar:
        for task in client.watch(task_id):
            if session.as_json:
                session.show([task], "")
            else:
                bar(render.describe(task), task.fraction_done)
    return task


def _wants_to_cancel(task_id: str) -> bool:
    """Ask; no answer, or another Ctrl-C, lets the task go on."""
    if not someone_answers():
        return False
    try:
        answer = Prompt.ask(
            Text(f"\nDetach from task {task_id}, which then goes on, or cancel it?", "prompt"),
            console=Console(stderr=True),
            choices=[_DETACH, _CANCEL],
            default=_DETACH,
        )
    except (EOFError, KeyboardInterrupt):
        return False
    return answer == _CANCEL
