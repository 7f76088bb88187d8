"""A small InfLoRA server in memory: a peer that speaks the contract, and breaks when told to."""

from __future__ import annotations

import hashlib
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from inflora.v1 import evaluator_service_pb2 as evaluator
from inflora.v1 import evaluator_service_pb2_grpc as evaluator_grpc
from inflora.v1 import learner_service_pb2 as learner
from inflora.v1 import learner_service_pb2_grpc as learner_grpc
from inflora.v1 import model_service_pb2 as model
from inflora.v1 import model_service_pb2_grpc as model_grpc
from inflora.v1 import predictor_service_pb2 as predictor
from inflora.v1 import predictor_service_pb2_grpc as predictor_grpc
from inflora.v1 import task_pb2
from inflora_client import RetryPolicy

QUICK = RetryPolicy(max_attempts=3, initial_backoff=0.01, max_backoff=0.01, patience=0.0)
PAGE = 2
CHUNK = 10
RESUME = "spec.resume_from"


def status(
    code: str,
    message: str = "because",
    reason: str = "TEST",
    fields: dict[str, str] | None = None,
) -> status_pb2.Status:
    """A google.rpc.Status as the contract promises it."""
    details: list[Any] = [error_details_pb2.ErrorInfo(reason=reason, domain="inflora")]
    if fields:
        violations = [
            error_details_pb2.BadRequest.FieldViolation(field=f, description=d)
            for f, d in fields.items()
        ]
        details.append(error_details_pb2.BadRequest(field_violations=violations))
    packed = [AnyMessage() for _ in details]
    for target, detail in zip(packed, details, strict=True):
        target.Pack(detail)
    return status_pb2.Status(code=code_pb2.Code.Value(code), message=message, details=packed)


class Peer:
    """The server.

    Attributes:
        address: Where it listens.
        calls: Every request received, by method; of an upload, the list of its messages.
        failures: By method, statuses with which the next calls fail at once.
        watches: What the next watches send: tasks, or a status to break off with.
        tasks: By name.
        versions: By name.
        evaluation: What an evaluation finds; version and images are filled in.
        content: What an artifact holds.
        uploads: Examples that have arrived of uploads that are no tasks yet, by request id.
        upload_breaks: After how many batches of examples the next uploads break off.
        on_query: Called before a query of an upload is answered.
        stale_counts: What the next queries say instead of how many examples have arrived.
        lost_answers: With what the next uploads fail although they became tasks.
        breaks: After how many further bytes the next downloads break off.
        attached: Set once a watch is attached.
        upload_begun: Set once an upload has reached the server.
        upload_ended: Set once an upload has ended, whichever way.
        release: A ``Predict`` for the version 99 waits for it.
    """

    def __init__(self) -> None:
        self.calls: defaultdict[str, list[Any]] = defaultdict(list)
        self.failures: defaultdict[str, deque[status_pb2.Status]] = defaultdict(deque)
        self.watches: deque[list[task_pb2.Task | status_pb2.Status]] = deque()
        self.tasks: dict[str, task_pb2.Task] = {}
        self.versions: dict[str, model.Version] = {}
        self.evaluation = evaluator.Evaluation()
        self.content = bytes(range(256)) * 4
        self.sha256 = hashlib.sha256(self.content).hexdigest()
        self.announced_size: int | None = None
        self.skip = 0
        self.breaks: deque[int] = deque()
        self.uploads: dict[str, list[task_pb2.Example]] = {}
        self.upload_breaks: deque[int] = deque()
        self.on_query: Callable[[], object] = lambda: None
        self.stale_counts: deque[int] = deque()
        self.lost_answers: deque[status_pb2.Status] = deque()
        self.current = 0
        self.attached = threading.Event()
        self.upload_begun = threading.Event()
        self.upload_ended = threading.Event()
        self.release = threading.Event()
        self._server = grpc.server(
            ThreadPoolExecutor(8), options=[("grpc.max_receive_message_length", 64 << 20)]
        )
        learner_grpc.add_LearnerServiceServicer_to_server(Learner(self), self._server)
        predictor_grpc.add_PredictorServiceServicer_to_server(Predictor(self), self._server)
        evaluator_grpc.add_EvaluatorServiceServicer_to_server(Evaluator(self), self._server)
        model_grpc.add_ModelServiceServicer_to_server(Model(self), self._server)
        port = self._server.add_insecure_port("localhost:0")
        self.address = f"localhost:{port}"
        self._server.start()

    def stop(self) -> None:
        self.release.set()
        self._server.stop(None).wait()

    def add_task(self, task_id: str, **fields: Any) -> task_pb2.Task:
        name = f"models/default/tasks/{task_id}"
        self.tasks[name] = task_pb2.Task(name=name, **fields)
        return self.tasks[name]

    def add_version(self) -> model.Version:
        number = len(self.versions) + 1
        name = f"models/default/versions/{number}"
        self.versions[name] = model.Version(
            name=name,
            parent=f"models/default/versions/{number - 1}" if number > 1 else "",
            task=f"models/default/tasks/t{number}",
            classes=[
                model.VersionClass(label="cat", task="models/default/tasks/t1", aliases=["puss"])
            ],
            artifacts=[self.artifact()],
            provider="CPUExecutionProvider",
        )
        self.versions[name].create_time.FromSeconds(1_800_000_000 + number)
        self.promote(name)
        return self.versions[name]

    def promote(self, name: str) -> None:
        for version in self.versions.values():
            version.current = version.name == name
        self.current = int(name.rpartition("/")[2])

    def artifact(self) -> model.Artifact:
        size = len(self.content) if self.announced_size is None else self.announced_size
        return model.Artifact(name="model.onnx", size=size, sha256=self.sha256)

    def arrive(self, method: str, request: Any, context: grpc.ServicerContext) -> None:
        """Note a call, and fail it if it is to fail."""
        self.calls[method].append(request)
        if self.failures[method]:
            abort(context, self.failures[method].popleft())

    def find(self, kind: str, name: str, context: grpc.ServicerContext) -> Any:
        known: dict[str, Any] = self.tasks if kind == "task" else self.versions
        if name.endswith("/versions/current"):
            name = f"models/default/versions/{self.current}"
        if name not in known:
            abort(context, status("NOT_FOUND", f"no {kind} {name}", "NOT_FOUND"))
        return known[name]


def abort(context: grpc.ServicerContext, error: status_pb2.Status) -> None:
    if error.details:
        context.abort_with_status(rpc_status.to_status(error))
    codes = {code.value[0]: code for code in grpc.StatusCode}
    context.abort(codes[error.code], error.message)


def page(items: list[Any], token: str) -> tuple[list[Any], str]:
    start = int(token or 0)
    more = start + PAGE < len(items)
    return items[start : start + PAGE], str(start + PAGE) if more else ""


class Learner(learner_grpc.LearnerServiceServicer):
    def __init__(self, peer: Peer) -> None:
        self.peer = peer

    def LearnTask(
        self, requests: Iterator[learner.LearnTaskRequest], context: grpc.ServicerContext
    ) -> learner.LearnTaskResponse:
        context.add_callback(self.peer.upload_ended.set)
        self.peer.upload_begun.set()
        messages = [next(requests)]
        self.peer.arrive("LearnTask", messages, context)
        spec = messages[0].spec
        examples = self.peer.uploads.setdefault(spec.request_id, [])
        if spec.resume_from not in (0, len(examples)):
            message = f"{len(examples)} are there"
            abort(context, status("FAILED_PRECONDITION", message, fields={RESUME: message}))
        del examples[spec.resume_from :]
        breaks = self.peer.upload_breaks.popleft() if self.peer.upload_breaks else None
        for message in requests:
            if breaks is not None and len(messages) > breaks:
                abort(context, status("UNAVAILABLE"))
            messages.append(message)
            examples += message.examples.examples
        if messages[-1] != learner.LearnTaskRequest(
            end=learner.UploadEnd(example_count=len(examples))
        ):
            abort(context, status("INVALID_ARGUMENT", "the upload has no end"))
        del self.peer.uploads[spec.request_id]
        labels = dict.fromkeys(e.label for e in examples)
        task = self.peer.add_task(
            f"t{len(self.peer.tasks) + 1}",
            display_name=spec.display_name,
            request_id=spec.request_id,
            state=task_pb2.TASK_STATE_QUEUED,
            example_count=len(examples),
            classes=[
                task_pb2.TaskClass(label=x, example_count=sum(e.label == x for e in examples))
                for x in labels
            ],
        )
        if self.peer.lost_answers:
            abort(context, self.peer.lost_answers.popleft())
        return learner.LearnTaskResponse(task=task)

    def QueryUpload(
        self, request: learner.QueryUploadRequest, context: grpc.ServicerContext
    ) -> learner.QueryUploadResponse:
        self.peer.arrive("QueryUpload", request, context)
        self.peer.on_query()
        for task in self.peer.tasks.values():
            if task.request_id == request.request_id:
                return learner.QueryUploadResponse(task=task.name)
        if request.request_id not in self.peer.uploads:
            abort(context, status("NOT_FOUND"))
        count = len(self.peer.uploads[request.request_id])
        if self.peer.stale_counts:
            count = self.peer.stale_counts.popleft()
        return learner.QueryUploadResponse(example_count=count)

    def ForgetClasses(
        self, request: learner.ForgetClassesRequest, context: grpc.ServicerContext
    ) -> learner.ForgetClassesResponse:
        self.peer.arrive("ForgetClasses", request, context)
        task = self.peer.add_task(
            f"t{len(self.peer.tasks) + 1}",
            state=task_pb2.TASK_STATE_QUEUED,
            kind=task_pb2.TASK_KIND_FORGET,
            forget=task_pb2.Forget(labels=request.labels, purge=request.purge),
        )
        return learner.ForgetClassesResponse(task=task)

    def UpdateClass(
        self, request: learner.UpdateClassRequest, context: grpc.ServicerContext
    ) -> learner.UpdateClassResponse:
        self.peer.arrive("UpdateClass", request, context)
        change = task_pb2.ClassUpdate(
            label=request.label,
            new_label=request.new_label if request.HasField("new_label") else None,
            add_aliases=request.add_aliases,
            remove_aliases=request.remove_aliases,
        )
        task = self.peer.add_task(
            f"t{len(self.peer.tasks) + 1}",
            state=task_pb2.TASK_STATE_QUEUED,
            kind=task_pb2.TASK_KIND_UPDATE_CLASS,
            update=change,
        )
        return learner.UpdateClassResponse(task=task)

    def WatchTask(
        self, request: learner.WatchTaskRequest, context: grpc.ServicerContext
    ) -> Iterator[learner.WatchTaskResponse]:
        self.peer.arrive("WatchTask", request, context)
        if not self.peer.watches:
            yield learner.WatchTaskResponse(task=self.peer.find("task", request.name, context))
            self.peer.attached.set()
            self.peer.release.wait()
            return
        for step in self.peer.watches.popleft():
            if isinstance(step, status_pb2.Status):
                abort(context, step)
            yield learner.WatchTaskResponse(task=step)

    def GetTask(
        self, request: learner.GetTaskRequest, context: grpc.ServicerContext
    ) -> learner.GetTaskResponse:
        self.peer.arrive("GetTask", request, context)
        return learner.GetTaskResponse(task=self.peer.find("task", request.name, context))

    def ListTasks(
        self, request: learner.ListTasksRequest, context: grpc.ServicerContext
    ) -> learner.ListTasksResponse:
        self.peer.arrive("ListTasks", request, context)
        tasks, token = page([*self.peer.tasks.values()][::-1], request.page_token)
        return learner.ListTasksResponse(tasks=tasks, next_page_token=token)

    def CancelTask(
        self, request: learner.CancelTaskRequest, context: grpc.ServicerContext
    ) -> learner.CancelTaskResponse:
        self.peer.arrive("CancelTask", request, context)
        task = self.peer.find("task", request.name, context)
        task.state = task_pb2.TASK_STATE_CANCELLED
        return learner.CancelTaskResponse(task=task)

    def RetryTask(
        self, request: learner.RetryTaskRequest, context: grpc.ServicerContext
    ) -> learner.RetryTaskResponse:
        self.peer.arrive("RetryTask", request, context)
        task = self.peer.find("task", request.name, context)
        task.state = task_pb2.TASK_STATE_QUEUED
        return learner.RetryTaskResponse(task=task)


class Predictor(predictor_grpc.PredictorServiceServicer):
    """Every image shows its own content: the label is the image's text."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer

    def Predict(
        self, request: predictor.PredictRequest, context: grpc.ServicerContext
    ) -> predictor.PredictResponse:
        self.peer.arrive("Predict", request, context)
        if request.version.endswith("/99"):
            self.peer.release.wait()
        return self._answer(request)

    def PredictStream(
        self, requests: Iterator[predictor.PredictStreamRequest], context: grpc.ServicerContext
    ) -> Iterator[predictor.PredictStreamResponse]:
        for request in requests:
            self.peer.arrive("PredictStream", request, context)
            yield predictor.PredictStreamResponse(response=self._answer(request.request))

    def _answer(self, request: predictor.PredictRequest) -> predictor.PredictResponse:
        return predictor.PredictResponse(
            version=request.version or f"models/default/versions/{self.peer.current}",
            predictions=[
                predictor.Prediction(
                    scores=[
                        predictor.ClassScore(label=image[:20].decode(), probability=0.75),
                        predictor.ClassScore(label="other", probability=0.25),
                    ][: request.top_k],
                    novelty=0.25,
                    embedding=[0.5, -1.0] if request.return_embedding else (),
                )
                for image in request.images
            ],
        )


class Evaluator(evaluator_grpc.EvaluatorServiceServicer):
    def __init__(self, peer: Peer) -> None:
        self.peer = peer

    def Evaluate(
        self, requests: Iterator[evaluator.EvaluateRequest], context: grpc.ServicerContext
    ) -> evaluator.EvaluateResponse:
        messages = [next(requests)]
        self.peer.arrive("Evaluate", messages, context)
        messages += requests
        images = sum(len(message.examples.examples) for message in messages)
        end = learner.UploadEnd(example_count=images)
        if messages[-1] != evaluator.EvaluateRequest(end=end):
            abort(context, status("INVALID_ARGUMENT", "the upload has no end"))
        found = evaluator.Evaluation()
        found.CopyFrom(self.peer.evaluation)
        found.version = messages[0].spec.version or f"models/default/versions/{self.peer.current}"
        found.images = images
        return evaluator.EvaluateResponse(evaluation=found)


class Model(model_grpc.ModelServiceServicer):
    def __init__(self, peer: Peer) -> None:
        self.peer = peer

    def ListVersions(
        self, request: model.ListVersionsRequest, context: grpc.ServicerContext
    ) -> model.ListVersionsResponse:
        self.peer.arrive("ListVersions", request, context)
        versions, token = page([*self.peer.versions.values()][::-1], request.page_token)
        return model.ListVersionsResponse(versions=versions, next_page_token=token)

    def GetVersion(
        self, request: model.GetVersionRequest, context: grpc.ServicerContext
    ) -> model.GetVersionResponse:
        self.peer.arrive("GetVersion", request, context)
        return model.GetVersionResponse(version=self.peer.find("version", request.name, context))

    def PromoteVersion(
        self, request: model.PromoteVersionRequest, context: grpc.ServicerContext
    ) -> model.PromoteVersionResponse:
        self.peer.arrive("PromoteVersion", request, context)
        version = self.peer.find("version", request.name, context)
        self.peer.promote(version.name)
        return model.PromoteVersionResponse(version=version)

    def PinVersion(
        self, request: model.PinVersionRequest, context: grpc.ServicerContext
    ) -> model.PinVersionResponse:
        self.peer.arrive("PinVersion", request, context)
        version = self.peer.find("version", request.name, context)
        version.pinned = True
        return model.PinVersionResponse(version=version)

    def UnpinVersion(
        self, request: model.UnpinVersionRequest, context: grpc.ServicerContext
    ) -> model.UnpinVersionResponse:
        self.peer.arrive("UnpinVersion", request, context)
        version = self.peer.find("version", request.name, context)
        version.pinned = False
        return model.UnpinVersionResponse(version=version)

    def DownloadArtifact(
        self, request: model.DownloadArtifactRequest, context: grpc.ServicerContext
    ) -> Iterator[model.DownloadArtifactResponse]:
        self.peer.arrive("DownloadArtifact", request, context)
        version = self.peer.find("version", request.name, context)
        breaks = self.peer.breaks.popleft() if self.peer.breaks else None
        for start in range(request.offset, len(self.peer.content), CHUNK):
            if breaks is not None and start - request.offset >= breaks:
                abort(context, status("UNAVAILABLE"))
            response = model.DownloadArtifactResponse(
                data=self.peer.content[start : start + CHUNK],
                offset=start + (self.peer.skip if start > request.offset else 0),
            )
            if start == request.offset:
                response.artifact.CopyFrom(self.peer.artifact())
                response.version = version.name
            yield response
