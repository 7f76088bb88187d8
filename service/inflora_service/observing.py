"""Around every call of ours: its id, its duration, and what became of it."""

from __future__ import annotations

import asyncio
import inspect
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any, cast

import grpc

from inflora_core import logs
from inflora_service.errors import REQUEST_ID, Context, Handler
from inflora_service.metrics import OTHER, Meter, Recorder

_ACCEPTABLE = re.compile(r"[!-~]{1,128}")
"""Ids that are taken over: what can stand in metadata, and in a log."""

_SENT: ContextVar[str] = ContextVar("request-id", default="")
"""The id that a client has sent with the present call. It goes back with the call's end: not so one
that was made here, but where the call fails (``errors``), for it would take time of every call."""

_NAMES = {code.value[0]: code.name for code in grpc.StatusCode}


class ObservingInterceptor(grpc.aio.ServerInterceptor):
    """Counts and measures calls, and has what is logged of them say so. The first of all.

    Args:
        recorder: Counts.
        methods: All that there are, ``/service/method``: others are counted as one.
    """

    def __init__(self, recorder: Recorder, methods: Collection[str]) -> None:
        self._recorder = recorder
        self._methods = frozenset(methods)
        self._observed: dict[str, tuple[Handler, Handler]] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Return the handler of the call, observed."""
        method = handler_call_details.method
        ours = method in self._methods
        if ours:
            # The call has this coroutine's context for itself, and whatever it starts inherits it.
            sent = _sent_id(handler_call_details)
            _SENT.set(sent)
            logs.note(request_id=sent or secrets.token_hex(8))
        handler = await continuation(handler_call_details)
        if handler is None or method.startswith("/grpc."):
            return handler  # health and reflection: probes would be most of what is counted
        known, observed = self._observed.get(method, (None, None))
        if known is handler and observed is not None:
            return observed
        service, _, name = method[1:].rpartition("/") if ours else (OTHER, "", OTHER)
        observed = _observed(handler, self._recorder.meter(service, name))
        if ours:
            self._observed[method] = handler, observed
        return observed


def _sent_id(details: grpc.HandlerCallDetails) -> str:
    for key, value in details.invocation_metadata:
        if key == REQUEST_ID and isinstance(value, str) and _ACCEPTABLE.fullmatch(value):
            return value
    return ""


def _observed(handler: Any, meter: Meter) -> Handler:
    kinds = [
        "stream" if streams else "unary"
        for streams in (handler.request_streaming, handler.response_streaming)
    ]
    kind = "_".join(kinds)
    observe = _observe_stream if handler.response_streaming else _observe_unary
    observed: Handler = getattr(grpc, f"{kind}_rpc_method_handler")(
        observe(getattr(handler, kind), meter),
        handler.request_deserializer,
        handler.response_serializer,
    )
    return observed


def _observe_unary(
    behaviour: Callable[..., Awaitable[Any]], meter: Meter
) -> Callable[[Any, Context], Awaitable[Any]]:
    async def answer(request: Any, context: Context) -> Any:
        began, code = meter.begin(), "OK"
        _give_id_back(context)
        call = behaviour(request, context)
        del request  # see ``errors._abort_with``
        try:
            return await call
        except BaseException as error:
            code = _code(error, context)
            raise
        finally:
            meter.end(began, code)

    return answer


def _observe_stream(
    behaviour: Callable[..., Any], meter: Meter
) -> Callable[[Any, Context], AsyncIterator[Any]]:
    async def answers(request: Any, context: Context) -> AsyncIterator[Any]:
        began, code = meter.begin(), "OK"
        _give_id_back(context)
        responses = behaviour(request, context)
        del request
        try:
            if inspect.isawaitable(responses):
                await responses  # of a method that there is not
                return
            async with aclosing(responses):
                async for response in responses:
                    yield response
        except BaseException as error:
            code = _code(error, context)
            raise
        finally:
            meter.end(began, code)

    return answers


def _give_id_back(context: Context) -> None:
    if sent := _SENT.get():
        context.set_trailing_metadata(((REQUEST_ID, sent),))


def _code(error: BaseException, context: Context) -> str:
    """Return the name of the status with which a call ends that raises ``error``."""
    if isinstance(error, grpc.aio.AbortError):
        return _NAMES.get(_number(context.code()), "UNKNOWN")
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        left = cast(float | None, context.time_remaining())  # the stubs forget the None
        return "DEADLINE_EXCEEDED" if left is not None and left <= 0 else "CANCELLED"
    return "UNKNOWN"


def _number(code: Any) -> int:
    return code.value[0] if isinstance(code, grpc.StatusCode) else int(code)
