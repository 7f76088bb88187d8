"""From ``InfloraError`` to gRPC: one table, applied to every handler by one interceptor."""

from __future__ import annotations

import contextlib
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, Never, TypeAlias

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from inflora_core import durable, errors, logs

log = logging.getLogger(__name__)

REQUEST_ID = "x-request-id"
"""Metadata with the id of a request: the client's own, or one that is made here."""

DOMAIN = "inflora"
"""``domain`` of every ``google.rpc.ErrorInfo`` of ours."""

MAX_MESSAGE_BYTES = 1024
"""A message travels twice in the trailing metadata, of which clients accept 8 KiB."""

CODES: dict[type[errors.InfloraError], grpc.StatusCode] = {
    errors.InfloraError: grpc.StatusCode.INTERNAL,
    errors.InvalidInputError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.InvalidImageError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.BrokenOffError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.UnsupportedBackboneError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.LimitExceededError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.QuotaExceededError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.UnauthenticatedError: grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDeniedError: grpc.StatusCode.PERMISSION_DENIED,
    errors.NotFoundError: grpc.StatusCode.NOT_FOUND,
    errors.ConflictError: grpc.StatusCode.ALREADY_EXISTS,
    errors.StateError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.OvertakenError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.FencedError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.OutOfRangeError: grpc.StatusCode.OUT_OF_RANGE,
    errors.UnavailableError: grpc.StatusCode.UNAVAILABLE,
    errors.CancelledError: grpc.StatusCode.CANCELLED,
    errors.DeadlineError: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.DamagedError: grpc.StatusCode.DATA_LOSS,
    errors.StoreFormatError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ParityError: grpc.StatusCode.INTERNAL,
    errors.GateError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.LearnerCrashedError: grpc.StatusCode.INTERNAL,
}
"""The one place that says which error is which status."""

# Quoted, because only the type stubs know that grpc's classes are generic.
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


def to_status(error: errors.InfloraError) -> status_pb2.Status:
    """Return ``error`` as clients see it.

    Code, message and ErrorInfo, BadRequest for a field, and RetryInfo where it is known when to ask
    again.
    """
    message = _clipped(error.message)
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)]
    status = status_pb2.Status(code=CODES[type(error)].value[0], message=message)
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=_clipped(error.field), description=message
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_seconds is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(round(error.retry_seconds * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def from_exception(error: Exception) -> errors.InfloraError:
    """Return what a client may know of ``error``; what it may not is logged under an id."""
    if isinstance(error, errors.InfloraError):
        return error
    if isinstance(error, DecodeError):
        return errors.InvalidInputError("the message cannot be decoded; is it of this contract?")
    if isinstance(error, MemoryError):
        log.error("out of memory", exc_info=error)
        return errors.LimitExceededError("the server is out of memory; retry later")
    if isinstance(error, OSError) and (shortage := durable.shortage(error)) is not None:
        log.error("%s: %s", shortage.message, error)
        return shortage
    reference = uuid.uuid4().hex[:12]
    log.error("error %s", reference, exc_info=error)
    if isinstance(error, OSError):
        return errors.UnavailableError(
            f"the server cannot use its storage; retry later (error {reference} in its log)"
        )
    return errors.InfloraError(f"internal error (error {reference} in the server's log)")


@contextlib.contextmanager
def fields_under(prefix: str, **renamed: str) -> Iterator[None]:
    """Name fields as the caller's request does.

    Args:
        prefix: Goes before every field, for example ``spec.``.
        **renamed: What the caller calls a field.

    Raises:
        InfloraError: that of the block, with its field renamed.
    """
    try:
        yield
    except errors.InfloraError as error:
        if not error.field:
            raise
        field = prefix + renamed.get(error.field, error.field)
        # Not changed in place: several calls can wait for, and get, one and the same error. Its
        # traceback would hold this context's frames, which hold the error: see ``_abort_with``.
        raise error.renamed(error.message, field) from error.with_traceback(None)


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns what handlers raise into a status with details; handlers know nothing of codes."""

    def __init__(self) -> None:
        self._guarded: dict[str, Handler] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """Return the handler of the call, guarded; or one that says what interceptors raised."""
        try:
            handler = await continuation(handler_call_details)
        except Exception as error:
            return _refusing(_status_of(error))
        if handler is None:
            return _refusing(_unknown_method())
        method = handler_call_details.method
        if method.startswith("/grpc.health."):
            return handler  # has statuses of its own
        if method not in self._guarded:
            self._guarded[method] = _guarded(handler)
        return self._guarded[method]


def _guarded(handler: Any) -> Handler:
    kinds = [
        "stream" if streams else "unary"
        for streams in (handler.request_streaming, handler.response_streaming)
    ]
    kind = "_".join(kinds)
    guard = _guard_stream if handler.response_streaming else _guard_unary
    behaviour, decode = getattr(handler, kind), handler.request_deserializer
    if not handler.request_streaming:
        # Else grpc decodes before the guard, and answers a failure with a status of its own.
        behaviour, decode = _decoding(behaviour, decode), None
    guarded: Handler = getattr(grpc, f"{kind}_rpc_method_handler")(
        guard(behaviour), decode, handler.response_serializer
    )
    return guarded


def _decoding(behaviour: Callable[..., Any], decode: Callable[[bytes], Any]) -> Callable[..., Any]:
    return lambda request, context: behaviour(decode(request), context)


def _guard_unary(behaviour: Callable[..., Any]) -> Callable[[Any, Context], Awaitable[Any]]:
    async def answer(request: Any, context: Context) -> Any:
        try:
            return await behaviour(request, context)
        except Exception as error:
            status = _status_of(error)
        del request
        return await _abort_with(context, status)

    return answer


def _guard_stream(behaviour: Callable[..., Any]) -> Callable[[Any, Context], AsyncIterator[Any]]:
    async def answers(request: Any, context: Context) -> AsyncIterator[Any]:
        try:
            # Closing runs the handler's clean-up now, not whenever it is collected.
            async with contextlib.aclosing(behaviour(request, context)) as responses:
                async for response in responses:
                    yield response
            return
        except Exception as error:
            status = _status_of(error)
        del request
        await _abort_with(context, status)

    return answers


def _status_of(error: Exception) -> status_pb2.Status:
    if isinstance(error, grpc.aio.BaseError):
        raise error  # grpc's own business, for example that the client is gone
    return to_status(from_exception(error))


async def _abort_with(context: Context, status: status_pb2.Status) -> Never:
    # Not while an error is handled, and not holding a request: grpc keeps the exception that ends
    # the call, its context and its frames until Python happens to look for cycles.
    answer = rpc_status.to_status(status)
    metadata = answer.trailing_metadata
    if (request_id := logs.noted("request_id")) is not None:
        metadata = (*metadata, (REQUEST_ID, str(request_id)))  # by which the log is to be searched
    await context.abort(answer.code, answer.details, metadata)


def _refusing(status: status_pb2.Status) -> Handler:
    """Return a handler that reads nothing of what the caller sends, whatever kind it is of."""

    async def refuse(request: object, context: Context) -> None:
        await _abort_with(context, status)

    return grpc.stream_stream_rpc_method_handler(refuse)


def _unknown_method() -> status_pb2.Status:
    status = to_status(
        errors.NotFoundError(
            "the server has no such method: it is of an older release, or has another role"
        )
    )
    status.code = grpc.StatusCode.UNIMPLEMENTED.value[0]
    return status


def _clipped(text: str) -> str:
    """Return ``text``, cut to what fits the metadata and made valid Unicode."""
    return text.encode("utf-8", "replace")[:MAX_MESSAGE_BYTES].decode("utf-8", "ignore")
