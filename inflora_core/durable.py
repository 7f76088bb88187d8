"""Writing so that a power cut loses nothing that was told to be written. No torch."""

from __future__ import annotations

import errno
import os
import uuid
from pathlib import Path

from inflora_core import failpoints

_FULL = (errno.ENOSPC, errno.EDQUOT)
_DAMAGED = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP),
    *(errno.EIO, errno.EBADMSG, errno.EUCLEAN),
)


def is_full(error: OSError) -> bool:
    """Whether ``error`` says that the disk, or a quota on it, is full."""
    return error.errno in _FULL


def is_damage(error: OSError) -> bool:
    """Whether ``error`` says that what was to be read is gone or spoilt.

    Anything else, for example that too many files are open, passes: whoever took that for damage
    would give up what is sound.
    """
    return error.errno in _DAMAGED


def write(path: Path, data: bytes) -> None:
    """Write a new file and flush it to the disk; its folder is the caller's to flush."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace(path: Path, data: bytes) -> None:
    """Give ``path`` the content ``data``, whole or not at all."""
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        failpoints.reach("replace.write")
        write(draft, data)
        failpoints.reach("replace.rename")
        os.replace(draft, path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise
    failpoints.reach("replace.renamed")
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush the names in ``folder`` to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
