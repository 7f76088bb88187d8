"""Which backbone a store was made with, so that asking for another one is noticed."""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from inflora_core import durable
from inflora_core.errors import DamagedError, StateError
from inflora_core.store import BACKBONE_SOURCE

log = logging.getLogger(__name__)

FILE = BACKBONE_SOURCE

DEFAULT = "bundled"


@dataclass(frozen=True)
class BackboneSource:
    """Where a backbone came from.

    Attributes:
        source: ``bundled``, a name on a model hub, or the path of a file.
        architecture: The architecture that was asked for, None for the source's own.
        sha256: Of the file, "" where the source is none.
    """

    source: str
    architecture: str | None
    sha256: str

    @classmethod
    def of(cls, source: str, architecture: str | None) -> BackboneSource:
        """Return what ``source`` is now. Reads it all if it is a file."""
        sha256 = ""
        if os.path.isfile(source):
            with open(source, "rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return cls(source, architecture, sha256)

    def is_same(self, other: BackboneSource) -> bool:
        """Whether both are the same backbone, as far as can be told: a file may have moved."""
        if self.architecture and other.architecture and self.architecture != other.architecture:
            return False
        if self.sha256 and other.sha256:
            return self.sha256 == other.sha256
        return self.source == other.source


_ADAPTER = TypeAdapter(BackboneSource)


def remember(store: Path, source: BackboneSource) -> None:
    """Note what the store's backbone is made from, whole or not at all.

    Replaces an earlier note. Only the server that holds the store's lock may call this.
    """
    durable.replace(store / FILE, _ADAPTER.dump_json(source, indent=1))


def read(store: Path) -> BackboneSource | None:
    """Return what the store's backbone is made from, None if that was not noted.

    Raises:
        DamagedError: the note cannot be read.
    """
    try:
        return _ADAPTER.validate_json((store / FILE).read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise DamagedError(f"{store / FILE} cannot be read: {error}") from error


def check(store: Path, asked: BackboneSource) -> None:
    """Refuse a backbone other than the store's.

    Raises:
        StateError: it is another one.
        DamagedError: the note cannot be read.
    """
    noted = read(store)
    if noted is None:
        log.warning(
            "the store %s was made by other means: whether its backbone is %r cannot be told",
            store,
            asked.source,
        )
        return
    if not noted.is_same(asked):
        raise StateError(
            f"the store {store} was made with the backbone {noted.source!r}, and keeps it for "
            f"life: leave --backbone out, or use another store for {asked.source!r}"
        )
