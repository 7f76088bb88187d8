"""``inflora token``: a random token for a client, and its hash for the server."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from inflora_client.cli.session import EXIT_USAGE, fail, of_file

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_PREFIX = "inflora_"
"""So that scanners for secrets find those that got where they should not be."""


class Role(StrEnum):
    """What a principal may do; each may do what those before it may."""

    PREDICT = "predict"
    LEARN = "learn"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class MadeToken:
    """A token that was made.

    Attributes:
        name: Who it is for.
        role: What they may do.
        token_sha256: Its hash, for the server.
        file: Where it is.
    """

    name: str
    role: str
    token_sha256: str
    file: Path


def make(name: str, role: Role, file: Path) -> MadeToken:
    """Write a new token to a new file that only its owner can read; end the command if it cannot.

    Nowhere else: what is printed stays on screens and in logs.
    """
    if not _NAME.fullmatch(name):
        fail(
            f"{name!r} is no name: it has at most 64 letters, digits, '.', '_' and '-', and begins "
            "with a letter or digit",
            EXIT_USAGE,
        )
    token = _PREFIX + secrets.token_urlsafe(32)
    try:
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
            opened.write(f"{token}\n")
    except FileExistsError:
        fail(f"{file} exists already: it is not overwritten; name another with --out", EXIT_USAGE)
    except OSError as error:
        fail(of_file(error), EXIT_USAGE)
    return MadeToken(name, role.value, hashlib.sha256(token.encode()).hexdigest(), file)


def entry(made: MadeToken) -> str:
    """Return the lines that the server's ``--tokens`` file needs."""
    return (
        f"# the token is in {made.file}\n"
        "[[principals]]\n"
        f'name = "{made.name}"\n'
        f'role = "{made.role}"\n'
        f'token_sha256 = ["{made.token_sha256}"]'
    )
