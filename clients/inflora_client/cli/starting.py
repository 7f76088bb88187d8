"""A server in the background, for who wants to learn something and has none yet."""

from __future__ import annotations

import importlib.util
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

import typer

from inflora_client._access import is_loopback
from inflora_client.cli.progress import busy
from inflora_client.cli.session import (
    EXIT_INTERRUPTED,
    EXIT_REFUSED,
    EXIT_UNREACHABLE,
    EXIT_USAGE,
    Session,
    agrees,
    fail,
    note,
    someone_answers,
)

SERVER = "inflora_service"
NOT_INSTALLED = (
    "the server is not installed here, only the client; install the package 'inflora-server' with "
    "the extras 'learner' and 'cpu' (or 'gpu')"
)

LOG = "server.log"

_CONNECT_SECONDS = 1.0
_LOOK_SECONDS = 0.1


def is_installed() -> bool:
    """Whether the server's package is here, and not the client alone."""
    return importlib.util.find_spec(SERVER) is not None


def config_arguments(context: typer.Context) -> list[str]:
    """Return what has a server read the same configuration file as this command."""
    file = context.find_root().params["config"]
    return ["--config", str(file)] if file else []


def make_sure(context: typer.Context, session: Session, unasked: bool) -> None:
    """Start a server if nobody listens where one is looked for, after asking.

    Without a terminal nobody can be asked, and what the command meets then says how to start one.

    Args:
        context: Of the command.
        session: Where a server is looked for.
        unasked: Whether to start one without asking.
    """
    address = _Address.of(session)
    if address is None:
        if unasked:
            fail(
                f"--start-server starts one on this machine without TLS, not at {session.server}: "
                "leave it out, or name localhost:PORT with --server",
                EXIT_USAGE,
            )
        return
    if address.answers():
        return
    if not is_installed():
        if unasked:
            fail(NOT_INSTALLED, EXIT_USAGE)
        return
    if unasked or someone_answers():
        command = [sys.executable, "-m", SERVER, *config_arguments(context)]
        store = _store_of(command)
        if not (unasked or _is_wanted(session.server, store)):
            fail(
                f"nothing was sent, as no server listens at {session.server}; start one with "
                "'inflora serve', or 'inflora learn --start-server'",
                EXIT_UNREACHABLE,
            )
        _start(command, address, store)


@dataclass(frozen=True, slots=True)
class _Address:
    """Where a server on this machine would listen."""

    host: str
    port: int

    @staticmethod
    def of(session: Session) -> _Address | None:
        """Return the address of a session, None if no server can be started for it here."""
        host, _, port = session.server.rpartition(":")
        plain = not session.access.encrypted and is_loopback(session.server)
        # Neither a scheme of gRPC's nor a list of addresses.
        if not plain or not host or not port.isdecimal() or {"/", ","} & set(host):
            return None
        if ":" in host and not host.startswith("["):
            return None
        return _Address(host.removeprefix("[").removesuffix("]"), int(port))

    def answers(self) -> bool:
        """Whether anybody listens there."""
        try:
            socket.create_connection((self.host, self.port), _CONNECT_SECONDS).close()
        except OSError:
            return False
        return True


def _is_wanted(server: str, store: Path) -> bool:
    question = f"No server listens at {server}. Start one here, with its store in {store}?"
    return agrees(question, default=True)


def _store_of(command: list[str]) -> Path:
    """Ask the server where its store would be: its file and the environment may have a say."""
    found = subprocess.run([*command, "--show-config"], capture_output=True, text=True, check=False)
    if found.returncode != 0:
        fail(f"no server can be started: {found.stderr}", EXIT_USAGE)
    return Path(tomllib.loads(found.stdout)["serve"]["store"])


def _start(command: list[str], address: _Address, store: Path) -> None:
    """Start a server that goes on when this command has ended, and wait until it listens.

    End the command if it does not come to that.
    """
    log = _log_file(store)
    with tempfile.TemporaryDirectory(prefix="inflora-") as folder:
        ready = Path(folder, "ready")
        options = ["--host", address.host, "--port", str(address.port), "--ready-file", str(ready)]
        with log.open("ab") as output:
            begin = output.tell()
            process = subprocess.Popen(
                [*command, *options],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C and the end of the terminal are not for it
            )
        try:
            with busy("starting a server; the first start takes longest"):
                while process.poll() is None and not ready.exists():
                    time.sleep(_LOOK_SECONDS)
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            note("the server was stopped before it listened")
            raise typer.Exit(EXIT_INTERRUPTED) from None
        if process.returncode is not None:
            said = log.read_bytes()[begin:].decode(errors="replace").splitlines()
            why = said[-1] if said else f"it ended with {process.returncode}"
            fail(f"the server did not start: {why}; see {log}", EXIT_REFUSED)
    kept = store / LOG
    if log != kept:
        os.replace(log, kept)  # the server goes on writing to it
    note(
        f"started a server at {address.host}:{address.port}, with its store in {store} and its log "
        f"in {shlex.quote(str(kept))}; stop it with: kill {process.pid}"
    )


def _log_file(store: Path) -> Path:
    """Return where the log is while the server starts: only an empty folder becomes a store."""
    if (store / "FORMAT").exists():
        return store / LOG
    store.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{store.name}-", suffix=".log", dir=store.parent)
    os.close(handle)
    return Path(name)
