"""Parses commands as the programs would that they start, without doing what they say."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from typer.exceptions import TyperException

from inflora_client.cli import app
from inflora_edge.__main__ import _parser as edge_parser
from inflora_service.__main__ import _parser as server_parser
from tests.benchmarks.checkout import ROOT


class CannotParseError(Exception):
    """A command is wrong, or of a program that nothing is known of."""


def check(command: str, folder: Path) -> None:
    """Parse one command of a shell.

    Args:
        command: As in a page; lines that end with a backslash go on.
        folder: Holds the files that it names.

    Raises:
        CannotParseError: saying why.
    """
    words = shlex.split(command.replace("\\\n", " "), comments=True)
    words = [word for word in words if word != "&"]
    if not words:
        return
    program, arguments = words[0], words[1:]
    if program not in _PARSERS:
        raise CannotParseError(f"{program}: nothing here can parse it")
    said = io.StringIO()
    try:
        with contextlib.chdir(folder), contextlib.redirect_stderr(said):
            _PARSERS[program](arguments)
    except (TyperException, SystemExit) as error:
        raise CannotParseError(f"{command}: {said.getvalue() or error}") from error


def _inflora(arguments: list[str]) -> None:
    command: Any = typer.main.get_command(app)
    with command.make_context("inflora", list(arguments)) as context:
        name, sub, rest = command.resolve_command(
            context, [*context._protected_args, *context.args]
        )
        if name == "serve":
            server_parser().parse_args(rest)
        else:
            sub.make_context(str(name), rest, parent=context)


def _edge(arguments: list[str]) -> None:
    edge_parser().parse_args(arguments)


def _make(arguments: list[str]) -> None:
    _done(["make", "--dry-run", "--no-print-directory", *arguments], ROOT)


def _npm(arguments: list[str]) -> None:
    scripts = json.loads((ROOT / "clients" / "web" / "package.json").read_text())["scripts"]
    if arguments[:1] != ["run"] or arguments[1] not in scripts:
        raise SystemExit(f"package.json has no script for: npm {shlex.join(arguments)}")


def _torchrun(arguments: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    get_args_parser().parse_args(arguments)


def _done(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)


_PARSERS: dict[str, Callable[[list[str]], None]] = {
    "inflora": _inflora,
    "inflora-edge": _edge,
    "make": _make,
    "npm": _npm,
    "torchrun": _torchrun,
}


def elsewhere(note: str) -> bool:
    """Whether what a note names is there: a target of the Makefile, or a file of tests."""
    target = re.fullmatch(r"make ([a-z0-9-]+)", note)
    if target:
        return bool(re.search(rf"^{target[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE))
    return (ROOT / note).is_file()


def bash_reads(script: str) -> str:
    """Return what bash has against a script's grammar; "" if nothing."""
    shell = shutil.which("bash") or "bash"
    done = subprocess.run([shell, "-n"], input=script, capture_output=True, text=True, check=False)
    return done.stderr
