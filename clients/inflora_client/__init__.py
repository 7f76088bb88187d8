"""Client of an InfLoRA server: ``Client`` for ordinary code, ``AsyncClient`` for asyncio.

>>> from inflora_client import Client, Example
>>> with Client("localhost:50051") as client:  # doctest: +SKIP
...     task = client.learn([Example("cat1.jpg", "cat"), Example("dog1.jpg", "dog")], epochs=5)
...     client.wait(task)
...     client.predict(["unknown.jpg"]).predictions[0].label
"""

from inflora_client._async import AsyncClient
from inflora_client._channel import RetryPolicy
from inflora_client._images import Example, ImageSource
from inflora_client._names import TaskRef, VersionRef
from inflora_client._sync import Client
from inflora_client._upload import LearnOptions
from inflora_client.errors import (
    AlreadyExistsError,
    CallCancelledError,
    ConnectionFailedError,
    CorruptDownloadError,
    DataLossError,
    DeadlineExceededError,
    FailedPreconditionError,
    InfloraClientError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    OutOfRangeError,
    ResourceExhaustedError,
    StatusError,
    TaskFailedError,
    UnavailableError,
)
from inflora_client.resources import (
    Artifact,
    ClassScore,
    ClassUpdate,
    Download,
    Failure,
    FieldViolation,
    Forget,
    LayerReport,
    LearningSettings,
    ParityReport,
    Prediction,
    PredictResult,
    StageSeconds,
    Task,
    TaskClass,
    TaskKind,
    TaskReport,
    TaskStage,
    TaskState,
    Version,
    VersionClass,
)

__all__ = [
    "AlreadyExistsError",
    "Artifact",
    "AsyncClient",
    "CallCancelledError",
    "ClassScore",
    "ClassUpdate",
    "Client",
    "ConnectionFailedError",
    "CorruptDownloadError",
    "DataLossError",
    "DeadlineExceededError",
    "Download",
    "Example",
    "FailedPreconditionError",
    "Failure",
    "FieldViolation",
    "Forget",
    "ImageSource",
    "InfloraClientError",
    "InternalError",
    "InvalidArgumentError",
    "LayerReport",
    "LearnOptions",
    "LearningSettings",
    "NotFoundError",
    "OutOfRangeError",
    "ParityReport",
    "PredictResult",
    "Prediction",
    "ResourceExhaustedError",
    "RetryPolicy",
    "StageSeconds",
    "StatusError",
    "Task",
    "TaskClass",
    "TaskFailedError",
    "TaskKind",
    "TaskRef",
    "TaskReport",
    "TaskStage",
    "TaskState",
    "UnavailableError",
    "Version",
    "VersionClass",
    "VersionRef",
]
