"""What is made of versions' files when devices ask for it: deltas between them, smaller forms."""

from __future__ import annotations

import asyncio
import re
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import ParamSpec, Self, TypeVar
from weakref import WeakValueDictionary

from inflora_core import forms, updates
from inflora_core.errors import (
    InfloraError,
    InvalidInputError,
    LimitExceededError,
    NotFoundError,
)
from inflora_core.model import FileEntry
from inflora_core.store import ONNX_FILE, Store
from inflora_service.aio import unbroken

DELTAS = {"model.delta": "", **{f"model.{form}.delta": form for form in forms.FORMS}}
"""What each delta's name says that it leads to a file of: ``model.onnx``, or a form of it."""

MOST_HELD = 16

_KEPT, _KEPT_BYTES = 1024, 2**26
"""Devices follow a model together: what one has asked for, the next one will."""

_KEPT_FORMS = 2
"""Those are large: of a ViT-B, 100 and 170 MB."""

_MOST_WAITING = 32
"""Calls that may wait: each is seconds of work where models are large."""

P = ParamSpec("P")
T = TypeVar("T")

_Key = tuple[str, int, int]
"""Its name, the version that a delta leads from, and the version that it is of."""

_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class DerivedFile:
    """What was made. A delta is empty where there is none that is smaller than the file.

    Attributes:
        entry: As it is announced.
        content: All of it.
    """

    entry: FileEntry
    content: bytes

    @classmethod
    def of(cls, name: str, content: bytes) -> Self:
        """Return a file of this name and content."""
        return cls(FileEntry.of(name, content), content)


class Derived:
    """Makes one at a time, and keeps the latest in memory.

    Args:
        store: Of the versions.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._made: OrderedDict[_Key, DerivedFile] = OrderedDict()
        # While somebody streams one, it is in memory whether it is kept or not.
        self._alive: WeakValueDictionary[_Key, DerivedFile] = WeakValueDictionary()
        self._making = asyncio.Lock()
        self._waiting = 0

    async def delta(self, number: int, name: str, held: Sequence[str]) -> DerivedFile:
        """Return the delta to a version's file from the best of the files ``held``.

        Args:
            number: The version.
            name: One of ``DELTAS``.
            held: SHA-256 of files.

        Raises:
            InvalidInputError: ``held`` is not as it has to be.
            NotFoundError: nothing leads there that is smaller than the whole file.
            LimitExceededError: too many wait already.
            NotFoundError, StateError, DamagedError: as ``Store.onnx``.
        """
        check_held(held)
        found = await self._in_turn(self._delta, number, name, frozenset(held))
        if found is None:
            whole = forms.file_of(DELTAS[name]) if DELTAS[name] else ONNX_FILE
            raise NotFoundError(
                f"no delta leads from the files held to version {number}: take {whole}",
                field="held",
            )
        return found

    async def form(self, number: int, form: str) -> DerivedFile:
        """Return a smaller form of a version's ``model.onnx``.

        Args:
            number: The version.
            form: Which one, of ``forms.FORMS``.

        Raises:
            LimitExceededError: too many wait already.
            NotFoundError: it is not handed out, or there is no such version.
            StateError, DamagedError: as ``Store.onnx``.
        """
        return await self._in_turn(self._form, number, form)

    async def _in_turn(self, make: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        if self._waiting >= _MOST_WAITING:
            raise LimitExceededError(f"{self._waiting} calls wait already: ask later")
        self._waiting += 1
        try:
            # Who waits for others holds no thread: those are for all calls.
            async with self._making:
                # Who is cancelled waits for the thread: else the next one would begin beside it.
                return await unbroken(asyncio.to_thread(make, *args, **kwargs))
        finally:
            self._waiting -= 1

    def check(self, number: int) -> None:
        """Refuse what may not be handed out (any more).

        Raises:
            NotFoundError, StateError: as ``Store.path``.
        """
        self._store.path(number, ONNX_FILE)

    def _delta(self, number: int, name: str, held: Collection[str]) -> DerivedFile | None:
        self.check(number)
        form = DELTAS[name]
        for base in updates.bases(self._store, number, held, form):

            def make(base: int = base) -> DerivedFile:
                content = updates.between(self._store, base, number, form) or b""
                return DerivedFile.of(name, content)

            if (made := self._kept((name, base, number), make)).content:
                return made
        return None

    def _form(self, number: int, form: str) -> DerivedFile:
        self.check(number)
        name = forms.file_of(form)

        def make() -> DerivedFile:
            return DerivedFile.of(name, updates.file(self._store, number, form).content)

        return self._kept((name, 0, number), make)

    def _kept(self, key: _Key, make: Callable[[], DerivedFile]) -> DerivedFile:
        made = self._alive.get(key)
        if made is None:
            made = self._alive[key] = make()
            self.check(key[2])  # a class may have been forgotten meanwhile
        new = key not in self._made
        self._made[key] = made
        self._made.move_to_end(key)
        if new:
            self._let_go()
        return made

    def _let_go(self) -> None:
        """Forget what is too much, and what may not be handed out any more."""
        for key in list(self._made):
            try:
                self.check(key[2])
            except InfloraError:
                del self._made[key]
        forms_kept = [key for key in self._made if key[0] not in DELTAS]
        for key in forms_kept[:-_KEPT_FORMS]:
            del self._made[key]
        deltas = [key for key in self._made if key[0] in DELTAS]
        size = sum(len(self._made[key].content) for key in deltas)
        while deltas[1:] and (len(deltas) > _KEPT or size > _KEPT_BYTES):
            size -= len(self._made.pop(deltas.pop(0)).content)


def check_held(held: Sequence[str]) -> None:
    """Refuse what is no list of hashes.

    Raises:
        InvalidInputError: it is not.
    """
    if not held or len(held) > MOST_HELD:
        raise InvalidInputError(
            f"{len(held)} files are held; 1 to {MOST_HELD} can be named", field="held"
        )
    for place, sha256 in enumerate(held):
        if not _SHA256.fullmatch(sha256):
            raise InvalidInputError(
                "it must be 64 lower-case hexadecimal digits", field=f"held[{place}]"
            )
