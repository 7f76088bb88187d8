"""Canary images: some encoded images of each class, kept to see what later tasks cost it. No torch.

Off unless the operator asks for it (``--canary-images``): images are personal data.

    canary/{key}/            one folder for each class, named by its key
        0000, 0001, ...      encoded images, as they arrived
        manifest.json        name, size and sha256 of each

A folder is written beside the others and renamed into its place, so it is there whole or not at
all. It goes when its class is forgotten, with or without a purge.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Collection, Sequence
from pathlib import Path

from pydantic import TypeAdapter

from inflora_core import durable, failpoints
from inflora_core.errors import DamagedError
from inflora_core.model import FileEntry

FOLDER = "canary"

_MANIFEST = "manifest.json"
_DRAFT = ".draft."
_FILES = TypeAdapter(tuple[FileEntry, ...])


def keep(store: Path, key: str, images: Sequence[bytes]) -> None:
    """Keep encoded images of a class, durably; those of a class that has some stay as they are.

    Args:
        store: Folder of the store.
        key: Of the class.
        images: At least one.

    Raises:
        OSError: the disk does not take them. Nothing of them is left.
    """
    folder = store / FOLDER
    if (folder / key).exists():
        return
    folder.mkdir(exist_ok=True)
    draft = folder / f"{_DRAFT}{uuid.uuid4().hex}"
    draft.mkdir()
    try:
        entries = []
        for number, image in enumerate(images):
            failpoints.reach("canary.write")
            name = f"{number:04d}"
            durable.write(draft / name, image)
            entries.append(FileEntry.of(name, image))
        durable.write(draft / _MANIFEST, _FILES.dump_json(tuple(entries), indent=1))
        durable.sync_folder(draft)
        failpoints.reach("canary.rename")
        os.rename(draft, folder / key)
    except OSError:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    failpoints.reach("canary.renamed")
    durable.sync_folder(folder)
    durable.sync_folder(store)


def read(store: Path, key: str) -> list[bytes]:
    """Return the encoded images that are kept of a class; none if there are none.

    Raises:
        DamagedError: they are not what was kept.
    """
    folder = store / FOLDER / key
    if not folder.is_dir():
        return []
    try:
        entries = _FILES.validate_json((folder / _MANIFEST).read_bytes())
        images = [(folder / entry.name).read_bytes() for entry in entries]
    except (OSError, ValueError) as error:
        raise DamagedError(f"the canary images in {folder} cannot be read: {error}") from error
    for entry, image in zip(entries, images, strict=True):
        if entry.sha256 != hashlib.sha256(image).hexdigest():
            raise DamagedError(f"{folder / entry.name} does not have its checksum")
    return images


def forget(store: Path, classes: Collection[str]) -> None:
    """Delete what is kept of classes, durably. Doing it again does no harm.

    Args:
        store: Folder of the store.
        classes: Their keys.

    Raises:
        OSError: something could not be deleted.
    """
    folder = store / FOLDER
    # Only what lies in it: a key is no path, whatever it says.
    there = [folder / key for key in keys(store).intersection(classes)]
    for path in there:
        failpoints.reach("canary.delete")
        shutil.rmtree(path)
    if there:
        durable.sync_folder(folder)
        failpoints.reach("canary.deleted")


def keys(store: Path) -> frozenset[str]:
    """Return what something is kept of: keys of classes, and names of unfinished folders."""
    folder = store / FOLDER
    return frozenset(path.name for path in folder.iterdir()) if folder.is_dir() else frozenset()


def is_draft(key: str) -> bool:
    """Whether one of ``keys`` is what an interrupted writer left."""
    return key.startswith(_DRAFT)
