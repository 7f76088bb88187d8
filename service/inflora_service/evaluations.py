"""What evaluations have found, task by task: figures alone, of none of their images."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence

from inflora_core.errors import InfloraError
from inflora_core.evaluation import TaskFigures
from inflora_core.model import now
from inflora_service.records import Score, TaskRecords

log = logging.getLogger(__name__)

VERSIONS = 200
"""Versions that were evaluated last, whose figures are kept."""


class Evaluations:
    """The figures of the newest evaluation of every task by every version. Safe for many threads.

    Those of a version while it answered are kept beside those of when it did not.

    Args:
        records: Where they outlive the server; None in one that follows another, and has none.

    Attributes:
        revision: Another number whenever there is something new.
    """

    def __init__(self, records: TaskRecords | None = None) -> None:
        self._records = records
        self._scores: OrderedDict[tuple[int, str, bool], Score] = OrderedDict()
        self._changing = threading.Lock()
        self.revision = 0
        try:
            self._take(records.scores() if records is not None else ())
        except InfloraError as error:
            log.warning("what evaluations had found is lost: %s", error)

    def add(self, version: int, figures: Sequence[TaskFigures], answering: bool) -> None:
        """Keep how the tasks fared. Blocks; what the disk does not take lasts until the end.

        Args:
            version: Number of the version that was measured.
            figures: Of each task that had images.
            answering: Whether it answers calls that name none.
        """
        at = now()
        scores = [
            Score(version, each.task, each.images, each.accuracy, answering, at) for each in figures
        ]
        self._take(scores)
        if self._records is not None and scores:
            try:
                self._records.keep_scores(scores, VERSIONS)
            except InfloraError as error:
                log.warning("what an evaluation found is not written down: %s", error)

    def of(self, versions: Collection[int]) -> dict[tuple[int, str], Score]:
        """Return what is known of some versions, by version and task."""
        with self._changing:
            return {
                (each.version, each.task): each
                for each in self._scores.values()
                if each.version in versions
            }

    def newest(self) -> dict[str, float]:
        """Return the accuracy of each task by the version that answered when it was measured."""
        with self._changing:
            return {each.task: each.accuracy for each in self._scores.values() if each.answering}

    def _take(self, scores: Sequence[Score]) -> None:
        with self._changing:
            for each in scores:
                key = each.version, each.task, each.answering
                self._scores[key] = each
                self._scores.move_to_end(key)
            newest_first = dict.fromkeys(version for version, *_ in reversed(self._scores))
            gone = set(list(newest_first)[VERSIONS:])
            for key in [key for key in self._scores if key[0] in gone]:
                del self._scores[key]
            self.revision += 1
