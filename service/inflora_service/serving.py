"""Loaded versions, and predictions with them. Swapping versions never touches a running call."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TypeVar

from inflora_core.audit import SERVER
from inflora_core.config import Limits, Retention
from inflora_core.errors import (
    DamagedError,
    GateError,
    InfloraError,
    InvalidInputError,
    LimitExceededError,
    NotFoundError,
    OvertakenError,
    StateError,
)
from inflora_core.gate import why_held_back
from inflora_core.logs import note
from inflora_core.model import Version, VersionState
from inflora_core.predictor import (
    CPU,
    Answers,
    Floats,
    Predictor,
    RuntimeOptions,
    processors,
    top_classes,
)
from inflora_core.retention import Outdated, outdated
from inflora_core.store import ONNX_FILE, Store
from inflora_service.aio import unbroken
from inflora_service.auditing import AuditTrail
from inflora_service.batching import Batcher
from inflora_service.turns import FOREVER, Source

log = logging.getLogger(__name__)

T = TypeVar("T")

PINNED_VERSIONS = 3
"""Versions beside the current one that stay loaded when clients ask for them by number."""

GPU_RUNS = 2
"""Runs at a time where a GPU runs them one by one: the next batch is put together meanwhile."""

_LOADING_NICE = 10

DEFAULT_TOP_K = 5


@dataclass(frozen=True)
class Loaded:
    """A version that can answer: verified, loaded, and warm."""

    version: Version
    predictor: Predictor
    generation: int
    """How often classes had been forgotten when it was read."""
    since: float
    """When it was begun to be read, by ``time.monotonic``."""


@dataclass(frozen=True)
class Answer:
    """What a version says about a call's images.

    Attributes:
        version: Number of the version.
        scores: For each image (label, probability), best first.
        novelty: For each image, 0 (known) to 1 (new).
        embedding: (n, d) float32, what the backbone makes of the images.
    """

    version: int
    scores: list[list[tuple[str, float]]]
    novelty: list[float]
    embedding: Floats


class ModelHost:
    """Holds the current version and a few others, and predicts with them.

    Args:
        store: Where versions are.
        options: How onnxruntime runs them.
        limits: What images are refused.
        audit: Is told which version is current, and what is forgotten.
        on_serving: Told once a version can answer.
        on_sound: Told whether the current version is what answers, or there is none yet.
        on_swap: Told the seconds that it took to make a version current.
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
        on_swap: Callable[[float], None] = lambda seconds: None,
        on_run: Callable[[int, int, float], None] = lambda images, bulk, seconds: None,
    ) -> None:
        self._store = store
        self._options = options
        self._limits = limits
        self._audit = audit
        self._on_serving = on_serving
        self._on_sound = on_sound
        self._on_swap = on_swap
        self._current: Loaded | None = None
        self._fault: DamagedError | None = None
        self._sound = asyncio.Event()
        self._pinned: OrderedDict[int, Loaded] = OrderedDict()
        self._loading: dict[int, tuple[int, asyncio.Task[Loaded]]] = {}
        self._generation = 0
        self._settled = asyncio.Event()
        self._settled.set()
        self._swap = asyncio.Lock()
        # One at a time: a version that is being loaded takes several times the memory of its file.
        self._loader = ThreadPoolExecutor(1, "version-load", _step_back(options))
        # Threads of a GPU's runs wait for it.
        waiting = GPU_RUNS if options.tries_gpu else 0
        self._batcher = Batcher(
            limits, max(processors(), options.cpu_runs, 2) + waiting, options.cpu_runs, on_run
        )
        self._batch: int | None = None

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

    def close(self) -> None:
        """Let the threads go once they are idle."""
        self._loader.shutdown(wait=False, cancel_futures=True)
        self._batcher.close()

    @property
    def current(self) -> Version | None:
        """The current version, which is built upon; None before the first.

        Raises:
            DamagedError: there is one, but it cannot be loaded.
        """
        if self._fault is not None:
            raise self._fault
        return self._current.version if self._current else None

    @property
    def answering_now(self) -> Loaded | None:
        """What answers calls that name no version: the current one, or what stands in for it."""
        return self._current

    @property
    def waiting_images(self) -> int:
        """Images of predictions without an answer."""
        return self._batcher.waiting

    async def wait_sound(self) -> None:
        """Wait until ``current`` can be told: for good, once it can."""
        await self._sound.wait()

    def is_fresh(self, loaded: Loaded) -> bool:
        """Whether no class was forgotten since the version was read."""
        return loaded.generation == self._generation

    def is_current(self, number: int) -> bool:
        """Whether version ``number`` answers calls that name none."""
        return self._current is not None and self._current.version.number == number

    @property
    def stand_in(self) -> int | None:
        """Number of the version that answers in place of a damaged current one."""
        if self._fault is None or self._current is None:
            return None
        return self._current.version.number

    def provider(self, number: int) -> str:
        """Return the execution provider that runs version ``number``, "" if it is not loaded."""
        if self._current is not None and self.is_current(number):
            return self._current.predictor.provider
        loaded = self._pinned.get(number)
        return loaded.predictor.provider if loaded else ""

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
        return await unbroken(self._promote(number, who, force))

    async def publish(self, number: int) -> Version:
        """Make a version current that was just made from the one that is.

        Raises:
            GateError: it is a candidate.
            OvertakenError: somebody has made another version current meanwhile.
            NotFoundError, StateError, DamagedError: as ``promote``.
        """
        return await unbroken(self._publish(number))

    async def pin(self, number: int, who: str) -> Version:
        """Keep version ``number`` however old it is; return it.

        Args:
            number: The version.
            who: Who asked for it, for the audit log.

        Raises:
            NotFoundError: there is no such version.
            StateError: its data are deleted already.
        """
        return await unbroken(self._pin(number, who))

    async def unpin(self, number: int, who: str) -> Version:
        """Let version ``number`` go when it is old; return it.

        Raises:
            NotFoundError: there is no such version.
        """
        return await unbroken(self._unpin(number, who))

    async def retain(self, retention: Retention) -> None:
        """Delete of old versions what need not be kept; never of the current and of pinned ones.

        What cannot be deleted now, the next call deletes.

        Raises:
            OSError, InfloraError: the versions cannot be looked at.
        """
        await unbroken(self._retain(retention))

    async def purge(self, number: int) -> None:
        """Delete the data of all versions that know what version ``number`` forgets.

        It is made current again, should another be by now: that one may be among them.

        Raises:
            DamagedError: a file of it is damaged. Nothing is deleted.
        """
        await unbroken(self._purge(number))

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

    def _drop_pinned(self) -> None:
        """Let go of versions that were, or are being, loaded with classes forgotten since."""
        self._pinned.clear()
        self._generation += 1

    async def predict(
        self,
        images: Sequence[bytes],
        *,
        version: int | None = None,
        task: str | None = None,
        top_k: int = DEFAULT_TOP_K,
        deadline: float = FOREVER,
    ) -> Answer:
        """Classify encoded images.

        Args:
            images: At least one.
            version: Number of the version to answer; None for the current one.
            task: Only this task's classes compete; None for all.
            top_k: Classes to return for each image.
            deadline: When the answer is of no use any more, by ``time.monotonic``.

        Raises:
            InvalidInputError: there is no image, or one is not acceptable (its field is named).
            LimitExceededError: there are too many images, or too many are waiting.
            DeadlineError: it cannot be answered in time.
            StateError: no version is published, or the version does not know the task.
            NotFoundError: there is no such version.
            DamagedError: the version is damaged.
        """
        check_count(len(images), self._limits, field="images")
        loaded = await self.answering(version)
        predictor = loaded.predictor

        def finish(answers: Answers) -> Answer:
            scores = top_classes(answers, predictor.card, top_k, task)
            return Answer(
                loaded.version.number, scores, answers.novelty.tolist(), answers.embedding
            )

        return await self.classify(loaded, images, finish, deadline)

    async def answering(self, number: int | None) -> Loaded:
        """Return version ``number``, or the current one; it is usable as long as it is held.

        In place of a current one that is damaged, it is what stands in.

        Raises:
            StateError: no version is published.
            NotFoundError: there is no such version.
            DamagedError: the version is damaged.
            LimitExceededError: too many others are waiting to be loaded.
        """
        if number is not None:
            self._check_loading(number)
            return await self._get(number)
        if self._current is None:
            if self._fault is not None:
                raise self._fault
            raise StateError("no version is published yet: teach the model a task first")
        return self._current

    async def classify(
        self,
        loaded: Loaded,
        images: Sequence[Source],
        finish: Callable[[Answers], T],
        deadline: float = FOREVER,
    ) -> T:
        """Return what ``finish`` makes of the answers for images.

        Args:
            loaded: The version to answer.
            images: As many as ``check_count`` accepts.
            finish: Is called in a thread.
            deadline: When the answer is of no use any more, by ``time.monotonic``.

        Raises:
            InvalidInputError: an image is not acceptable; the first such is named, ``images[i]``.
            LimitExceededError: too many are waiting.
            DeadlineError: it cannot be answered in time.
        """
        return await self._batcher.predict(loaded.predictor, images, finish, deadline)

    async def classify_in_bulk(
        self, loaded: Loaded, pixels: Sequence[Floats], finish: Callable[[Answers], T]
    ) -> T:
        """Return what ``finish`` makes of the answers for images that can wait.

        Args:
            loaded: The version to answer.
            pixels: At least one, each (1, 3, height, width) float32, from ``loaded.predictor``.
            finish: Is called in a thread.
        """
        return await self._batcher.classify_in_bulk(loaded.predictor, pixels, finish)

    def _check_loading(self, number: int) -> None:
        """Refuse to load one more version for a caller: the next one to be promoted would wait."""
        known = self.is_current(number) or number in self._pinned or number in self._loading
        if not known and len(self._loading) >= PINNED_VERSIONS:
            raise LimitExceededError(
                f"the server is busy: {len(self._loading)} versions are waiting to be loaded: "
                "retry later",
                field="version",
            )

    async def _get(self, number: int) -> Loaded:
        """Return version ``number``, loaded now if it is not."""
        while True:
            if self._current is not None and self.is_current(number):
                return self._current
            if number in self._pinned:
                self._pinned.move_to_end(number)
                return self._pinned[number]
            if number not in self._loading:
                loading = asyncio.create_task(self._load_in_turn(number))
                self._loading[number] = self._generation, loading
                loading.add_done_callback(lambda _: self._loading.pop(number))
            generation, loading = self._loading[number]
            try:
                # Others may wait for it, too: a caller that is cancelled does not end it.
                loaded = await asyncio.shield(loading)
            except InfloraError:
                # Files that were withheld, or purged, under way make for errors that are no answer.
                await self._settled.wait()
                if generation == self._generation:
                    raise
                continue
            # Retired while it was loaded, it answers no more: the next look at it says so.
            stripped = (await asyncio.to_thread(self._store.version, number)).state.stripped
            if self.is_fresh(loaded) and not stripped:
                self._keep(loaded)
                return loaded

    def _keep(self, loaded: Loaded) -> None:
        if not self.is_current(loaded.version.number):
            self._pinned[loaded.version.number] = loaded
        while len(self._pinned) > PINNED_VERSIONS:
            self._pinned.popitem(last=False)

    async def _load_in_turn(self, number: int) -> Loaded:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._loader, self._load, number)

    def _load(self, number: int) -> Loaded:
        note(version=number)
        generation, since = self._generation, time.monotonic()
        version = self._verified(number)
        whole = version.state is VersionState.WHOLE
        # From memory where it is not kept: whoever predicts does not fill the disk.
        model = self._store.onnx(number) if whole else self._store.make_onnx(number)
        predictor = Predictor.load(model, self._options)
        if self._batch is None:
            # Once: all versions cost the same, and looking for it takes the processors.
            self._batch = predictor.best_batch()
            runs = self._options.cpu_runs if predictor.provider == CPU else GPU_RUNS
            self._batcher.take_batches(self._batch, runs)
            log.info("runs take up to %d images on %s", self._batch, predictor.provider)
        predictor.warm_up(self._batch)
        return Loaded(version, predictor, generation, since)

    def _make_whole(self, number: int) -> None:
        """See that all files of a version are there and sound, ``model.onnx`` among them.

        Raises:
            NotFoundError, StateError, DamagedError: as ``Store.verify``.
        """
        version = self._verified(number)
        if version.state is VersionState.WHOLE and not self._store.has_onnx(number):
            self._store.rebuild_onnx(number)

    def _verified(self, number: int) -> Version:
        """Return a version's manifest once all its files are sound.

        The ONNX file is derived from the others, and made again if it alone is damaged.
        """
        try:
            return self._store.verify(number)
        except DamagedError as error:
            log.warning("trying to rebuild %s of version %d: %s", ONNX_FILE, number, error)
            try:
                self._store.rebuild_onnx(number)
            except StateError:
                raise  # its files went because it was purged or retired meanwhile
            except (InfloraError, OSError) as cause:
                log.warning("version %d cannot be rebuilt: %s", number, cause)
                raise error from cause
        return self._store.verify(number)


def _step_back(options: RuntimeOptions) -> Callable[[], None]:
    """Return what makes a thread that loads versions give way to those that answer."""

    def step_back() -> None:
        with suppress(AttributeError, OSError):  # elsewhere than on Linux, threads cannot
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOADING_NICE)

    # Threads inherit it from who starts them, and cannot get rid of it: those of a session with
    # several threads, and the one that launches all runs on a GPU.
    starts_none = options.cpu_runs == options.all_threads and not options.tries_gpu
    return step_back if starts_none else lambda: None


def check_count(count: int, limits: Limits, *, field: str) -> None:
    """Refuse a call for how many images it has.

    Raises:
        InvalidInputError: it has none.
        LimitExceededError: it has too many.
    """
    if not count:
        raise InvalidInputError("send at least one image", field=field)
    if count > limits.predict_images:
        raise LimitExceededError(f"a call has at most {limits.predict_images} images", field=field)


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
