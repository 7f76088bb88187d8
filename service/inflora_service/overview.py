"""What a store has learned, and what that cost: plain data for pictures and tables.

Console and report show the same, so both begin here. Nothing is measured for it: it is what tasks'
reports say, and what evaluations have found.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, Literal

from inflora_core.errors import DamagedError, NotFoundError
from inflora_core.model import HeldOut, TaskReport
from inflora_core.store import Store
from inflora_service.evaluations import Evaluations
from inflora_service.lineage import Lineage, Step
from inflora_service.records import Score

log = logging.getLogger(__name__)

SHOWN_LABELS = 3
"""Classes that a task is called by; more are counted."""


class Source(StrEnum):
    """What an accuracy was measured on."""

    EVALUATED = "images of an evaluation"
    HELD_OUT = "images held out when it was learned"
    LEAVE_ONE_OUT = "its own images, each left out in turn"


_SOURCES = {HeldOut.HELD_OUT: Source.HELD_OUT, HeldOut.LEAVE_ONE_OUT: Source.LEAVE_ONE_OUT}


@dataclass(frozen=True)
class Cell:
    """An accuracy of one task's images, all classes of a version competing.

    Attributes:
        accuracy: Share of right answers.
        images: How many images there were.
        source: What they were.
        version: Number of the version that answered.
        time: When that was.
    """

    accuracy: float
    images: int
    source: Source
    version: int
    time: datetime


@dataclass(frozen=True)
class Lesson:
    """A task that was learned.

    Attributes:
        position: Its place among those that the version has learned, from 1.
        task: Its id.
        version: Number of the version that came of it.
        labels: Of the classes that it taught first.
        create_time: When it was learned.
        report: What came of it.
        forgotten: Whether it taught classes first, and all of them are forgotten.
    """

    position: int
    task: str
    version: int
    labels: tuple[str, ...]
    create_time: datetime
    report: TaskReport
    forgotten: bool = False

    @property
    def title(self) -> str:
        """What it is called where there is little room."""
        return titled(self.labels, forgotten=self.forgotten)

    @property
    def free(self) -> tuple[float, ...]:
        """Free share of each layer's dimensions, after it."""
        return tuple(layer.free_after / layer.dimension for layer in self.report.layers)

    @property
    def canary_loss(self) -> float | None:
        """Accuracy that canary images of old classes have lost by it; None if not measured."""
        return next((check.value for check in self.report.checks if check.name == "canary"), None)


@dataclass(frozen=True)
class Fared:
    """What became of a task since it was learned.

    Attributes:
        lesson: The task.
        best: The best accuracy before the newest one; None if there is only one.
        now: The newest accuracy; None if there is none.
    """

    lesson: Lesson
    best: Cell | None
    now: Cell | None

    @property
    def lost(self) -> float | None:
        """Accuracy lost from ``best`` to ``now``, below 0 if won; None if that cannot be told."""
        if self.best is None or self.now is None:
            return None
        return self.best.accuracy - self.now.accuracy


@dataclass(frozen=True)
class Node:
    """A version among all others.

    Attributes:
        step: What is told of it.
        status: What there is to say of it beyond that; "" for nothing.
        answering: Whether it answers calls that name no version.
        pinned: Whether it is kept however old it is.
        gone: Whether its data were deleted.
    """

    step: Step
    status: Literal["", "current", "stands in", "held back", "retired", "purged"]
    answering: bool
    pinned: bool
    gone: bool


@dataclass(frozen=True)
class Overview:
    """What a store has learned, as of one version.

    Attributes:
        version: The version; None before the first.
        classes: How many classes it knows.
        lessons: What it has learned, oldest first.
        cells: Accuracies, by the positions of the task that was learned last and of the images'.
        nodes: All versions, oldest first.
    """

    version: int | None
    classes: int
    lessons: tuple[Lesson, ...]
    cells: Mapping[tuple[int, int], Cell]
    nodes: tuple[Node, ...]

    @property
    def fared(self) -> tuple[Fared, ...]:
        """What became of each task."""
        return tuple(self._fared(lesson) for lesson in self.lessons)

    @property
    def measurable(self) -> int:
        """How many tasks have classes left, or never had any of their own."""
        return sum(not lesson.forgotten for lesson in self.lessons)

    @property
    def mean_accuracy(self) -> tuple[float, int] | None:
        """Mean accuracy of the tasks that were measured after the last one, and how many were."""
        last = len(self.lessons)
        found = [cell.accuracy for (after, _), cell in self.cells.items() if after == last]
        return (sum(found) / len(found), len(found)) if found else None

    @property
    def mean_lost(self) -> tuple[float, int] | None:
        """Mean of what tasks have lost, and of how many that is known."""
        found = [each.lost for each in self.fared if each.lost is not None]
        return (sum(found) / len(found), len(found)) if found else None

    def _fared(self, lesson: Lesson) -> Fared:
        line = [
            self.cells[after, lesson.position]
            for after in range(lesson.position, len(self.lessons) + 1)
            if (after, lesson.position) in self.cells
        ]
        if len(line) < 2:
            return Fared(lesson, None, line[0] if line else None)
        # Of the same kind of images, where there are any: others are harder or easier.
        alike = [cell for cell in line[:-1] if cell.source is line[-1].source]
        return Fared(lesson, max(alike or line[:-1], key=lambda cell: cell.accuracy), line[-1])


def titled(labels: Sequence[str], *, forgotten: bool = False) -> str:
    """Return what a task is called.

    Args:
        labels: Of the classes that it taught first, without forgotten ones.
        forgotten: Whether it taught some, and all of them are forgotten.
    """
    if not labels:
        return "forgotten classes" if forgotten else "known classes"
    more = len(labels) - SHOWN_LABELS
    if more <= 1:
        return ", ".join(labels)
    return f"{', '.join(labels[:SHOWN_LABELS])} and {more} more"


def finite(content: Any) -> Any:
    """Return plain data with None for what is no number: JSON has no word for it."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, dict):
        return {name: finite(value) for name, value in content.items()}
    return [finite(each) for each in content] if isinstance(content, list | tuple) else content


def overview(
    store: Store,
    lineage: Lineage,
    evaluations: Evaluations,
    answering: int | None,
    *,
    stands_in: bool = False,
) -> Overview:
    """Return what a store has learned. Reads the disk.

    Args:
        store: The versions.
        lineage: Which came of which.
        evaluations: What evaluations have found.
        answering: Number of the version that answers; None for none.
        stands_in: Whether it does so in place of the current one.

    Raises:
        InfloraError: a version that it came of, or the list of forgotten classes, cannot be read.
        OSError: the store cannot be read.
    """
    steps = lineage.of(answering) if answering is not None else []
    learned = [step for step in steps if step.report is not None]
    lessons = tuple(
        Lesson(
            *(position, step.task, step.number, step.labels, step.create_time, step.report),
            step.forgotten,
        )
        for position, step in enumerate(learned, 1)
        if step.report is not None
    )
    scores = evaluations.of({step.number for step in steps})
    return Overview(
        answering,
        steps[-1].classes if steps else 0,
        lessons,
        _cells(steps, lessons, scores),
        tuple(_nodes(store, lineage, answering, stands_in)),
    )


def _cells(
    steps: Sequence[Step], lessons: Sequence[Lesson], scores: Mapping[tuple[int, str], Score]
) -> dict[tuple[int, int], Cell]:
    # What nobody can be right about any more was not lost by learning.
    left = [lesson for lesson in lessons if not lesson.forgotten]
    positions = {lesson.task: lesson.position for lesson in left}
    cells = {}
    for lesson in left:
        report = lesson.report
        source = _SOURCES.get(report.held_out_method)
        if report.held_out_accuracy is not None and source is not None:
            cells[lesson.position, lesson.position] = Cell(
                report.held_out_accuracy,
                sum(report.held_out_counts.values()),
                source,
                lesson.version,
                lesson.create_time,
            )
    after = 0
    for step in steps:
        # Versions that only changed the class table stand with what was learned before them.
        after += step.report is not None
        for task, position in positions.items():
            if (score := scores.get((step.number, task))) is not None:
                cells[after, position] = Cell(
                    score.accuracy, score.images, Source.EVALUATED, step.number, score.time
                )
    return cells


def _nodes(store: Store, lineage: Lineage, answering: int | None, stands_in: bool) -> list[Node]:
    pinned, retired = store.marked()
    nodes = []
    for number in store.numbers():
        try:
            step = lineage.step(number)
        except (DamagedError, NotFoundError) as error:
            log.warning("version %d is not shown: %s", number, error)
            continue
        answers = number == answering
        nodes.append(
            Node(
                step,
                _status(step, answers, stands_in, number in retired),
                answers,
                number in pinned,
                step.purged or number in retired,
            )
        )
    return nodes


def _status(
    step: Step, answers: bool, stands_in: bool, retired: bool
) -> Literal["", "current", "stands in", "held back", "retired", "purged"]:
    if answers:
        return "stands in" if stands_in else "current"
    if step.purged:
        return "purged"
    if retired:
        return "retired"
    return "held back" if step.candidate else ""
