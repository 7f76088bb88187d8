"""Which version is current, and what is kept and forgotten, where versions are made."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

from inflora_core.audit import SERVER
from inflora_core.config import Limits, Retention
from inflora_core.errors import (
    DamagedError,
    GateError,
    InfloraError,
    NotFoundError,
    OvertakenError,
    StateError,
)
from inflora_core.gate import why_held_back
from inflora_core.logs import note
from inflora_core.model import Version, VersionState
from inflora_core.predictor import RuntimeOptions
from inflora_core.retention import Outdated, outdated
from inflora_core.store import ONNX_FILE, Store
from inflora_service.aio import unbroken
from inflora_service.auditing import AuditTrail
from inflora_service.serving import Host

log = logging.getLogger(__name__)

T = TypeVar("T")


class ModelHost(Host):
    """Holds the current version and a few others, predicts with them, and makes others current.

    Args:
        store: Where versions are.
        options: How onnxruntime runs them.
        limits: What images are refused.
        audit: Is told which version is current, and what is forgotten.
        on_serving: Told once a version can answer.
        on_sound: Told whether the current version is what answers, or there is none yet.
        on_changed: Told whenever what others see of the store may be another.
        on_swap: As for ``Host``.
        on_run: As for ``Batcher``.
    """

    def __init__(
        self,
        store: Store,
        options: RuntimeOptions,
        limits: Limits,
        audit: AuditTrail,
        *,
        on_serving: Callable[[], None] = lambda: None,
        on_sound: Callable[[bool], None] = lambda sound: None,
        on_changed: Callable[[], None] = lambda: None,
        on_swap: Callable[[float], None] = lambda seconds: None,
        on_run: Callable[[int, int, float], None] = lambda images, bulk, seconds: None,
    ) -> None:
        super().__init__(
            store, options, limits, on_serving=on_serving, on_swap=on_swap, on_run=on_run
        )
        self._on_sound = on_sound
        self._audit = audit
        self._on_changed = on_changed
        self._sound = asyncio.Event()

    async def start(self) -> None:
        """Load the current version, if there is one.

        A damaged one does not keep the server from starting: its newest ancestor that can answers
        in its place, and another can be promoted. ``CURRENT`` stays as it is, for the files may be
        restored.

        Raises:
            UnavailableError: the execution provider that was asked for does not work.
        """
        try:
            number = await asyncio.to_thread(self._pointer)
            if number is not None:
                self._current = await self._get(number)
                self._pinned.pop(number, None)  # it would outlive its being current there
                self._on_serving()
            self._sound.set()
        except (DamagedError, NotFoundError, StateError) as error:
            log.critical("the current version cannot be loaded; promote another: %s", error)
            self._fault = DamagedError(
                f"the current version is damaged, and another has to be promoted: {error.message}"
            )
            await self._fall_back(error)
        self._on_sound(self._fault is None)

    def _pointer(self) -> int | None:
        """Return the number of the current version.

        Raises:
            DamagedError: the pointer to it is damaged, or gone, after which what is taught next
                would begin anew.
        """
        number, reported = self._store.current(), self._audit.history.current
        if number is None and reported:
            raise DamagedError(f"CURRENT is lost; the audit log says that it was {reported[-1]}")
        return number

    async def _fall_back(self, fault: InfloraError) -> None:
        """Have the newest ancestor of the damaged current version answer that can."""
        history = self._audit.history
        lineage: list[int] = []
        current = await asyncio.to_thread(self._before)
        if current is None:
            if not history.current:
                return
            current = history.current[-1]
            lineage.append(current)  # the pointer to it is damaged, the version need not be
        lineage += await asyncio.to_thread(self._store.ancestors, current, history.parents)
        for number in lineage:
            try:
                version = await asyncio.to_thread(self._store.version, number)
                if _may_stand_in(version):
                    self._current = await self._get(number)
                    self._pinned.pop(number, None)
                    break
            except (DamagedError, NotFoundError, StateError) as error:
                log.warning("version %d cannot answer either: %s", number, error)
        else:
            log.critical("no ancestor of version %d can answer", current)
            return
        log.critical("version %d answers in place of version %d", number, current)
        await self._audit.fell_back(current, number, fault.reason)
        self._on_serving()

    async def wait_sound(self) -> None:
        """Wait until ``current`` can be told: for good, once it can."""
        await self._sound.wait()

    async def promote(self, number: int, who: str, *, force: bool = False) -> Version:
        """Make version ``number`` current once it is loaded and warm.

        What it forgets is forgotten from then on, in all versions.

        Args:
            number: The version.
            who: Who asked for it, for the audit log.
            force: Take a candidate, too.

        Raises:
            NotFoundError: there is no such version.
            GateError: it is a candidate that is not current already.
            StateError: it can answer nothing any more, because of what was forgotten.
            DamagedError: a file of it is damaged. The current version stays.
        """
        return await self._changing(self._promote(number, who, force))

    async def publish(self, number: int) -> Version:
        """Make a version current that was just made from the one that is.

        Raises:
            GateError: it is a candidate.
            OvertakenError: somebody has made another version current meanwhile.
            NotFoundError, StateError, DamagedError: as ``promote``.
        """
        return await self._changing(self._publish(number))

    async def pin(self, number: int, who: str) -> Version:
        """Keep version ``number`` however old it is; return it.

        Args:
            number: The version.
            who: Who asked for it, for the audit log.

        Raises:
            NotFoundError: there is no such version.
            StateError: its data are deleted already.
        """
        return await self._changing(self._pin(number, who))

    async def unpin(self, number: int, who: str) -> Version:
        """Let version ``number`` go when it is old; return it.

        Raises:
            NotFoundError: there is no such version.
        """
        return await self._changing(self._unpin(number, who))

    async def retain(self, retention: Retention) -> None:
        """Delete of old versions what need not be kept; never of the current and of pinned ones.

        What cannot be deleted now, the next call deletes.

        Raises:
            OSError, InfloraError: the versions cannot be looked at.
        """
        await self._changing(self._retain(retention))

    async def purge(self, number: int) -> None:
        """Delete the data of all versions that know what version ``number`` forgets.

        It is made current again, should another be by now: that one may be among them.

        Raises:
            DamagedError: a file of it is damaged. Nothing is deleted.
        """
        await self._changing(self._purge(number))

    async def _changing(self, work: Coroutine[Any, Any, T]) -> T:
        """Do something to the end, and tell that something may have changed, also if it failed."""
        try:
            return await unbroken(work)
        finally:
            self._on_changed()

    async def _promote(self, number: int, who: str, force: bool) -> Version:
        async with self._swap:
            if not force and not self.is_current(number):
                self._refuse_candidate(await asyncio.to_thread(self._store.version, number))
            return await self._swap_to(number, who)

    async def _publish(self, number: int) -> Version:
        async with self._swap:
            version = await asyncio.to_thread(self._store.version, number)
            if version.report is not None and version.candidate:
                why = why_held_back(version.report.failed_checks)
                raise GateError(f"version {number} is held back: {why}")
            if self._fault is None and self._current is not None:  # else any sound one is better
                current = self._current.version.number
                if current not in (version.parent, number):
                    raise OvertakenError(
                        f"version {number} is held back: version {current} was made current while "
                        f"it was made from version {version.parent}; promote it, or ask again"
                    )
            return await self._swap_to(number, SERVER)

    @staticmethod
    def _refuse_candidate(version: Version) -> None:
        if version.report is not None and version.candidate:
            raise GateError(
                f"version {version.number} is a candidate; force its promotion if it is to answer "
                f"all the same: {why_held_back(version.report.failed_checks)}",
                field="force",
            )

    async def _pin(self, number: int, who: str) -> Version:
        async with self._swap:
            known = await asyncio.to_thread(self._store.version, number)
            # Kept is what can answer, whatever becomes of its ancestors.
            await asyncio.to_thread(self._make_whole, number)
            version = await asyncio.to_thread(self._store.pin, number)
            if not known.pinned:
                await self._audit.pinned(number, who)
            return version

    async def _unpin(self, number: int, who: str) -> Version:
        async with self._swap:
            if (await asyncio.to_thread(self._store.version, number)).pinned:
                await self._audit.unpinned(number, who)
            return await asyncio.to_thread(self._store.unpin, number)

    async def _retain(self, retention: Retention) -> None:
        async with self._swap:
            if self._fault is not None or self._current is None:
                return  # which ones will be needed, nobody knows
            current = self._current.version.number
            old = await asyncio.to_thread(self._outdated, current, retention)
            for number in (*await asyncio.to_thread(self._store.half_retired), *old.versions):
                with _put_off(f"version {number} cannot be retired yet"):
                    try:
                        await asyncio.to_thread(self._store.retire, number)
                    finally:
                        self._pinned.pop(number, None)
                    await self._audit.retired(number)
                    log.info("version %d is retired", number)
            for number in filter(self._store.has_onnx, old.onnx_files):
                with _put_off(f"{ONNX_FILE} of version {number} stays"):
                    await asyncio.to_thread(self._store.drop_onnx, number)

    def _outdated(self, current: int, retention: Retention) -> Outdated:
        """Return what need not be kept beside the current version and the ways back from it.

        These are the one that was current before, and the one that stands in should the current
        one be damaged.
        """
        versions = [self._store.version(version.number) for version in self._store.manifests()]
        sound = {version.number for version in versions if _may_stand_in(version)}
        before = [number for number in self._audit.was_current if number != current]
        wanted = {current, *before[-1:]}
        ancestors = self._store.ancestors(current, self._audit.history.parents)
        wanted.update([number for number in ancestors if number in sound][:1])
        return outdated(versions, wanted, retention)

    async def _purge(self, number: int) -> None:
        async with self._swap:
            version = await self._swap_to(number, SERVER)
            self._settled.clear()
            try:
                await asyncio.to_thread(self._store.purge, version.forgets)
            finally:
                # They may not answer any more, even where their files could not be deleted yet.
                self._drop_pinned()
                if self._current is not None:
                    self._current = replace(self._current, generation=self._generation)
                self._settled.set()
            await self._audit.purged(version)

    async def _swap_to(self, number: int, who: str) -> Version:
        note(version=number)
        now = time.monotonic()
        loaded = await self._get(number)
        if loaded.since < now or loaded.version.state is not VersionState.WHOLE:
            # Loaded long ago, its files may have been damaged or let go since, and the next start
            # needs them.
            await asyncio.to_thread(self._make_whole, number)
        if loaded.version.forgets:
            # First, so that whatever happens none of them is back after the new version was seen.
            await asyncio.to_thread(self._store.forget, loaded.version.forgets)
            await self._audit.forgotten(loaded.version)
        if not self.is_current(number) or self.stand_in is not None:
            try:
                await asyncio.to_thread(self._store.set_current, number)
            except OSError:
                # What answers is what CURRENT names, also where only its flushing failed.
                if await asyncio.to_thread(self._before) != number:
                    raise
                log.exception("CURRENT may not be on the disk yet")
            await self._audit.moved(loaded.version, who)
            log.info("version %d is current", number)
        self._pinned.pop(number, None)
        if loaded.version.forgets:
            self._drop_pinned()
        # Running calls hold the version they began with; it goes when the last of them ends.
        self._current, self._fault = replace(loaded, generation=self._generation), None
        self._sound.set()
        self._on_serving()
        self._on_sound(True)
        self._on_swap(time.monotonic() - now)
        return loaded.version

    def _before(self) -> int | None:
        """Return the number of the current version, None if none can be told."""
        try:
            return self._store.current()
        except DamagedError:
            return None

    def _make_whole(self, number: int) -> None:
        """See that all files of a version are there and sound, ``model.onnx`` among them.

        Raises:
            NotFoundError, StateError, DamagedError: as ``Store.verify``.
        """
        version = self._verified(number)
        if version.state is VersionState.WHOLE and not self._store.has_onnx(number):
            self._store.rebuild_onnx(number)


@contextmanager
def _put_off(what: str) -> Iterator[None]:
    """Log what cannot be done now: the next call does it."""
    try:
        yield
    except (OSError, InfloraError) as error:
        log.warning("%s: %s", what, error)


def _may_stand_in(version: Version) -> bool:
    """Whether a version may answer in place of a damaged current one that was made from it."""
    return not version.state.stripped and bool(version.classes) and not version.candidate
