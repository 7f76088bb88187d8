"""One tree of errors. ``inflora_service.errors`` maps each class to one gRPC status."""

from __future__ import annotations

from typing import Self


class InfloraError(Exception):
    """Base of every error this software raises on purpose.

    Args:
        message: What is wrong and, where it is known, what to do about it.
        field: The field at fault, as a path into the request (``images[3]``), or "".
        retry_seconds: When it makes sense to ask again, where that is known.
    """

    reason = "INTERNAL"

    def __init__(
        self, message: str, *, field: str = "", retry_seconds: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.retry_seconds = retry_seconds

    def __reduce__(self) -> tuple[object, ...]:
        """Keep all of it when pickled; the default would pass it by position, and lose most."""
        return _rebuild, (type(self), self.message, self.field, self.retry_seconds)

    def renamed(self, message: str, field: str) -> Self:
        """Return the same error with another message and field."""
        return type(self)(message, field=field, retry_seconds=self.retry_seconds)


def _rebuild(
    kind: type[InfloraError], message: str, field: str, retry_seconds: float | None
) -> InfloraError:
    return kind(message, field=field, retry_seconds=retry_seconds)


class InvalidInputError(InfloraError):
    """A value is not acceptable, whatever the state of the server."""

    reason = "INVALID_INPUT"


class InvalidImageError(InvalidInputError):
    """An image is damaged, of a kind that is not accepted, or too large or small."""

    reason = "INVALID_IMAGE"


class BrokenOffError(InvalidInputError):
    """An upload ended without its end, as it does when the client vanished."""

    reason = "BROKEN_OFF"


class UnsupportedBackboneError(InvalidInputError):
    """A model cannot be taught with InfLoRA; the message says why."""

    reason = "UNSUPPORTED_BACKBONE"


class LimitExceededError(InfloraError):
    """Something is over its limit, or the disk, memory or open files have run out."""

    reason = "LIMIT_EXCEEDED"


class QuotaExceededError(LimitExceededError):
    """A caller has used up its share; others are answered."""

    reason = "QUOTA_EXCEEDED"


class UnauthenticatedError(InfloraError):
    """Nobody knows who is calling: no token or certificate, or one that is not known."""

    reason = "UNAUTHENTICATED"


class PermissionDeniedError(InfloraError):
    """The caller is known, and may not do that."""

    reason = "PERMISSION_DENIED"


class NotFoundError(InfloraError):
    """There is no such model, task, version or artifact."""

    reason = "NOT_FOUND"


class ConflictError(InfloraError):
    """Something else of that name or request id exists."""

    reason = "CONFLICT"


class StateError(InfloraError):
    """The request does not fit the present state, for example no version is published yet."""

    reason = "WRONG_STATE"


class OvertakenError(StateError):
    """Another version was made current than the one that this was learned on."""

    reason = "OVERTAKEN"


class FencedError(StateError):
    """Another learner publishes to the shared store; this one may not any more."""

    reason = "FENCED"


class OutOfRangeError(InfloraError):
    """A position is beyond the end."""

    reason = "OUT_OF_RANGE"


class UnavailableError(InfloraError):
    """The server is stopping, or cannot go on for now; a retry helps."""

    reason = "UNAVAILABLE"


class CancelledError(InfloraError):
    """Work was given up on request."""

    reason = "CANCELLED"


class DeadlineError(InfloraError):
    """It cannot be done by the time that the caller gave."""

    reason = "DEADLINE"


class DamagedError(InfloraError):
    """Stored data does not have its recorded checksum, or cannot be read."""

    reason = "DAMAGED"


class StoreFormatError(InfloraError):
    """A store was written by a newer release."""

    reason = "STORE_FORMAT"


class ParityError(InfloraError):
    """The ONNX file does not give the same answers as the torch model; nothing is published."""

    reason = "PARITY"


class GateError(InfloraError):
    """The publish gate holds a version back; it is kept as a candidate."""

    reason = "GATE"


class LearnerCrashedError(InfloraError):
    """The learning worker ended while it worked on a task."""

    reason = "LEARNER_CRASHED"


ERRORS_BY_REASON: dict[str, type[InfloraError]] = {
    kind.reason: kind
    for kind in (
        InfloraError,
        InvalidInputError,
        InvalidImageError,
        BrokenOffError,
        UnsupportedBackboneError,
        LimitExceededError,
        QuotaExceededError,
        UnauthenticatedError,
        PermissionDeniedError,
        NotFoundError,
        ConflictError,
        StateError,
        OvertakenError,
        FencedError,
        OutOfRangeError,
        UnavailableError,
        CancelledError,
        DeadlineError,
        DamagedError,
        StoreFormatError,
        ParityError,
        GateError,
        LearnerCrashedError,
    )
}
"""Finds the class again from the ``reason`` that crossed a process or network boundary."""
