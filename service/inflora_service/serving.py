"""Loaded versions, and predictions with them. Swapping versions never touches a running call."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from inflora_core import allocator
from inflora_core.config import Limits
from inflora_core.errors import (
    DamagedError,
    InfloraError,
    InvalidInputError,
    LimitExceededError,
    StateError,
)
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
from inflora_core.store import ONNX_FILE, Store
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


class Host:
    """Holds the version that answers and a few others, and predicts with them.

    Whoever decides which version answers, sets it: ``ModelHost`` where versions are made,
    ``FollowingHost`` where they are followed.

    Args:
        store: Where versions are.
        options: How onnxruntime runs them.
        limits: What images are refused.
        on_serving: Told once a version can answer.
        on_swap: Told the seconds that it took to have another version answer.
        on_run: As for ``Batcher``.
    """

    def __init__(
        self,
        store: Store,
        options: RuntimeOptions,
        limits: Limits,
        *,
        on_serving: Callable[[], None] = lambda: None,
        on_swap: Callable[[float], None] = lambda seconds: None,
        on_run: Callable[[int, int, float], None] = lambda images, bulk, seconds: None,
    ) -> None:
        self._store = store
        self._options = options
        self._limits = limits
        self._on_serving = on_serving
        self._on_swap = on_swap
        self._current: Loaded | None = None
        self._fault: DamagedError | None = None
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

    def is_fresh(self, loaded: Loaded) -> bool:
        """Whether no class was forgotten since the version was read."""
        return loaded.generation == self._generation

    def is_current(self, number: int) -> bool:
        """Whether version ``number`` answers calls that name none."""
        return self._current is not None and self._current.version.number == number

    @property
    def answering_now(self) -> Loaded | None:
        """What answers calls that name no version: the current one, or what stands in for it."""
        return self._current

    @property
    def waiting_images(self) -> int:
        """Images of predictions without an answer."""
        return self._batcher.waiting

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

    # The file as it is read, too: it stays as long as the version, and was a tenth of all memory.
    @allocator.apart()
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

    def _drop_pinned(self) -> None:
        """Let go of versions that were, or are being, loaded with classes forgotten since."""
        self._pinned.clear()
        self._generation += 1

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
