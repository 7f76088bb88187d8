"""What every command shares: its global options, its output, and how errors end it."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console, RenderableType
from rich.prompt import Confirm
from rich.text import Text

from inflora_client import (
    AlreadyExistsError,
    Client,
    CorruptDownloadError,
    DataLossError,
    DeadlineExceededError,
    FailedPreconditionError,
    InfloraClientError,
    InsecureTokenError,
    InternalError,
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
    RetryPolicy,
    TaskFailedError,
    TaskHeldBackError,
    TaskState,
    UnauthenticatedError,
    UnavailableError,
)
from inflora_client._access import Access

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

EXIT_REFUSED = 1
EXIT_USAGE = 2
EXIT_UNREACHABLE = 3
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count

_UNBROKEN = 1 << 16
"""Columns of a page on which no row is broken."""

# Someone waits at the terminal: say sooner than a service would that nobody answers.
_RETRY = RetryPolicy(max_attempts=3)

_HINTS: list[tuple[type[InfloraClientError], str]] = [
    (NotFoundError, "see what there is with 'inflora tasks' and 'inflora versions'"),
    (
        TaskHeldBackError,
        "measure its version with 'inflora evaluate --version N', publish it all the same with "
        "'inflora promote --force N'",
    ),
    (AlreadyExistsError, "choose another name or --request-id, or see 'inflora versions'"),
    (FailedPreconditionError, "see where things stand with 'inflora tasks', 'inflora versions'"),
    (ResourceExhaustedError, "repeat it later, or with less at a time"),
    (DeadlineExceededError, "repeat it; the server is slow, or far away"),
    (DataLossError, "whoever runs the server can look with 'inflora doctor STORE'"),
    (CorruptDownloadError, "repeat it"),
    (UnauthenticatedError, "give a token with --token-file, or a certificate with --cert"),
    (PermissionDeniedError, "ask whoever runs the server for another role"),
    (InternalError, "see the server's log"),
]

_HINTS_OF_TASKS = {
    TaskState.FAILED: "mend what is said, and learn it again; the server's log has more",
    TaskState.CANCELLED: "learn it again if that was not meant to be",
    TaskState.SET_ASIDE: "try it again with 'inflora retry TASK'",
}

ServerOption = Annotated[
    str | None,
    typer.Option("--server", metavar="HOST:PORT", help="As before the command."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="As before the command.")]


@dataclass(frozen=True, slots=True)
class Session:
    """The global options of one run of the command.

    Attributes:
        server: Address of the server.
        as_json: Print one JSON object a line instead of tables.
        access: Who calls, and which servers are believed.
    """

    server: str
    as_json: bool
    access: Access = field(default_factory=Access)

    @staticmethod
    def of(context: typer.Context, server: str | None, as_json: bool) -> Session:
        """Options after the command's name win over those before it."""
        before: Session = context.obj
        return Session(server or before.server, as_json or before.as_json, before.access)

    @contextmanager
    def client(self) -> Iterator[Client]:
        """Connect, and end the command with one line and its exit code on an error."""
        if ":" not in self.server:  # gRPC would look for it at port 443
            fail(f"--server {self.server} has no port: give it as HOST:PORT", EXIT_USAGE)
        try:
            with Client(self.server, retry=_RETRY, **self.access.arguments()) as client:
                yield client
        except UnavailableError as error:
            secret = (
                "; with TLS, it can also be that --ca does not vouch for it, or that it asks for "
                "a certificate (--cert, --key)"
            )
            fail(
                f"cannot reach the server at {self.server} ({error}); start one with "
                "'inflora serve', or 'inflora learn --start-server', or name another with --server"
                + (secret if self.access.encrypted else ""),
                EXIT_UNREACHABLE,
            )
        except InsecureTokenError as error:
            fail(f"{error}; see --ca and --tls", EXIT_USAGE)
        except InfloraClientError as error:
            fail("; ".join(filter(None, (str(error), _hint(error)))), EXIT_REFUSED)
        except BrokenPipeError:
            raise  # whoever reads our output has had enough: nothing to tell anyone
        except OSError as error:
            fail(of_file(error), EXIT_USAGE)

    def show(self, results: Iterable[DataclassInstance], view: RenderableType) -> None:
        """Print results, as JSON lines or as the view that was made of them."""
        if self.as_json:
            for result in results:  # times become ISO 8601, paths text
                line = json.dumps(dataclasses.asdict(result), ensure_ascii=False, default=str)
                typer.echo(line)
        elif isinstance(view, str):
            typer.echo(view)  # a console would wrap it, and take [brackets] in paths for markup
        else:
            _console().print(view)


def _hint(error: InfloraClientError) -> str:
    """Say what to do next, where that can be told from the kind of the error."""
    if isinstance(error, TaskFailedError) and error.task.state in _HINTS_OF_TASKS:
        return _HINTS_OF_TASKS[error.task.state]
    return next((hint for kind, hint in _HINTS if isinstance(error, kind)), "")


def _console() -> Console:
    """Return where views are shown: as wide as it is, but what programs read has a row a line."""
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _UNBROKEN
    return console


def someone_answers() -> bool:
    """Whether there is somebody at a terminal who can be asked."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def agrees(question: str, *, default: bool) -> bool:
    """Ask somebody at the terminal; no answer is no.

    Args:
        question: What is asked; nothing in it is markup.
        default: What Enter says.
    """
    try:
        return Confirm.ask(Text(question, "prompt"), console=Console(stderr=True), default=default)
    except EOFError:
        return False


def note(message: str) -> None:
    """Tell the person at the terminal something that is no result."""
    typer.echo(message, err=True)


def of_file(error: OSError) -> str:
    """Say what went wrong with a file, and what to look at."""
    if error.filename is None:
        return str(error)
    why = (error.strerror or type(error).__name__).lower()
    return f"{error.filename}: {why}; check the name, and that you may use it"


def fail(message: str, code: int) -> NoReturn:
    """Print one line to stderr and end with an exit code."""
    note("inflora: " + " ".join(message.split()))
    raise typer.Exit(code)
