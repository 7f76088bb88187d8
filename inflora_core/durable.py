"""Writing so that a power cut loses nothing that was told to be written. No torch."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import uuid
from pathlib import Path

from inflora_core import failpoints
from inflora_core.errors import InfloraError, LimitExceededError, UnavailableError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SHORTAGES: dict[int, tuple[type[InfloraError], str]] = {
    **dict.fromkeys(_FULL, (LimitExceededError, "disk is full")),
    errno.EMFILE: (LimitExceededError, "process has too many files open"),
    errno.ENFILE: (LimitExceededError, "machine has too many files open"),
    errno.ENOMEM: (LimitExceededError, "memory is full"),
    errno.EROFS: (UnavailableError, "disk is read-only"),
}
_DRAFT = re.compile(r"\..+\.[0-9a-f]{32}")
_DAMAGED = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP),
    *(errno.EIO, errno.EBADMSG, errno.EUCLEAN),
)


def is_full(error: OSError) -> bool:
    """Whether ``error`` says that the disk, or a quota on it or on a file, is full."""
    return error.errno in _FULL


def shortage(error: OSError) -> InfloraError | None:
    """Return what a client is told if the machine has too little of something; None if not.

    All of these pass without anything being done here once their cause is gone.
    """
    if error.errno not in _SHORTAGES:
        return None
    kind, what = _SHORTAGES[error.errno]
    return kind(f"the server's {what}; retry later")


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
    draft = draft_of(path)
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


def draft_of(path: Path) -> Path:
    """Return where to write what is to replace ``path``; ``is_draft`` knows it."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


def is_draft(path: Path) -> bool:
    """Whether a file is what ``replace`` leaves when it is interrupted."""
    return _DRAFT.fullmatch(path.name) is not None and path.is_file()


def append(path: Path, data: bytes, at: int) -> None:
    """Add ``data`` at position ``at``, the end of the file, and flush it: all of it or nothing.

    What lies behind ``at`` was left by an append that failed, and goes.
    """
    new = not path.exists()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        os.ftruncate(descriptor, at)
        try:
            written = 0
            while written < len(data):
                written += os.pwrite(descriptor, memoryview(data)[written:], at + written)
            os.fsync(descriptor)
            if new:
                sync_folder(path.parent)
        except OSError:
            # Half of it on a full disk would look like something that a power cut has torn.
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, at)
            raise
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, unless they are there; a power cut takes none away."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in reversed(missing):
        sync_folder(each.parent)


def move(folder: Path, to: Path) -> None:
    """Rename a folder, durably; nothing may be at ``to``, whose parent exists."""
    os.rename(folder, to)
    for parent in (to.parent, folder.parent):
        sync_folder(parent)


def sync_folder(folder: Path) -> None:
    """Flush the names in ``folder`` to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
