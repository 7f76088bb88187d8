"""Every unary call, as data: which method, which request, how to read the answer.

The clients only carry these over their kind of channel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from google.protobuf.message import Message

from inflora.v1 import learner_service_pb2, model_service_pb2, predictor_service_pb2
from inflora_client import _channel as channel
from inflora_client import _parse as parse
from inflora_client._names import Names, TaskRef, VersionRef, new_request_id, normalised
from inflora_client.resources import PredictResult, Task, Version

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """A unary call that is ready to be made.

    Attributes:
        rpc: The method.
        request: Its request.
        parse: Turns the response into what the caller gets.
    """

    rpc: channel.Rpc
    request: Message
    parse: Callable[[Any], T]


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """One page of a list; ``next_token`` is empty on the last one."""

    items: tuple[T, ...]
    next_token: str


PageCall = Callable[[str], Call[Page[T]]]
"""Makes the call for the page that a token stands for."""


def get_task(names: Names, task: TaskRef) -> Call[Task]:
    """GetTask."""
    request = learner_service_pb2.GetTaskRequest(name=names.task(task))
    return Call(channel.GET_TASK, request, lambda r: parse.task(r.task))


@dataclass(frozen=True, slots=True)
class Uploaded:
    """How far an upload has come.

    Attributes:
        count: Examples that the server has for good.
        task: Name of the task that came of it; empty if none did.
    """

    count: int
    task: str


def query_upload(names: Names, request_id: str) -> Call[Uploaded]:
    """QueryUpload."""
    request = learner_service_pb2.QueryUploadRequest(parent=names.model, request_id=request_id)
    return Call(channel.QUERY_UPLOAD, request, lambda r: Uploaded(r.example_count, r.task))


def cancel_task(names: Names, task: TaskRef) -> Call[Task]:
    """CancelTask."""
    request = learner_service_pb2.CancelTaskRequest(name=names.task(task))
    return Call(channel.CANCEL_TASK, request, lambda r: parse.task(r.task))


def retry_task(names: Names, task: TaskRef) -> Call[Task]:
    """RetryTask."""
    request = learner_service_pb2.RetryTaskRequest(name=names.task(task))
    return Call(channel.RETRY_TASK, request, lambda r: parse.task(r.task))


def _labels(labels: str | Iterable[str]) -> list[str]:
    """A single label is no list of its letters."""
    return [normalised(label) for label in ([labels] if isinstance(labels, str) else labels)]


def forget_classes(
    names: Names, labels: str | Iterable[str], purge: bool, request_id: str
) -> Call[Task]:
    """ForgetClasses."""
    request = learner_service_pb2.ForgetClassesRequest(
        parent=names.model,
        labels=_labels(labels),
        purge=purge,
        request_id=request_id or new_request_id(),
    )
    return Call(channel.FORGET_CLASSES, request, lambda r: parse.task(r.task))


def update_class(
    names: Names,
    label: str,
    new_label: str | None,
    add_aliases: str | Iterable[str],
    remove_aliases: str | Iterable[str],
    request_id: str,
) -> Call[Task]:
    """UpdateClass."""
    request = learner_service_pb2.UpdateClassRequest(
        parent=names.model,
        label=normalised(label),
        new_label=None if new_label is None else normalised(new_label),
        add_aliases=_labels(add_aliases),
        remove_aliases=_labels(remove_aliases),
        request_id=request_id or new_request_id(),
    )
    return Call(channel.UPDATE_CLASS, request, lambda r: parse.task(r.task))


def list_tasks(names: Names) -> PageCall[Task]:
    """ListTasks, page by page."""
    return lambda token: Call(
        channel.LIST_TASKS,
        learner_service_pb2.ListTasksRequest(parent=names.model, page_token=token),
        lambda r: Page(tuple(map(parse.task, r.tasks)), r.next_page_token),
    )


def get_version(names: Names, version: VersionRef) -> Call[Version]:
    """GetVersion."""
    request = model_service_pb2.GetVersionRequest(name=names.version(version))
    return Call(channel.GET_VERSION, request, lambda r: parse.version(r.version))


def promote_version(names: Names, version: VersionRef, force: bool) -> Call[Version]:
    """PromoteVersion."""
    name = names.version(version)
    request = model_service_pb2.PromoteVersionRequest(name=name, force=force)
    return Call(channel.PROMOTE_VERSION, request, lambda r: parse.version(r.version))


def pin_version(names: Names, version: VersionRef) -> Call[Version]:
    """PinVersion."""
    request = model_service_pb2.PinVersionRequest(name=names.version(version))
    return Call(channel.PIN_VERSION, request, lambda r: parse.version(r.version))


def unpin_version(names: Names, version: VersionRef) -> Call[Version]:
    """UnpinVersion."""
    request = model_service_pb2.UnpinVersionRequest(name=names.version(version))
    return Call(channel.UNPIN_VERSION, request, lambda r: parse.version(r.version))


def list_versions(names: Names) -> PageCall[Version]:
    """ListVersions, page by page."""
    return lambda token: Call(
        channel.LIST_VERSIONS,
        model_service_pb2.ListVersionsRequest(parent=names.model, page_token=token),
        lambda r: Page(tuple(map(parse.version, r.versions)), r.next_page_token),
    )


@dataclass(frozen=True, slots=True)
class Question:
    """All of a prediction but the images.

    Attributes:
        names: The model's names.
        top_k: Classes to return for each image.
        version: The version to answer; None for the current one.
        task: The task whose classes compete; None for all.
        return_embedding: Whether predictions have embeddings.
    """

    names: Names
    top_k: int
    version: VersionRef | None
    task: TaskRef | None
    return_embedding: bool

    def request(self, images: Iterable[bytes]) -> predictor_service_pb2.PredictRequest:
        """The request for some images."""
        return predictor_service_pb2.PredictRequest(
            model=self.names.model,
            images=images,
            top_k=self.top_k,
            version="" if self.version is None else self.names.version(self.version),
            task="" if self.task is None else self.names.task(self.task),
            return_embedding=self.return_embedding,
        )

    def call(self, images: Iterable[bytes]) -> Call[PredictResult]:
        """Predict."""
        return Call(channel.PREDICT, self.request(images), parse.predict_result)

    def stream_request(self, images: Iterable[bytes]) -> predictor_service_pb2.PredictStreamRequest:
        """One request of PredictStream. Answers come in order, so none needs a correlation id."""
        return predictor_service_pb2.PredictStreamRequest(request=self.request(images))
