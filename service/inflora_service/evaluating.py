"""Evaluations: images are classified as they arrive, counted, and forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager

from inflora_core.config import Limits
from inflora_core.errors import InvalidInputError, LimitExceededError, StateError
from inflora_core.evaluation import Evaluation, Tally, TaskFigures
from inflora_core.predictor import Answers, Floats, processors
from inflora_service.aio import map_threads
from inflora_service.serving import Host, Loaded
from inflora_service.uploads import Example, Intake, decode_example

BATCH = 64
"""Images that are in memory, and classified, at a time."""

MOST_AT_ONCE = 8
"""Evaluations under way. Each keeps its version in memory, which may be another one for each."""

OnFigures = Callable[[int, Sequence[TaskFigures], bool], None]


class Evaluator:
    """Measures versions. What it has to do waits for predictions, never the other way round.

    Args:
        host: Holds the versions.
        limits: What is refused.
        on_figures: Told in a thread which version was measured, how its tasks fared, and whether
            it answers calls that name none.
    """

    def __init__(
        self,
        host: Host,
        limits: Limits,
        on_figures: OnFigures = lambda version, figures, answering: None,
    ) -> None:
        self._host = host
        self._limits = limits
        self._on_figures = on_figures
        # Threads of its own: in the queue of those that decode for Predict, every call would stand
        # behind a batch of 64 photos. Half of the processors, as for uploads of tasks.
        self._decoders = ThreadPoolExecutor(max(1, processors() // 2), "evaluate-decode")
        self._running = 0

    def close(self) -> None:
        """Let the threads go once they are idle; evaluations cannot go on."""
        self._decoders.shutdown(wait=False, cancel_futures=True)

    @asynccontextmanager
    async def examination(self, version: int | None) -> AsyncIterator[Examination]:
        """An examination of version ``version``; None for the one that is current now.

        Raises:
            LimitExceededError: too many are under way.
            StateError: no version is published.
            NotFoundError: there is no such version.
            DamagedError: the version is damaged.
        """
        if self._running >= MOST_AT_ONCE:
            raise LimitExceededError(
                f"{self._running} evaluations are under way already: retry when one has ended"
            )
        self._running += 1
        try:
            loaded = await self._host.answering(version)
            yield Examination(loaded, self._host, self._limits, self._decoders, self._on_figures)
        finally:
            self._running -= 1


class Examination:
    """One version and some labelled images: add them, then ask for the figures.

    Args:
        loaded: The version.
        host: Classifies.
        limits: What is refused.
        decoders: Threads that decode images.
        on_figures: As for ``Evaluator``.

    Attributes:
        version: The version's number.
    """

    def __init__(
        self,
        loaded: Loaded,
        host: Host,
        limits: Limits,
        decoders: Executor,
        on_figures: OnFigures,
    ) -> None:
        self.version = loaded.version.number
        self._loaded = loaded
        self._predictor = loaded.predictor
        self._host = host
        self._limits = limits
        self._decoders = decoders
        self._on_figures = on_figures
        self._intake = Intake(limits)
        self._tally = Tally(loaded.version.classes)
        self._unknown: set[str] = set()
        self._labels: list[str] = []
        self._pixels: list[Floats] = []

    async def add(self, examples: Sequence[Example]) -> None:
        """Check a batch, and classify what of it fills batches of ``BATCH``.

        Raises:
            InvalidInputError: a label or an image is not acceptable; its field is named.
            LimitExceededError: the evaluation is over a limit.
            StateError: classes were forgotten meanwhile.
        """
        first, at = self._intake.take(examples), 0
        while at < len(examples):
            part = examples[at : at + BATCH - len(self._pixels)]
            numbered = list(enumerate(part, first + at))
            pixels = await map_threads(self._decoders, self._prepare, numbered)
            for index, example in numbered:
                self._admit(example.label, index)
            self._labels += [example.label for example in part]
            self._pixels += pixels
            if len(self._pixels) == BATCH:
                await self._classify()
            at += len(part)

    def check_count(self, count: int) -> None:
        """Raise ``InvalidInputError`` unless ``count`` examples have arrived."""
        self._intake.check_count(count)

    async def finish(self, confusions: int, *, keep: bool) -> Evaluation:
        """Classify the rest, and return the figures.

        Args:
            confusions: How many kinds of errors to return at most.
            keep: Whether ``on_figures`` is told: what is kept tells forgetting.

        Raises:
            InvalidInputError: there were no examples.
            StateError: classes were forgotten meanwhile.
        """
        if not self._intake.count:
            raise InvalidInputError("there is nothing to measure: send examples", field="examples")
        if self._pixels:
            await self._classify()
        evaluation = await asyncio.to_thread(self._tally.evaluation, confusions)
        if keep:
            answering = self._host.is_current(self.version)
            await asyncio.to_thread(self._on_figures, self.version, evaluation.tasks, answering)
        return evaluation

    def _prepare(self, numbered: tuple[int, Example]) -> Floats:
        index, example = numbered
        return self._predictor.preprocess(decode_example(example, index, self._limits))

    def _admit(self, label: str, index: int) -> None:
        # What is known is bounded by the class table; what is not, the caller makes up.
        if not self._tally.knows(label):
            self._unknown.add(label)
            if len(self._unknown) > self._limits.task_classes:
                raise LimitExceededError(
                    f"at most {self._limits.task_classes} classes may be unknown to the version",
                    field=f"examples[{index}].label",
                )

    async def _classify(self) -> None:
        labels, pixels = self._labels, self._pixels
        self._labels, self._pixels = [], []

        def tally(answers: Answers) -> None:
            self._tally.add(labels, answers.logits, answers.probabilities, answers.novelty)

        await self._host.classify_in_bulk(self._loaded, pixels, tally)
        if not self._host.is_fresh(self._loaded):
            raise StateError("classes were forgotten meanwhile: evaluate again", field="version")
