"""How a channel is set up: retries, limits, keepalive. The same for both clients."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from inflora.v1.evaluator_service_pb2_grpc import EvaluatorServiceStub
from inflora.v1.learner_service_pb2_grpc import LearnerServiceStub
from inflora.v1.model_service_pb2_grpc import ModelServiceStub
from inflora.v1.predictor_service_pb2_grpc import PredictorServiceStub
from inflora_client._access import Metadata

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
_MAX_SERVICE_CONFIG_ATTEMPTS = 5  # gRPC treats any higher number as 5
_LISTS_OF_SERVERS = ("dns:", "ipv4:", "ipv6:")
_MIN_BACKOFF = 0.01  # a pause that rounds to 0 ms makes gRPC wait for the deadline, not retry


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long to go on while the server is UNAVAILABLE, or drops calls because it stops.

    Unary calls are retried by gRPC itself, through the channel's service config. A broken
    ``watch`` or ``download`` goes on where it was, and so does ``learn`` where it can; ``evaluate``
    uploads again.

    Attributes:
        max_attempts: Attempts in all, 1 (no retry) to 5.
        initial_backoff: Pause after the first failure, in seconds, at least 0.01.
        multiplier: Each further pause is longer by this factor, at least 1.
        max_backoff: Upper bound of a pause, in seconds, at least 0.01.
        patience: A ``watch``, ``download`` or upload that was under way keeps trying for this many
            seconds of silence, however many attempts that takes: long enough for a restart.
    """

    max_attempts: int = 5
    initial_backoff: float = 0.1
    multiplier: float = 3.0
    max_backoff: float = 5.0
    patience: float = 60.0

    def __post_init__(self) -> None:
        if not 1 <= self.max_attempts <= _MAX_SERVICE_CONFIG_ATTEMPTS:
            raise ValueError(f"max_attempts must be 1 to {_MAX_SERVICE_CONFIG_ATTEMPTS}")
        # Written so that NaN, of which no comparison is true, is refused, too.
        if not (
            self.initial_backoff >= _MIN_BACKOFF
            and self.max_backoff >= _MIN_BACKOFF
            and self.multiplier >= 1
            and self.patience >= 0
        ):
            raise ValueError(
                f"backoffs must be at least {_MIN_BACKOFF} s, multiplier 1, patience 0 s"
            )


@dataclass(frozen=True, slots=True)
class Rpc:
    """One method of the contract.

    Attributes:
        service: Full name of the service.
        method: Name of the method.
    """

    service: str
    method: str


_LEARNER = "inflora.v1.LearnerService"
_PREDICTOR = "inflora.v1.PredictorService"
_EVALUATOR = "inflora.v1.EvaluatorService"
_MODEL = "inflora.v1.ModelService"

LEARN_TASK = Rpc(_LEARNER, "LearnTask")
QUERY_UPLOAD = Rpc(_LEARNER, "QueryUpload")
FORGET_CLASSES = Rpc(_LEARNER, "ForgetClasses")
UPDATE_CLASS = Rpc(_LEARNER, "UpdateClass")
WATCH_TASK = Rpc(_LEARNER, "WatchTask")
GET_TASK = Rpc(_LEARNER, "GetTask")
LIST_TASKS = Rpc(_LEARNER, "ListTasks")
CANCEL_TASK = Rpc(_LEARNER, "CancelTask")
RETRY_TASK = Rpc(_LEARNER, "RetryTask")
PREDICT = Rpc(_PREDICTOR, "Predict")
PREDICT_STREAM = Rpc(_PREDICTOR, "PredictStream")
EVALUATE = Rpc(_EVALUATOR, "Evaluate")
LIST_VERSIONS = Rpc(_MODEL, "ListVersions")
GET_VERSION = Rpc(_MODEL, "GetVersion")
PROMOTE_VERSION = Rpc(_MODEL, "PromoteVersion")
PIN_VERSION = Rpc(_MODEL, "PinVersion")
UNPIN_VERSION = Rpc(_MODEL, "UnpinVersion")
DOWNLOAD_ARTIFACT = Rpc(_MODEL, "DownloadArtifact")

_RETRYABLE = ("UNAVAILABLE", "CANCELLED")
"""What a server says that stops: UNAVAILABLE to calls that it refuses; and a call that has reached
it and was not taken up yet when it stopped has its stream reset, which gRPC reads as CANCELLED
(grpc/grpc#41785). A call that its own client cancels is over, and not retried."""

# The streams are not here: gRPC could only restart them from their beginning.
_RETRIED_BY_GRPC = (
    QUERY_UPLOAD,
    FORGET_CLASSES,
    UPDATE_CLASS,
    GET_TASK,
    LIST_TASKS,
    CANCEL_TASK,
    PREDICT,
    LIST_VERSIONS,
    GET_VERSION,
    PROMOTE_VERSION,
    PIN_VERSION,
    UNPIN_VERSION,
)

# Generated code carries no types; these stubs work with grpc and with grpc.aio channels alike.
_STUBS: dict[str, Callable[[Any], Any]] = {
    _LEARNER: LearnerServiceStub,
    _PREDICTOR: PredictorServiceStub,
    _EVALUATOR: EvaluatorServiceStub,
    _MODEL: ModelServiceStub,
}


class Stubs:
    """The contract's methods over one channel, looked up by ``Rpc``.

    Args:
        channel: Of grpc or of grpc.aio.
        metadata: Makes what is sent with each call.
    """

    def __init__(self, channel: object, metadata: Callable[[], Metadata] | None = None) -> None:
        self._stubs = {service: stub(channel) for service, stub in _STUBS.items()}
        self._metadata = metadata

    def __getitem__(self, rpc: Rpc) -> Method:
        return Method(getattr(self._stubs[rpc.service], rpc.method), self._metadata)


class Method:
    """A method that sends metadata with its calls.

    Args:
        method: As generated code makes it.
        metadata: Makes what is sent.
    """

    def __init__(self, method: Any, metadata: Callable[[], Metadata] | None) -> None:
        self._method = method
        self._metadata = metadata

    def __call__(self, request: object, **options: Any) -> Any:
        """Make a call."""
        return self._method(request, **self._sent(options))

    def future(self, request: object, **options: Any) -> Any:
        """Make a call without waiting for its end; not with grpc.aio."""
        return self._method.future(request, **self._sent(options))

    def _sent(self, options: dict[str, Any]) -> dict[str, Any]:
        return options | {"metadata": self._metadata()} if self._metadata else options


def channel_options(retry: RetryPolicy, target: str) -> list[tuple[str, Any]]:
    """Return the channel arguments.

    Args:
        retry: How long to go on while the server is UNAVAILABLE.
        target: What the channel is opened to; see ``is_balanced``.
    """
    options: list[tuple[str, Any]] = [
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        # A call that outgrows this buffer (by default 256 KiB, less than one photo) is not retried.
        ("grpc.per_rpc_retry_buffer_size", MAX_MESSAGE_BYTES),
        # By default a failed connection is left alone for a second, so most retries would be lost.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 5_000),
        # By default a name is looked up at most every 30 s, longer than all attempts take: when
        # servers are replaced, those that came meanwhile would not be found in time.
        ("grpc.dns_min_time_between_resolutions_ms", 1_000),
        # A watch may be silent for long. Servers at their defaults hang up on those who ping more
        # often than every 300 s, and common load balancers on those silent for 350 s.
        ("grpc.keepalive_time_ms", 320_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.max_pings_without_data", 0),
    ]
    if config := _service_config(retry, is_balanced(target)):
        options.append(("grpc.service_config", json.dumps(config)))
    return options


def is_balanced(target: str) -> bool:
    """Whether calls take turns between all addresses of a target.

    They do where it names its resolver: ``dns:///predictors:50051``, which is how a headless
    service of Kubernetes is to be asked, ``ipv4:10.0.0.1:50051,10.0.0.2:50051``. A plain
    ``host:port`` is one server, however many addresses its name has.
    """
    return target.startswith(_LISTS_OF_SERVERS)


def _service_config(retry: RetryPolicy, balanced: bool) -> dict[str, Any]:
    config: dict[str, Any] = {}
    if balanced:
        config["loadBalancingConfig"] = [{"round_robin": {}}]
    if retry.max_attempts > 1:
        config["methodConfig"] = [
            {
                "name": [
                    {"service": rpc.service, "method": rpc.method} for rpc in _RETRIED_BY_GRPC
                ],
                "retryPolicy": {
                    "maxAttempts": retry.max_attempts,
                    "initialBackoff": f"{retry.initial_backoff:.9f}s",
                    "maxBackoff": f"{retry.max_backoff:.9f}s",
                    "backoffMultiplier": retry.multiplier,
                    "retryableStatusCodes": _RETRYABLE,
                },
            }
        ]
    return config
