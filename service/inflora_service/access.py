"""Who is calling, and whether they may: one table of roles, applied to every call.

``AccessInterceptor`` comes before all handlers. What carries a token, or has to, is refused before
any of its messages is read.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import grpc

from inflora_core.errors import (
    InfloraError,
    InvalidInputError,
    LimitExceededError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from inflora_service.errors import Context, Handler
from inflora_service.principals import (
    Principal,
    Principals,
    Role,
    certificate_names,
    token_digest,
)
from inflora_service.quotas import Account, Accounts
from inflora_service.reloading import Watched

log = logging.getLogger(__name__)

_LEARNER: dict[str, Role | None] = {
    "LearnTask": "learn",
    "QueryUpload": "learn",
    "ForgetClasses": "admin",  # for good, and with purge of all versions
    "UpdateClass": "learn",
    "WatchTask": "learn",
    "GetTask": "learn",
    "ListTasks": "learn",
    "CancelTask": "learn",
    "RetryTask": "learn",
}
_PREDICTOR: dict[str, Role | None] = {"Predict": "predict", "PredictStream": "predict"}
_EVALUATOR: dict[str, Role | None] = {"Evaluate": "predict"}
_MODEL: dict[str, Role | None] = {
    "ListVersions": "predict",
    "GetVersion": "predict",
    "PromoteVersion": "admin",
    "PinVersion": "admin",
    "UnpinVersion": "admin",
    "DownloadArtifact": "predict",  # model.onnx; the handler asks for more where it is another file
}
_OIP: dict[str, Role | None] = dict.fromkeys(
    ("ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer"),
    "predict",
)
_REFLECTION: dict[str, Role | None] = {"ServerReflectionInfo": "predict"}
_HEALTH: dict[str, Role | None] = dict.fromkeys(("Check", "List", "Watch"))

RULES: dict[str, Role | None] = {
    f"/{service}/{method}": role
    for service, methods in {
        "inflora.v1.LearnerService": _LEARNER,
        "inflora.v1.PredictorService": _PREDICTOR,
        "inflora.v1.EvaluatorService": _EVALUATOR,
        "inflora.v1.ModelService": _MODEL,
        "inference.GRPCInferenceService": _OIP,
        "grpc.reflection.v1alpha.ServerReflection": _REFLECTION,
        "grpc.health.v1.Health": _HEALTH,
    }.items()
    for method, role in methods.items()
}
"""The role that each rpc needs, None for anybody. What is not here is refused, whoever asks."""

CONSOLE: dict[str, Role] = {"/console/state": "predict", "/console/predict": "predict"}
"""The role that each question of the console needs; it is told of tasks as ``RULES`` has it."""

_HEALTH_WATCH = "/grpc.health.v1.Health/Watch"
MOST_HEALTH_WATCHES = 100
_MOST_HEALTH_CHECKS = 16
_MOST_OPEN_TO_ALL = {_HEALTH_WATCH: MOST_HEALTH_WATCHES}
"""Calls at a time that nobody is asked who they are; ``_MOST_HEALTH_CHECKS`` of others."""

_KINDS = ("unary", "stream")
"""Anybody may have one, and they last."""

_PREDICT_STREAM = "/inflora.v1.PredictorService/PredictStream"
"""Each of its requests counts as a call."""

ANYBODY = Principal.model_construct(name="", role="admin")
"""Who calls a server that asks nobody who they are."""

_SCHEME = "bearer"
_LOG_SECONDS = 1.0


@dataclass
class Call:
    """A call that was let in.

    Attributes:
        method: Full name of the rpc.
        role: What it needs.
        principal: Who calls; None until their certificate is looked at.
        account: What they use.
        known: All who may call, when this was last looked at.
        digest: sha256 of the token; None if the certificate counts.
        certificate: Names in the certificate, if it counts.
        counted: Whether it counts as running.
        charged: Whether it does in the account.
    """

    method: str
    role: Role
    principal: Principal | None
    account: Account | None
    known: Principals | None
    digest: bytes | None = None
    certificate: frozenset[str] = frozenset()
    counted: bool = False
    charged: bool = False


_CALL: ContextVar[Call] = ContextVar("call")
"""Has no default: what asks outside of a call must not be taken for anybody."""


def principal() -> Principal:
    """Return who makes the call that is being answered.

    Raises:
        LookupError: none is.
    """
    found = _CALL.get().principal
    if found is None:
        raise LookupError("nobody has looked yet at who calls")
    return found


def require(role: Role, message: str) -> None:
    """Refuse the call that is being answered unless its caller has a role.

    Raises:
        PermissionDeniedError: it does not; with ``message``.
    """
    if not principal().may(role):
        raise PermissionDeniedError(message)


def caller(context: Context) -> str:
    """Return who makes a call, as records and the audit log have it.

    That is ``name@address`` of a principal, and the address alone where nobody is asked.
    """
    name = principal().name
    return f"{name}@{context.peer()}" if name else context.peer()


def name_of(who: str) -> str:
    """Return the principal's name in what ``caller`` returned, "" if there was none."""
    name, separator, _ = who.partition("@")
    return name if separator else ""


class Access:
    """Decides on calls.

    Args:
        principals: Who may call; None lets in anybody.
        certificates: Whether callers have certificates that gRPC has verified.
        max_calls: Most calls at a time.
    """

    def __init__(
        self, principals: Watched[Principals] | None, *, certificates: bool, max_calls: int
    ) -> None:
        self._principals = principals
        self._certificates = certificates
        self._max_calls = max_calls
        self._accounts = Accounts()
        self._running = 0
        self._open_to_all = Counter[str]()
        self._refusals = _Seldom()

    @property
    def asks_certificates(self) -> bool:
        """Whether certificates say who calls, which are known only once a call is handled."""
        return self._certificates and self._principals is not None

    def queued_tasks(self, who: str) -> int | None:
        """Return how many tasks a caller may have in the queue, None for any number."""
        name = name_of(who)
        if not name or self._principals is None:
            return None
        entries = self._principals.value.entries
        return next((each.quota.queued_tasks for each in entries if each.name == name), None)

    def admit(self, method: str, role: Role, metadata: Any) -> Call:
        """Let a call in by what came with it before its messages, as far as that is enough.

        It counts as running from now on, until ``end``.

        Raises:
            UnauthenticatedError: there is no token, or nobody's.
            PermissionDeniedError: whoever it is may not do that.
            QuotaExceededError: they have done too much, or do.
            LimitExceededError: too many calls are running.
        """
        if self._principals is None:
            call = Call(method, role, ANYBODY, None, None)
        else:
            known = self._principals.value
            call = Call(method, role, None, None, known, digest=_digest(metadata))
            if call.digest is not None:
                self._enter(call)
            elif not self._certificates:
                raise UnauthenticatedError(
                    "say who you are: send a token as the metadata 'authorization: Bearer TOKEN'",
                    field="authorization",
                )
        if self._running >= self._max_calls:
            self.end(call)
            raise LimitExceededError(
                f"{self._max_calls} calls are under way, and the server takes no more at a time",
                retry_seconds=1.0,
            )
        self._running += 1
        call.counted = True
        return call

    def admit_anybody(self, method: str) -> None:
        """Let in a call that anybody may make, until ``end_anybody``, before its message is read.

        Raises:
            LimitExceededError: too many of these are open.
        """
        most = _MOST_OPEN_TO_ALL.get(method, _MOST_HEALTH_CHECKS)
        if self._open_to_all[method] >= most:
            raise LimitExceededError(f"{most} of these are open already", retry_seconds=1.0)
        self._open_to_all[method] += 1

    def end_anybody(self, method: str) -> None:
        """Count such a call as open no more."""
        self._open_to_all[method] -= 1

    def look_at_certificate(self, call: Call, context: Context) -> None:
        """Let a call in by its certificate, if that has to say who calls.

        Raises:
            InfloraError: as ``admit`` does.
        """
        if call.principal is None:
            call.certificate = certificate_names(context.auth_context())
            self._enter(call)

    def end(self, call: Call) -> None:
        """Count a call as running no more. Again does no harm."""
        if call.counted:
            self._running -= 1
        if call.charged and call.account is not None:
            call.account.end()
        call.counted = call.charged = False

    def still(self, call: Call) -> None:
        """See that who may call when a message comes is who might when the call began.

        Raises:
            UnauthenticatedError, PermissionDeniedError: they may not any more.
        """
        if self._principals is not None and call.known is not self._principals.value:
            known = self._principals.value
            call.principal = self._identify(call, known)  # or raises, again at every message
            call.known = known

    def refused(self, method: str, error: InfloraError) -> None:
        """Log that a call was refused; not each where there are many."""
        if isinstance(error, UnauthenticatedError | PermissionDeniedError):
            self._refusals.warn(f"refused {method}: {error.message}")

    def _enter(self, call: Call) -> None:
        assert call.known is not None, "somebody has to be known"
        call.principal = self._identify(call, call.known)
        call.account = self._accounts.of(call.principal)
        call.account.call()
        call.account.begin()
        call.charged = True

    def _identify(self, call: Call, known: Principals) -> Principal:
        if call.digest is not None:
            found = known.by_digest(call.digest)
            if found is None:
                raise UnauthenticatedError("nobody has this token", field="authorization")
        else:
            found = known.by_certificate(call.certificate)
            if found is None:
                names = ", ".join(map(ascii, sorted(call.certificate))) or "no names"
                raise UnauthenticatedError(
                    f"nobody has this certificate, or more than one ({names}), and there is no "
                    "token"
                )
        if not found.may(call.role):
            raise PermissionDeniedError(
                f"{found.name} has the role {found.role!r}, but this needs {call.role!r}"
            )
        return found


class AccessInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls, or lets them in and counts them. Below ``ErrorInterceptor``.

    Args:
        access: Decides.
    """

    def __init__(self, access: Access) -> None:
        self._access = access
        self._counted: dict[str, Handler] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Return the handler of a call, counted; raise why there is none for it."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        try:
            if method not in RULES:
                raise PermissionDeniedError("there is no rule for this rpc: nobody may call it")
            role = RULES[method]
            if role is not None:
                metadata = handler_call_details.invocation_metadata
                call = self._access.admit(method, role, metadata)
                _CALL.set(call)
                _at_the_end(lambda: self._access.end(call))
            else:
                self._access.admit_anybody(method)
                _at_the_end(lambda: self._access.end_anybody(method))
        except InfloraError as error:
            self._access.refused(method, error)
            raise
        if method not in self._counted:
            self._counted[method] = self._counting(method, handler)
        return self._counted[method]

    def _counting(self, method: str, handler: Any) -> Handler:
        if RULES[method] is None:
            uncounted: Handler = handler
            return uncounted
        streams = [handler.request_streaming, handler.response_streaming]
        receive: Callable[[Call, Any], Awaitable[Any]]
        behaviour = getattr(handler, f"{_KINDS[streams[0]]}_{_KINDS[streams[1]]}")
        if handler.request_streaming:
            receive = self._requests
        elif self._access.asks_certificates:
            # gRPC reads the one request before it calls a handler, which is the first to see a
            # certificate: anybody who has one could have any number of large ones be read.
            streams[0], receive = True, self._only_request
        else:
            receive = self._request
        wrap = self._stream if handler.response_streaming else self._unary
        kind = f"{_KINDS[streams[0]]}_{_KINDS[streams[1]]}"
        counted: Handler = getattr(grpc, f"{kind}_rpc_method_handler")(
            wrap(behaviour, receive), handler.request_deserializer, handler.response_serializer
        )
        return counted

    def _unary(
        self, behaviour: Callable[..., Any], receive: Callable[[Call, Any], Awaitable[Any]]
    ) -> Callable[[Any, Context], Awaitable[Any]]:
        async def answer(request: Any, context: Context) -> Any:
            with self._begun(context) as call:
                response = await behaviour(await receive(call, request), context)
                if call.account is not None:
                    call.account.charge(response.ByteSize())
            return response

        return answer

    def _stream(
        self, behaviour: Callable[..., Any], receive: Callable[[Call, Any], Awaitable[Any]]
    ) -> Callable[[Any, Context], AsyncIterator[Any]]:
        async def answers(request: Any, context: Context) -> AsyncIterator[Any]:
            with self._begun(context) as call:
                received = await receive(call, request)
                async with contextlib.aclosing(behaviour(received, context)) as responses:
                    async for response in responses:
                        self._access.still(call)
                        if call.account is not None:
                            await call.account.pace(response.ByteSize())
                        yield response

        return answers

    @contextlib.contextmanager
    def _begun(self, context: Context) -> Iterator[Call]:
        """Look at who calls, where that has not been done, and count the call to its end."""
        call = _CALL.get()  # of intercept_service, which comes before in the same task
        try:
            try:
                self._access.look_at_certificate(call, context)
            except InfloraError as error:
                self._access.refused(call.method, error)
                raise
            yield call
        finally:
            # Before the caller is told of the end, who may be at their limit and call again.
            self._access.end(call)

    async def _only_request(self, call: Call, requests: AsyncIterator[Any]) -> Any:
        async for request in requests:
            return await self._request(call, request)
        raise InvalidInputError("the call has no message")

    async def _request(self, call: Call, request: Any) -> Any:
        if call.account is not None:
            call.account.take(request.ByteSize())
        return request

    async def _requests(self, call: Call, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        return _Requests(self._access, call, requests)


class _Requests(AsyncIterator[Any]):
    """The requests of a stream, each looked at and counted as it comes."""

    def __init__(self, access: Access, call: Call, requests: AsyncIterator[Any]) -> None:
        self._access = access
        self._call = call
        self._requests = requests

    async def __anext__(self) -> Any:
        request = await anext(self._requests)
        self._access.still(self._call)
        if self._call.account is not None:
            as_call = self._call.method == _PREDICT_STREAM
            await self._call.account.pace(request.ByteSize(), as_call=as_call)
        return request


def _at_the_end(do: Callable[[], None]) -> None:
    """Do something when the call has ended, also one whose message never came."""
    task = asyncio.current_task()
    assert task is not None, "a call is a task"
    task.add_done_callback(lambda _: do())


def _digest(metadata: Any) -> bytes | None:
    """Return the sha256 of the token that came with a call, None if none did.

    Raises:
        UnauthenticatedError: there is something else in its place.
    """
    found = [value for key, value in metadata or () if key == "authorization"]
    if not found:
        return None
    scheme, _, token = str(found[0]).partition(" ")
    if len(found) > 1 or scheme.lower() != _SCHEME or not token.strip():
        raise UnauthenticatedError(
            "the metadata 'authorization' is not one 'Bearer TOKEN'", field="authorization"
        )
    return token_digest(token.strip())


class _Seldom:
    """Logs warnings, at most one in a while: whoever is refused could fill the disk with them."""

    def __init__(self) -> None:
        self._next = 0.0
        self._left_out = 0

    def warn(self, message: str) -> None:
        """Log ``message``, or only count it."""
        now = time.monotonic()
        if now < self._next:
            self._left_out += 1
            return
        more = f" (and {self._left_out} more refusals before)" if self._left_out else ""
        log.warning("%s%s", message, more)
        self._next, self._left_out = now + _LOG_SECONDS, 0
