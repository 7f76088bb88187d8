"""Clients that never stop asking."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

from inflora_client import StatusError
from tests.e2e.conftest import connect
from tests.running_server import RunningServer

PACE_SECONDS = 0.01
"""Between two calls of a client: an endless loop would only slow learning down."""


@dataclass(frozen=True)
class Answer:
    """One call that was answered: by which version, and with which classes, best first."""

    version: int
    labels: tuple[str, ...]


class Predicting:
    """Predicts from threads of its own while the context lasts, and notes all that comes back.

    Attributes:
        failures: Calls that were not answered.
        by_client: The answers of each client, in order.
    """

    def __init__(self, server: RunningServer, images: Sequence[bytes], clients: int = 1) -> None:
        self.failures: list[StatusError] = []
        self.by_client: list[list[Answer]] = [[] for _ in range(clients)]
        self._server = server
        self._images = images
        self._stop = threading.Event()
        self._news = threading.Condition()
        self._threads = [
            threading.Thread(target=self._ask, args=(answers,)) for answers in self.by_client
        ]

    @property
    def count(self) -> int:
        """Number of answers so far."""
        return sum(map(len, self.by_client))

    @property
    def versions(self) -> set[int]:
        """The versions that have answered so far."""
        return {answer.version for answers in self.by_client for answer in answers}

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait until ``condition`` holds; it is looked at after every call."""
        with self._news:
            assert self._news.wait_for(condition, timeout=60), self.failures

    def wait_for_more(self, answers: int = 3) -> None:
        """Wait for that many answers to calls that begin after this."""
        expected = self.count + len(self._threads) + answers
        self.wait_until(lambda: self.count >= expected or bool(self.failures))

    def __enter__(self) -> Predicting:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, answers: list[Answer]) -> None:
        asked = 0
        with connect(self._server) as client:
            while not self._stop.is_set():
                image = self._images[asked % len(self._images)]
                asked += 1
                try:
                    result = client.predict([image], top_k=100)
                except StatusError as error:
                    self.failures.append(error)
                else:
                    number = int(result.version.rpartition("/")[2])
                    labels = tuple(score.label for score in result.predictions[0].scores)
                    answers.append(Answer(number, labels))
                with self._news:
                    self._news.notify_all()
                self._stop.wait(PACE_SECONDS)
