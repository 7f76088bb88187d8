"""The shortest sound way from a file that a device has to a version's file. No torch."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping

from inflora_core import delta, forms
from inflora_core.delta import OnnxFile
from inflora_core.errors import DamagedError, NotFoundError, StateError
from inflora_core.model import Factors, FileEntry, Version
from inflora_core.store import ONNX_FILE, Store

log = logging.getLogger(__name__)


def file(store: Store, number: int, form: str = "") -> OnnxFile:
    """Return a version's ``model.onnx``, or a smaller form of it, made again.

    Raises:
        NotFoundError: it has no such form.
        NotFoundError, StateError, DamagedError: as ``Store.onnx``.
        DamagedError: the form is not what was measured.
    """
    if not form:
        return OnnxFile(number, store.onnx(number))
    listed = entry_of(store.version(number), form)
    if listed is None:
        raise NotFoundError(
            f"version {number} has no {forms.file_of(form)}: it was not made with it, or does not "
            f"agree with {ONNX_FILE} well enough, as the warnings of its task say then",
            field="artifact",
        )
    smaller, entry = forms.made(form, store.onnx(number))
    if entry != listed:
        raise DamagedError(f"{entry.name} of version {number} comes out as another file")
    return OnnxFile(number, smaller)


def entry_of(version: Version, form: str) -> FileEntry | None:
    """Return what a manifest says of ``model.onnx`` (empty), or of a form; None if it has none."""
    if not form:
        return version.file(ONNX_FILE)
    name = forms.file_of(form)
    return next((x.file for x in version.forms if x.file.name == name), None)


def bases(store: Store, target: int, held: Collection[str], form: str = "") -> list[int]:
    """Return the versions whose file somebody holds, the best to start from first.

    Those are the nearest ancestors, then the newest of others.

    Args:
        store: Of the versions.
        target: The version to come to.
        held: SHA-256 of the files; those that are not of a version here are passed over.
        form: Which of a version's files; ``model.onnx`` if empty.
    """
    files = {
        entry.sha256: version.number
        for version in store.manifests()
        if (entry := entry_of(version, form)) is not None and entry.sha256 in held
    }
    numbers = set(files.values())
    lineage = [number for number in [target, *store.ancestors(target)] if number in numbers]
    return lineage + sorted(numbers - set(lineage), reverse=True)


def between(store: Store, base: int, target: int, form: str = "") -> bytes | None:
    """Return the delta from one version's file to another's.

    From an ancestor it has the factors of the tasks between. From any other of the same backbone, a
    later version's or one of another branch, it has all weights that tasks change: products that
    were rounded cannot be taken away again. So it has between smaller forms.

    Returns:
        None where there is none, or the whole file is smaller.

    Raises:
        NotFoundError, StateError, DamagedError: as ``file``, of ``target``.
    """
    wanted = file(store, target, form)
    try:
        has = file(store, base, form)
        made = delta.make(has, wanted, [] if form else list(_factors(store, base, target)))
    except (NotFoundError, StateError, DamagedError) as error:
        log.warning("no delta from version %d to %d: %s", base, target, error)
        return None
    return made if len(made) < len(wanted.content) else None


def _factors(store: Store, base: int, target: int) -> Iterator[Mapping[str, Factors]]:
    """Yield what each task between two versions added, the first task's first."""
    lineage = [target, *store.ancestors(target)]
    if base not in lineage:
        return
    for number in reversed(lineage[: lineage.index(base)]):
        yield store.factors(number)
