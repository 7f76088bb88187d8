"""What every command shares: its global options, its output, and how errors end it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console, RenderableType

from inflora_client import (
    Client,
    InfloraClientError,
    InsecureTokenError,
    InternalError,
    NotFoundError,
    PermissionDeniedError,
    RetryPolicy,
    TaskHeldBackError,
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

# Someone waits at the terminal: say sooner than a service would that nobody answers.
_RETRY = RetryPolicy(max_attempts=3)

_HINTS: list[tuple[type[InfloraClientError], str]] = [
    (NotFoundError, "see what there is with 'inflora tasks' and 'inflora versions'"),
    (
        TaskHeldBackError,
        "measure its version with 'inflora evaluate --version N', publish it all the same with "
        "'inflora promote --force N'",
    ),
    (UnauthenticatedError, "give a token with --token-file, or a certificate with --cert"),
    (PermissionDeniedError, "ask whoever runs the server for another role"),
    (InternalError, "see the server's log"),
]

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
                "'inflora serve', or name another with --server"
                + (secret if self.access.encrypted else ""),
                EXIT_UNREACHABLE,
            )
        except InsecureTokenError as error:
            fail(f"{error}; see --ca and --tls", EXIT_USAGE)
        except InfloraClientError as error:
            hints = "".join(f"; {hint}" for kind, hint in _HINTS if isinstance(error, kind))
            fail(f"{error}{hints}", EXIT_REFUSED)
        except OSError as error:
            fail(str(error), EXIT_USAGE)

    def show(self, results: Iterable[DataclassInstance], view: RenderableType) -> None:
        """Print results, as JSON lines or as the view that was made of them."""
        if self.as_json:
            for result in results:  # times become ISO 8601, paths text
                line = json.dumps(dataclasses.asdict(result), ensure_ascii=False, default=str)
                typer.echo(line)
        elif isinstance(view, str):
            typer.echo(view)  # a console would wrap it, and take [brackets] in paths for markup
        else:
            Console().print(view)


def note(message: str) -> None:
    """Tell the person at the terminal something that is no result."""
    typer.echo(message, err=True)


def fail(message: str, code: int) -> NoReturn:
    """Print one line to stderr and end with an exit code."""
    note("inflora: " + " ".join(message.split()))
    raise typer.Exit(code)
