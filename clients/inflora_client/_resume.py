"""Streams that go on where they were after a break: a watched task, a download, an upload.

A ``Resumable`` holds what has arrived and says what to ask for next. It does no input or output
on the network, so both clients drive it, each with a loop of its own kind.
"""

from __future__ import annotations

import errno
import hashlib
import os
import random
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Generic, Self, TypeVar

from google.protobuf.message import Message

from inflora.v1 import learner_service_pb2, model_service_pb2
from inflora_client import _channel as channel
from inflora_client import _parse as parse
from inflora_client.errors import (
    ConnectionFailedError,
    CorruptDownloadError,
    FailedPreconditionError,
    StatusError,
    UnavailableError,
    error_of_task,
)
from inflora_client.resources import Artifact, Download, Failure, Task, TaskState

T = TypeVar("T")


class Backoff:
    """How long to pause after each failure, and when to give up.

    Args:
        policy: The numbers.
    """

    def __init__(self, policy: channel.RetryPolicy) -> None:
        self._policy = policy
        self._failures = 0
        self._heard_at: float | None = None

    def heard(self) -> None:
        """The server answered: the counting starts again, and patience applies from now on."""
        self._failures = 0
        self._heard_at = time.monotonic()

    def delay_after(self, error: StatusError) -> float:
        """Return the seconds to pause before the next attempt.

        Raises:
            StatusError: The error itself, when there should be no further attempt.
        """
        policy = self._policy
        self._failures += 1
        patient = self._heard_at is not None and time.monotonic() - self._heard_at < policy.patience
        if self._failures >= policy.max_attempts and not patient:
            raise error
        # Bounded before the power, which overflows after some hundred failures.
        exponent = min(self._failures - 1, 32)
        delay = min(policy.initial_backoff * policy.multiplier**exponent, policy.max_backoff)
        # Clients that lost one server together must not come back together.
        return delay * random.uniform(0.8, 1.2)


class UploadRetry:
    """How often an upload that breaks off is tried again, and from which example.

    Args:
        policy: When to give up.

    Attributes:
        start: How many examples the server has.
    """

    UNDER_WAY = 2
    """Messages, after which a connection is known to work: gRPC takes the next one only once the
    last is on its way."""

    def __init__(self, policy: channel.RetryPolicy) -> None:
        self._backoff = Backoff(policy)
        self._fresh = True
        self.start = 0

    def delay_after(self, error: StatusError, sent: int = 0) -> float:
        """Return the seconds to pause before the next attempt.

        Args:
            error: What ended the last one.
            sent: Messages it sent.

        Raises:
            StatusError: The error itself, when there should be no further attempt.
        """
        lost = isinstance(error, ConnectionFailedError) and sent > self.UNDER_WAY
        if lost and self._fresh:
            # Only once, until more arrives: patience with one that never gets further must end.
            self._backoff.heard()
            self._fresh = False
        return self._backoff.delay_after(error)

    def go_on_from(self, count: int) -> None:
        """Note how many examples the server has now."""
        if count > self.start:
            self._backoff.heard()
            self._fresh = True
        self.start = count


def breaks_off(error: StatusError) -> bool:
    """Whether an upload that ended so may be continued, or sent again."""
    return isinstance(error, UnavailableError) or (
        isinstance(error, FailedPreconditionError)
        and any(violation.field == "spec.resume_from" for violation in error.field_violations)
    )


class Resumable(ABC, Generic[T]):
    """A server stream and what has arrived of it.

    Args:
        policy: When to give up.
    """

    rpc: ClassVar[channel.Rpc]

    def __init__(self, policy: channel.RetryPolicy) -> None:
        self._backoff = Backoff(policy)

    @property
    @abstractmethod
    def complete(self) -> bool:
        """Whether all has arrived."""

    @abstractmethod
    def request(self) -> Message:
        """What to ask for now."""

    @abstractmethod
    def _take(self, response: Any) -> T | None:
        """Take one response in; return what is new in it."""

    def accept(self, response: Any) -> T | None:
        """Take one response in; return what is new in it."""
        self._backoff.heard()
        return self._take(response)

    def end_of_stream(self) -> None:
        """Note that the stream ended without an error.

        Raises:
            UnavailableError: It ended too early, which a server that stops may do.
        """
        if not self.complete:
            raise UnavailableError(Failure("UNAVAILABLE", "the server ended the stream early"))

    def delay_after(self, error: UnavailableError) -> float:
        """As ``Backoff.delay_after``."""
        return self._backoff.delay_after(error)


class Watch(Resumable[Task]):
    """Follows one task to its end.

    Args:
        name: The task's full name.
        policy: When to give up.
    """

    rpc = channel.WATCH_TASK

    def __init__(self, name: str, policy: channel.RetryPolicy) -> None:
        super().__init__(policy)
        self._name = name
        self._latest: Task | None = None

    @property
    def complete(self) -> bool:
        """Whether the task has ended."""
        return self._latest is not None and self._latest.ended

    def request(self) -> Message:
        """Every stream starts with the task as it is, so there is nothing to go on from."""
        return learner_service_pb2.WatchTaskRequest(name=self._name)

    def result(self) -> Task:
        """Return the task once the watch is complete.

        Raises:
            TaskFailedError: It ended in another way than by being published.
        """
        if self._latest is None:
            raise ValueError("the watch has not seen its task yet")
        if self._latest.state != TaskState.PUBLISHED:
            raise error_of_task(self._latest)
        return self._latest

    def _take(self, response: Any) -> Task | None:
        task = parse.task(response.task)
        if task == self._latest:  # the first message after a break may tell nothing new
            return None
        self._latest = task
        return task


class Transfer(Resumable[None]):
    """Writes an artifact to a temporary file beside its destination, which it replaces at the end.

    Used as a context manager; what is not finished is removed.

    Args:
        version: The version's full name.
        artifact: File name of the artifact.
        held: SHA-256 of files that a delta may lead from.
        to: Destination: a file, or an existing directory, where the artifact keeps its name.
        policy: When to give up.

    Raises:
        ValueError: The artifact's name is none.
    """

    rpc = channel.DOWNLOAD_ARTIFACT

    def __init__(
        self,
        version: str,
        artifact: str,
        held: Sequence[str],
        to: Path,
        policy: channel.RetryPolicy,
    ) -> None:
        super().__init__(policy)
        self._version = version
        self._artifact_name = artifact
        self._held = tuple(held)
        name = Path(artifact).name
        if name in ("", ".."):
            raise ValueError(f"{artifact!r} is no name of a file")
        # Never a name that the server gives: it must not say where we write.
        self._path = _replaceable(to / name if to.is_dir() else to)
        self._part = self._path.with_name(f".{self._path.name}.{uuid.uuid4().hex}.part")
        self._file = self._part.open("xb")
        self._hash = hashlib.sha256()
        self._received = 0
        self._artifact: Artifact | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()
        self._part.unlink(missing_ok=True)

    @property
    def complete(self) -> bool:
        """Whether as many bytes have arrived as were announced."""
        return self._artifact is not None and self._received >= self._artifact.size

    def request(self) -> Message:
        """Ask for the bytes from where the last stream broke off."""
        return model_service_pb2.DownloadArtifactRequest(
            name=self._version,
            artifact=self._artifact_name,
            offset=self._received,
            held=self._held,
        )

    def _take(self, response: Any) -> None:
        if response.HasField("artifact"):
            announced = parse.artifact(response.artifact)
            if self._artifact not in (None, announced):
                raise CorruptDownloadError(f"{announced.name} changed on the server meanwhile")
            self._artifact = announced
            # What was asked for as "current" may be another version after a break.
            self._version = response.version
        if self._artifact is None:
            raise CorruptDownloadError("the server did not announce the file's size and hash")
        if response.offset != self._received:
            raise CorruptDownloadError(
                f"byte {self._received} of {self._artifact.name} should have come next, "
                f"but the server sent byte {response.offset}"
            )
        self._file.write(response.data)
        self._hash.update(response.data)
        self._received += len(response.data)

    def finish(self) -> Download:
        """Verify the file and move it to its destination.

        Raises:
            CorruptDownloadError: The content is not what the server announced.
        """
        if self._artifact is None:
            raise CorruptDownloadError("the server sent nothing")
        found = Artifact(self._artifact.name, self._received, self._hash.hexdigest())
        if found != self._artifact:
            raise CorruptDownloadError(
                f"{found.name} arrived with {found.size} bytes and SHA-256 {found.sha256}, but "
                f"the server announced {self._artifact.size} and {self._artifact.sha256}"
            )
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._part.replace(self._path)
        return Download(self._path, self._version, found)


def _replaceable(path: Path) -> Path:
    """Return which file is to be replaced: a link leads to it, and stays.

    Raises:
        OSError: something else is there, such as a device, which whoever may would replace, too.
    """
    found = path.resolve() if path.is_symlink() else path
    if found.exists() and not found.is_file():
        raise OSError(errno.EINVAL, "is no file that could be replaced", str(path))
    return found
