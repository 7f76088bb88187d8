"""From protobuf messages to the dataclasses of ``resources``."""

from __future__ import annotations

from dataclasses import fields
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from inflora.v1 import evaluator_service_pb2, model_service_pb2, predictor_service_pb2, task_pb2
from inflora_client import resources
from inflora_client.errors import failure_of

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_Flat = TypeVar("_Flat", bound="DataclassInstance")
_Enum = TypeVar(
    "_Enum",
    resources.TaskState,
    resources.TaskStage,
    resources.TaskKind,
    resources.HeldOutMethod,
)


def _flat(kind: type[_Flat], message: Message) -> _Flat:
    """Copy a message of nothing but numbers and strings; the dataclass names the fields alike."""
    return kind(**{field.name: getattr(message, field.name) for field in fields(kind)})


def _optional(message: Message, field: str) -> Any:
    """The value of a field, or None where the server left it unset."""
    return getattr(message, field) if message.HasField(field) else None


def _enum(kind: type[_Enum], name_of: Any, prefix: str, number: int) -> _Enum:
    """A newer server may send numbers that this client has no name for: UNSPECIFIED, no error."""
    try:
        return kind(name_of.Name(number).removeprefix(prefix))
    except ValueError:
        return kind("UNSPECIFIED")


def _stage(number: int) -> resources.TaskStage:
    return _enum(resources.TaskStage, task_pb2.TaskStage, "TASK_STAGE_", number)


def _time(message: Message, field: str) -> datetime | None:
    timestamp: Timestamp | None = _optional(message, field)
    return timestamp.ToDatetime(UTC) if timestamp else None


def task(message: task_pb2.Task) -> resources.Task:
    """Parse a task."""
    return resources.Task(
        name=message.name,
        display_name=message.display_name,
        request_id=message.request_id,
        state=_enum(resources.TaskState, task_pb2.TaskState, "TASK_STATE_", message.state),
        stage=_stage(message.stage),
        epoch=message.epoch,
        epochs=message.epochs,
        loss=message.loss,
        fraction_done=message.fraction_done,
        classes=tuple(_flat(resources.TaskClass, c) for c in message.classes),
        example_count=message.example_count,
        example_bytes=message.example_bytes,
        version=message.version,
        error=failure_of(message.error) if message.HasField("error") else None,
        create_time=_time(message, "create_time"),
        start_time=_time(message, "start_time"),
        end_time=_time(message, "end_time"),
        report=_report(message.report) if message.HasField("report") else None,
        kind=_enum(resources.TaskKind, task_pb2.TaskKind, "TASK_KIND_", message.kind),
        forget=_forget(message.forget) if message.HasField("forget") else None,
        update=_update(message.update) if message.HasField("update") else None,
    )


def _forget(message: task_pb2.Forget) -> resources.Forget:
    return resources.Forget(labels=tuple(message.labels), purge=message.purge)


def _update(message: task_pb2.ClassUpdate) -> resources.ClassUpdate:
    return resources.ClassUpdate(
        label=message.label,
        new_label=_optional(message, "new_label"),
        add_aliases=tuple(message.add_aliases),
        remove_aliases=tuple(message.remove_aliases),
    )


def _report(message: task_pb2.TaskReport) -> resources.TaskReport:
    parity = message.parity if message.HasField("parity") else None
    return resources.TaskReport(
        layers=tuple(_flat(resources.LayerReport, layer) for layer in message.layers),
        leak=message.leak,
        interference=message.interference,
        capacity=message.capacity,
        training_accuracy=message.training_accuracy,
        held_out_accuracy_task_known=_optional(message, "held_out_accuracy_task_known"),
        held_out_accuracy=_optional(message, "held_out_accuracy"),
        parity=_flat(resources.ParityReport, parity) if parity else None,
        stage_seconds=tuple(
            resources.StageSeconds(_stage(s.stage), s.seconds) for s in message.stage_seconds
        ),
        settings=_flat(resources.LearningSettings, message.settings),
        epoch_losses=tuple(message.epoch_losses),
        warnings=tuple(message.warnings),
        held_out_method=_enum(
            resources.HeldOutMethod,
            task_pb2.HeldOutMethod,
            "HELD_OUT_METHOD_",
            message.held_out_method,
        ),
        temperature=message.temperature,
        tasks_left=_optional(message, "tasks_left"),
        class_bytes=message.class_bytes,
        shared_bytes=message.shared_bytes,
        kept_epoch=message.kept_epoch,
        checks=tuple(map(_check, message.checks)),
        untrained_accuracy=_optional(message, "untrained_accuracy"),
    )


def _check(message: task_pb2.GateCheck) -> resources.GateCheck:
    return resources.GateCheck(
        name=message.name,
        value=_optional(message, "value"),
        limit=message.limit,
        passed=message.passed,
        message=message.message,
    )


def version(message: model_service_pb2.Version) -> resources.Version:
    """Parse a version."""
    return resources.Version(
        name=message.name,
        parent=message.parent,
        task=message.task,
        create_time=_time(message, "create_time"),
        current=message.current,
        classes=tuple(
            resources.VersionClass(label=c.label, task=c.task, aliases=tuple(c.aliases))
            for c in message.classes
        ),
        artifacts=tuple(artifact(a) for a in message.artifacts),
        provider=message.provider,
        purged=message.purged,
        pinned=message.pinned,
        retired=message.retired,
        stand_in=message.stand_in,
        candidate=message.candidate,
        failed_checks=tuple(map(_check, message.failed_checks)),
    )


def artifact(message: model_service_pb2.Artifact) -> resources.Artifact:
    """Parse a file's name, size and hash, and how it agrees with ``model.onnx``."""
    agreement = _optional(message, "agreement")
    return resources.Artifact(
        message.name,
        message.size,
        message.sha256,
        agreement and _flat(resources.Agreement, agreement),
    )


def predict_result(message: predictor_service_pb2.PredictResponse) -> resources.PredictResult:
    """Parse the answer to one request."""
    return resources.PredictResult(
        version=message.version,
        predictions=tuple(
            resources.Prediction(
                scores=tuple(_flat(resources.ClassScore, s) for s in p.scores),
                novelty=p.novelty,
                embedding=tuple(p.embedding),
            )
            for p in message.predictions
        ),
    )


def evaluation(message: evaluator_service_pb2.Evaluation) -> resources.Evaluation:
    """Parse what was measured."""
    calibration = message.calibration if message.HasField("calibration") else None
    return resources.Evaluation(
        version=message.version,
        images=message.images,
        unknown_images=message.unknown_images,
        accuracy=_optional(message, "accuracy"),
        accuracy_task_known=_optional(message, "accuracy_task_known"),
        mean_class_accuracy=_optional(message, "mean_class_accuracy"),
        classes=tuple(_flat(resources.ClassEvaluation, c) for c in message.classes),
        tasks=tuple(_flat(resources.TaskEvaluation, t) for t in message.tasks),
        confusions=tuple(_flat(resources.Confusion, c) for c in message.confusions),
        calibration=_calibration(calibration) if calibration else None,
        novelty=resources.NoveltyEvaluation(
            auroc=_optional(message.novelty, "auroc"),
            shares=tuple(
                resources.NoveltyShare(
                    share.threshold, _optional(share, "known"), _optional(share, "unknown")
                )
                for share in message.novelty.shares
            ),
        ),
        unknown_labels=tuple(_flat(resources.UnknownLabel, u) for u in message.unknown_labels),
    )


def _calibration(message: evaluator_service_pb2.Calibration) -> resources.Calibration:
    return resources.Calibration(
        expected_error=message.expected_error,
        bins=tuple(_flat(resources.CalibrationBin, b) for b in message.bins),
        negative_log_likelihood=message.negative_log_likelihood,
        brier=message.brier,
    )
