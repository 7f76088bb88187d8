"""Between protobuf messages and ``inflora_core.model``. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Literal, get_args

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import status_pb2

from inflora.v1 import evaluator_service_pb2 as evaluator_pb
from inflora.v1 import learner_service_pb2 as learner_pb
from inflora.v1 import model_service_pb2 as model_pb
from inflora.v1 import predictor_service_pb2 as predictor_pb
from inflora.v1 import task_pb2 as pb
from inflora_core.config import LearnConfig, Limits
from inflora_core.edits import check_form
from inflora_core.errors import (
    ERRORS_BY_REASON,
    InfloraError,
    InvalidInputError,
    LimitExceededError,
)
from inflora_core.evaluation import Calibration, Evaluation
from inflora_core.model import (
    Agreement,
    ClassUpdate,
    Edit,
    Failure,
    FileEntry,
    Forget,
    Form,
    GateCheck,
    HeldOut,
    Task,
    TaskReport,
    TaskState,
    Version,
    VersionState,
)
from inflora_service.errors import to_status
from inflora_service.names import (
    check_model,
    parse_version_or_current,
    task_name,
    version_name,
)
from inflora_service.records import Snapshot
from inflora_service.resuming import PartialUpload
from inflora_service.serving import Answer
from inflora_service.tasks import EditRequest
from inflora_service.uploads import Example, TaskRequest

_Setting = Literal["epochs", "learning_rate", "rank", "batch_size", "seed", "held_out_share"]

_HELD_OUT = {
    HeldOut.NONE: pb.HELD_OUT_METHOD_UNSPECIFIED,
    HeldOut.HELD_OUT: pb.HELD_OUT_METHOD_HELD_OUT,
    HeldOut.LEAVE_ONE_OUT: pb.HELD_OUT_METHOD_LEAVE_ONE_OUT,
}

MAX_DISPLAY_NAME = 200
MAX_REQUEST_ID = 128

MAX_CONFUSIONS = 10_000
DEFAULT_CONFUSIONS = 20

_SETTINGS: tuple[_Setting, ...] = get_args(_Setting)
"""What a spec may set: fields of ``TaskSpec`` and of ``LearnConfig`` alike."""


def receive_bytes(limits: Limits) -> int:
    """Return above which size grpc refuses a message unread, and without details.

    Twice our own limit, so that whoever is moderately over it is told so by ``check_size``.
    """
    return min(2 * limits.message_bytes, 2**31 - 1)


def check_size(message: Message, limits: Limits, *, field: str) -> None:
    """Refuse a message over its limit.

    Raises:
        LimitExceededError: it is; ``field`` is what makes it large.
    """
    if message.ByteSize() > limits.message_bytes:
        raise LimitExceededError(
            f"a message has at most {limits.message_bytes} bytes: send several smaller ones",
            field=field,
        )


def decode_spec(spec: pb.TaskSpec, config: LearnConfig) -> TaskRequest:
    """Return what ``spec`` asks for.

    Args:
        spec: As it arrived.
        config: The server's settings, which the spec's are to fit.

    Raises:
        InvalidInputError: a field is not acceptable.
        NotFoundError: there is no such model.
    """
    check_model(spec.parent, field="parent")
    _check_length(spec.display_name, MAX_DISPLAY_NAME, "display_name")
    _check_length(spec.request_id, MAX_REQUEST_ID, "request_id")
    settings: dict[str, Any] = {
        name: getattr(spec, name) for name in _SETTINGS if spec.HasField(name)
    }
    config.updated(**settings)
    if spec.resume_from < 0:
        raise InvalidInputError("it is a number of examples", field="resume_from")
    if spec.resume_from and not spec.request_id:
        raise InvalidInputError("it is needed to continue an upload", field="request_id")
    return TaskRequest(spec.display_name, spec.request_id, settings, spec.resume_from)


def decode_upload_query(request: learner_pb.QueryUploadRequest) -> str:
    """Return the request id that is asked about.

    Raises:
        InvalidInputError: a field is not acceptable.
        NotFoundError: there is no such model.
    """
    check_model(request.parent, field="parent")
    _check_length(request.request_id, MAX_REQUEST_ID, "request_id")
    if not request.request_id:
        raise InvalidInputError("say which upload is meant", field="request_id")
    return request.request_id


def encode_upload(found: PartialUpload | Task) -> learner_pb.QueryUploadResponse:
    """Return how far an upload has come as clients see it."""
    if isinstance(found, Task):
        return learner_pb.QueryUploadResponse(
            example_count=sum(found.example_counts),
            example_bytes=found.example_bytes,
            task=task_name(found.id),
        )
    response = learner_pb.QueryUploadResponse(example_count=found.count, example_bytes=found.size)
    response.expire_time.FromDatetime(found.expire_time)
    return response


@dataclass(frozen=True)
class EvaluationRequest:
    """What a client asks of an evaluation, checked.

    Attributes:
        version: Number of the version; None for the current one.
        confusions: Kinds of errors to return at most.
    """

    version: int | None
    confusions: int


def decode_evaluation_spec(spec: evaluator_pb.EvaluationSpec) -> EvaluationRequest:
    """Return what ``spec`` asks for.

    Raises:
        InvalidInputError: a field is not acceptable.
        NotFoundError: there is no such model.
    """
    check_model(spec.model, field="model")
    version = parse_version_or_current(spec.version, field="version") if spec.version else None
    if not 0 <= spec.confusions <= MAX_CONFUSIONS:
        raise InvalidInputError(
            f"it is {spec.confusions}, but 0 (for {DEFAULT_CONFUSIONS}) to {MAX_CONFUSIONS}",
            field="confusions",
        )
    return EvaluationRequest(version, spec.confusions or DEFAULT_CONFUSIONS)


def decode_forget(request: learner_pb.ForgetClassesRequest, limits: Limits) -> EditRequest:
    """Return what ``request`` asks for.

    Raises:
        InvalidInputError: a field is not acceptable.
        LimitExceededError: the message is too large.
        NotFoundError: there is no such model.
    """
    check_size(request, limits, field="labels")
    return _edit_request(request, Forget(tuple(request.labels), request.purge))


def decode_update(request: learner_pb.UpdateClassRequest, limits: Limits) -> EditRequest:
    """Return what ``request`` asks for.

    Raises:
        InvalidInputError: a field is not acceptable.
        LimitExceededError: the message is too large.
        NotFoundError: there is no such model.
    """
    check_size(request, limits, field="add_aliases")
    change = ClassUpdate(
        request.label,
        request.new_label if request.HasField("new_label") else None,
        tuple(request.add_aliases),
        tuple(request.remove_aliases),
    )
    return _edit_request(request, change)


def _edit_request(
    request: learner_pb.ForgetClassesRequest | learner_pb.UpdateClassRequest, edit: Edit
) -> EditRequest:
    check_model(request.parent, field="parent")
    _check_length(request.request_id, MAX_REQUEST_ID, "request_id")
    check_form(edit)
    return EditRequest(request.request_id, edit)


def _check_length(text: str, limit: int, field: str) -> None:
    if len(text) > limit:
        raise InvalidInputError(f"it has at most {limit} characters", field=field)


def decode_examples(batch: pb.ExampleBatch) -> list[Example]:
    """Return the examples of a batch."""
    return [Example(example.image, example.label) for example in batch.examples]


def encode_task(snapshot: Snapshot, *, report: bool = True) -> pb.Task:
    """Return a task as clients see it.

    Args:
        snapshot: The task.
        report: Whether to include its report.
    """
    task = snapshot.task
    held_out = task.report.held_out_counts if task.report else {}
    message = pb.Task(
        name=task_name(task.id),
        display_name=task.display_name,
        request_id=task.request_id,
        state=pb.TaskState.Value(f"TASK_STATE_{task.state}"),
        classes=[
            pb.TaskClass(label=label, example_count=count, held_out_count=held_out.get(label, 0))
            for label, count in zip(task.labels, task.example_counts, strict=True)
        ],
        example_count=sum(task.example_counts),
        example_bytes=task.example_bytes,
        version=_version(task.version),
        error=_failure(task.failure) if task.failure else None,
        create_time=_timestamp(task.create_time),
        start_time=_timestamp(task.start_time) if task.start_time else None,
        end_time=_timestamp(task.end_time) if task.end_time else None,
        report=_report(task.report) if task.report and report else None,
        kind=pb.TaskKind.Value(f"TASK_KIND_{task.kind}"),
    )
    match task.edit:
        case Forget():
            message.forget.CopyFrom(pb.Forget(**asdict(task.edit)))
        case ClassUpdate():
            message.update.CopyFrom(pb.ClassUpdate(**asdict(task.edit)))
    if task.report:
        losses = task.report.epoch_losses
        message.epoch = message.epochs = len(losses)
        message.loss = losses[-1] if losses else 0.0
    elif progress := snapshot.progress:
        message.epoch, message.epochs = progress.epoch, progress.epochs
        message.loss = progress.loss
        message.fraction_done = progress.fraction
        if task.state is TaskState.LEARNING:
            message.stage = pb.TaskStage.Value(f"TASK_STAGE_{progress.stage}")
    if task.state in (TaskState.PUBLISHED, TaskState.HELD_BACK):
        message.fraction_done = 1.0
    return message


def encode_version(
    version: Version,
    artifacts: Iterable[FileEntry],
    forms: Iterable[Form],
    *,
    current: bool,
    provider: str,
    stand_in: bool = False,
) -> model_pb.Version:
    """Return a version as clients see it.

    Args:
        version: Its manifest.
        artifacts: Its files that are handed out.
        forms: Smaller forms of ``model.onnx`` that are, too.
        current: Whether it answers calls that name no version.
        provider: What runs it, "" when it is not loaded.
        stand_in: Whether it answers in place of the current version, which is damaged.
    """
    return model_pb.Version(
        name=version_name(version.number),
        parent=_version(version.parent),
        task=task_name(version.task),
        create_time=_timestamp(version.create_time),
        current=current,
        classes=[
            model_pb.VersionClass(
                label=entry.label, task=task_name(entry.task), aliases=entry.aliases
            )
            for entry in version.classes
        ],
        artifacts=[
            *(encode_artifact(entry) for entry in artifacts),
            *(encode_artifact(form.file, form.agreement) for form in forms),
        ],
        provider=provider,
        purged=version.state is VersionState.PURGED,
        pinned=version.pinned,
        retired=version.state is VersionState.RETIRED,
        stand_in=stand_in,
        candidate=version.candidate,
        failed_checks=_checks(version.report.failed_checks) if version.report else (),
    )


def encode_artifact(entry: FileEntry, agreement: Agreement | None = None) -> model_pb.Artifact:
    """Return a version's file as clients see it, and how it agrees with ``model.onnx``."""
    artifact = model_pb.Artifact(name=entry.name, size=entry.size, sha256=entry.sha256)
    if agreement is not None:
        artifact.agreement.images = agreement.images
        artifact.agreement.top1 = agreement.top1
        artifact.agreement.distance = agreement.distance
    return artifact


def encode_answer(answer: Answer, *, embedding: bool) -> predictor_pb.PredictResponse:
    """Return what a version says about a call's images.

    Args:
        answer: What it says.
        embedding: Whether to say what the backbone makes of them, too.
    """
    return predictor_pb.PredictResponse(
        predictions=[
            predictor_pb.Prediction(
                scores=[
                    predictor_pb.ClassScore(label=label, probability=probability)
                    for label, probability in scores
                ],
                novelty=novelty,
                embedding=features if embedding else (),
            )
            for scores, novelty, features in zip(
                answer.scores, answer.novelty, answer.embedding, strict=True
            )
        ],
        version=version_name(answer.version),
    )


def encode_evaluation(evaluation: Evaluation, version: int) -> evaluator_pb.Evaluation:
    """Return figures as clients see them.

    Args:
        evaluation: The figures.
        version: Number of the version that was measured.
    """
    calibration, novelty = evaluation.calibration, evaluation.novelty
    return evaluator_pb.Evaluation(
        version=version_name(version),
        images=evaluation.images,
        unknown_images=evaluation.unknown_images,
        accuracy=evaluation.accuracy,
        accuracy_task_known=evaluation.accuracy_task_known,
        mean_class_accuracy=evaluation.mean_class_accuracy,
        classes=[
            evaluator_pb.ClassEvaluation(**asdict(part) | {"task": task_name(part.task)})
            for part in evaluation.classes
        ],
        tasks=[
            evaluator_pb.TaskEvaluation(**asdict(part) | {"task": task_name(part.task)})
            for part in evaluation.tasks
        ],
        confusions=[evaluator_pb.Confusion(**asdict(part)) for part in evaluation.confusions],
        calibration=_calibration(calibration) if calibration else None,
        novelty=evaluator_pb.NoveltyEvaluation(
            auroc=novelty.auroc,
            shares=[evaluator_pb.NoveltyShare(**asdict(share)) for share in novelty.shares],
        ),
        unknown_labels=[
            evaluator_pb.UnknownLabel(**asdict(part)) for part in evaluation.unknown_labels
        ],
    )


def _calibration(calibration: Calibration) -> evaluator_pb.Calibration:
    return evaluator_pb.Calibration(
        expected_error=calibration.expected_error,
        bins=[evaluator_pb.CalibrationBin(**asdict(part)) for part in calibration.bins],
        negative_log_likelihood=calibration.negative_log_likelihood,
        brier=calibration.brier,
    )


def _version(number: int | None) -> str:
    return "" if number is None else version_name(number)


def _failure(failure: Failure) -> status_pb2.Status:
    kind = ERRORS_BY_REASON.get(failure.reason, InfloraError)
    return to_status(kind(failure.message, field=failure.field))


def _report(report: TaskReport) -> pb.TaskReport:
    settings = report.settings
    return pb.TaskReport(
        layers=[pb.LayerReport(**asdict(layer)) for layer in report.layers],
        leak=report.leak,
        interference=report.interference,
        capacity=report.capacity,
        training_accuracy=report.training_accuracy,
        held_out_accuracy_task_known=report.held_out_accuracy_task_known,
        held_out_accuracy=report.held_out_accuracy,
        parity=pb.ParityReport(**asdict(report.parity)) if report.parity else None,
        stage_seconds=[
            pb.StageSeconds(stage=pb.TaskStage.Value(f"TASK_STAGE_{stage}"), seconds=seconds)
            for stage, seconds in report.stage_seconds.items()
        ],
        settings=pb.LearningSettings(
            **{name: settings[name] for name in (*_SETTINGS, "preset")},
            threshold=report.threshold,
            device=report.device,
        ),
        epoch_losses=report.epoch_losses,
        warnings=report.warnings,
        held_out_method=_HELD_OUT[report.held_out_method],
        temperature=report.temperature,
        tasks_left=report.tasks_left,
        class_bytes=report.class_bytes,
        shared_bytes=report.shared_bytes,
        kept_epoch=report.kept_epoch,
        checks=_checks(report.checks),
        untrained_accuracy=report.untrained_accuracy,
    )


def _checks(checks: Iterable[GateCheck]) -> list[pb.GateCheck]:
    return [pb.GateCheck(**asdict(check)) for check in checks]


def _timestamp(moment: datetime) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromDatetime(moment)
    return timestamp
