"""One tree of errors.

``InfloraClientError`` is the base of all of them. A call that ended with a gRPC status raises the
``StatusError`` of that status; the others arise on this side of the wire. A file that cannot be
read or written raises the ``OSError`` it always raises.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import grpc
from google.rpc import code_pb2, error_details_pb2, status_pb2

from inflora_client.resources import Failure, FieldViolation, Task, TaskReport, TaskState

_DETAILS_KEY = "grpc-status-details-bin"  # the key that gRPC reserves for a google.rpc.Status


class InfloraClientError(Exception):
    """Base of every error that this package raises on purpose."""


class StatusError(InfloraClientError):
    """A call ended with a gRPC status other than OK.

    Args:
        failure: What the server, or gRPC in its place, said.
    """

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure)
        self.failure = failure

    def __str__(self) -> str:
        fields = "; ".join(
            v.field if v.description == self.message else f"{v.field}: {v.description}"
            for v in self.field_violations
        )
        return f"{self.message} ({fields})" if fields else self.message

    @property
    def code(self) -> str:
        """Name of the gRPC status, for example ``INVALID_ARGUMENT``."""
        return self.failure.code

    @property
    def message(self) -> str:
        """What is wrong, in English."""
        return self.failure.message

    @property
    def reason(self) -> str:
        """Stable identifier of the cause; empty when no InfLoRA server gave the answer."""
        return self.failure.reason

    @property
    def field_violations(self) -> tuple[FieldViolation, ...]:
        """The fields at fault, where the request was."""
        return self.failure.field_violations


class InvalidArgumentError(StatusError):
    """The request is not acceptable; ``field_violations`` says where. Do not retry."""


class NotFoundError(StatusError):
    """There is no such model, task, version, artifact, class or alias. Do not retry."""


class AlreadyExistsError(StatusError):
    """A name means a class already, or the ``request_id`` was used with other content."""


class FailedPreconditionError(StatusError):
    """The server's state does not allow it, now. Do not retry unchanged."""


class ResourceExhaustedError(StatusError):
    """Something is over its limit; where that is the queue or the disk, a later retry may help.

    Where the caller has used up its quota, ``failure.retry_seconds`` says when.
    """


class UnauthenticatedError(StatusError):
    """The server asks who is calling, and there is no token or certificate that it knows."""


class PermissionDeniedError(StatusError):
    """The server knows who is calling, and that role may not do this."""


class DeadlineExceededError(StatusError):
    """The client's ``timeout`` passed before the answer came."""


class CallCancelledError(StatusError):
    """The call was cancelled, on either side. A cancelled *task* is a ``TaskFailedError``."""


class DataLossError(StatusError):
    """A file of the version is damaged on the server. Do not retry."""


class OutOfRangeError(StatusError):
    """The offset is beyond the end of the file. Do not retry."""


class InternalError(StatusError):
    """The server has a defect. Report it with the server's log."""


class UnavailableError(StatusError):
    """The server is stopping, or not reachable, after all retries."""


class ConnectionFailedError(UnavailableError):
    """No InfLoRA server gave this answer: the connection failed, or was lost."""


class TaskFailedError(InfloraClientError):
    """The task that was waited for ended as FAILED, CANCELLED, HELD_BACK or SET_ASIDE.

    Args:
        task: The task as it ended.
    """

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.task = task

    def __str__(self) -> str:
        why = f": {self.task.error.message}" if self.task.error else ""
        return f"task {self.task.id} ended as {self.task.state}{why}"


class TaskHeldBackError(TaskFailedError):
    """The task that was waited for was learned, but its version does not answer.

    By the reason of ``task.error``: ``GATE``, the publish gate has something against it, and
    ``promote`` takes it only with ``force``; ``OVERTAKEN``, another version was promoted meanwhile.

    Args:
        task: The task as it ended.
    """

    @property
    def report(self) -> TaskReport | None:
        """What became of the task, with the checks of the gate; None if it did not learn."""
        return self.task.report


def error_of_task(task: Task) -> TaskFailedError:
    """The error of a task that ended in another way than by being published."""
    kind = TaskHeldBackError if task.state == TaskState.HELD_BACK else TaskFailedError
    return kind(task)


class InsecureTokenError(InfloraClientError):
    """The token would be sent in the clear, where others could read and use it. Use TLS."""


class CorruptDownloadError(InfloraClientError):
    """The bytes that arrived are not the file the server announced; nothing was kept."""


_BY_CODE: dict[str, type[StatusError]] = {
    "INVALID_ARGUMENT": InvalidArgumentError,
    "NOT_FOUND": NotFoundError,
    "ALREADY_EXISTS": AlreadyExistsError,
    "FAILED_PRECONDITION": FailedPreconditionError,
    "RESOURCE_EXHAUSTED": ResourceExhaustedError,
    "UNAUTHENTICATED": UnauthenticatedError,
    "PERMISSION_DENIED": PermissionDeniedError,
    "DEADLINE_EXCEEDED": DeadlineExceededError,
    "CANCELLED": CallCancelledError,
    "DATA_LOSS": DataLossError,
    "OUT_OF_RANGE": OutOfRangeError,
    "INTERNAL": InternalError,
    "UNAVAILABLE": UnavailableError,
}


def failure_of(status: status_pb2.Status) -> Failure:
    """Read a ``google.rpc.Status`` with its ``ErrorInfo``, ``BadRequest`` and ``RetryInfo``."""
    reason, retry_seconds = "", None
    violations: list[FieldViolation] = []
    info, bad_request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    for detail in status.details:
        if detail.Unpack(info):
            reason = info.reason
        elif detail.Unpack(retry):
            retry_seconds = retry.retry_delay.ToTimedelta().total_seconds()
        elif detail.Unpack(bad_request):
            violations += [
                FieldViolation(v.field, v.description) for v in bad_request.field_violations
            ]
    code = code_pb2.Code.Name(status.code) if status.code in code_pb2.Code.values() else "UNKNOWN"
    return Failure(code, status.message, reason, tuple(violations), retry_seconds)


def _is_reset(failure: Failure) -> bool:
    """Whether a server that stopped dropped a call that had arrived, and nobody had taken up yet.

    All that gRPC then has to say is the code. Of what is cancelled at this end it says more.
    """
    return failure.code == failure.message == "CANCELLED"


def error_of(failure: Failure) -> StatusError:
    """The error of the class that fits the failure's code."""
    kind = _BY_CODE.get(failure.code, StatusError)
    # Every error of ours carries an ErrorInfo, so UNAVAILABLE without one is gRPC speaking.
    if not failure.reason and (kind is UnavailableError or _is_reset(failure)):
        kind = ConnectionFailedError
    return kind(failure)


def error_of_call(error: grpc.RpcError) -> StatusError:
    """Translate what grpc and grpc.aio raise."""
    call = cast(grpc.Call, error)  # every RpcError that a call raises is one; the type hides it
    metadata = cast(Iterable[tuple[str, str | bytes]], call.trailing_metadata() or ())
    for key, value in metadata:
        if key == _DETAILS_KEY and isinstance(value, bytes):
            return error_of(failure_of(status_pb2.Status.FromString(value)))
    return error_of(Failure(call.code().name, call.details() or ""))
