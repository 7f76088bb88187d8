"""What the server answers, as frozen dataclasses: plain data without any protobuf in it.

Field for field this is the contract in ``inflora/v1/*.proto``, where units and shapes are stated
once more. Times are timezone-aware and in UTC.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path


class TaskState(StrEnum):
    """Where a task is on its way from upload to version."""

    UNSPECIFIED = "UNSPECIFIED"
    """A state that only a newer server knows."""
    QUEUED = "QUEUED"
    LEARNING = "LEARNING"
    PUBLISHED = "PUBLISHED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    HELD_BACK = "HELD_BACK"
    """Its version is stored, but as a candidate: the publish gate has something against it."""
    SET_ASIDE = "SET_ASIDE"
    """It kept ending the worker. Its examples are kept, and it can be tried again."""


class HeldOutMethod(StrEnum):
    """What held-out accuracies were measured on; see ``inflora.v1.HeldOutMethod``."""

    UNSPECIFIED = "UNSPECIFIED"
    HELD_OUT = "HELD_OUT"
    LEAVE_ONE_OUT = "LEAVE_ONE_OUT"


class TaskKind(StrEnum):
    """What a task does to the model."""

    UNSPECIFIED = "UNSPECIFIED"
    """A kind that only a newer server knows, or the server is older than kinds."""
    LEARN = "LEARN"
    FORGET = "FORGET"
    UPDATE_CLASS = "UPDATE_CLASS"


class TaskStage(StrEnum):
    """What the learner is doing, in this order."""

    UNSPECIFIED = "UNSPECIFIED"
    """The task is not being learned, or is at a stage that only a newer server knows."""
    DECODING = "DECODING"
    DESIGNING = "DESIGNING"
    TRAINING = "TRAINING"
    EXTENDING = "EXTENDING"
    MERGING = "MERGING"
    EXPORTING = "EXPORTING"
    CHECKING = "CHECKING"
    PUBLISHING = "PUBLISHING"


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """A field of a request that the server did not accept.

    Attributes:
        field: Path of the field in the request, for example ``images[3]``.
        description: What is wrong with it.
    """

    field: str
    description: str


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a call or a task failed.

    Attributes:
        code: Name of the gRPC status, for example ``INVALID_ARGUMENT``.
        message: What is wrong, in English.
        reason: Stable identifier of the cause; empty when no InfLoRA server gave the answer.
        field_violations: The fields at fault, where the request was.
        retry_seconds: When to ask again, where the server says that.
    """

    code: str
    message: str
    reason: str = ""
    field_violations: tuple[FieldViolation, ...] = ()
    retry_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class TaskClass:
    """One class of a task.

    Attributes:
        label: The class's label.
        example_count: Images of it that the task brought.
        held_out_count: How many of these were kept out of training; 0 until the task is learned.
    """

    label: str
    example_count: int
    held_out_count: int


@dataclass(frozen=True, slots=True)
class LearningSettings:
    """The settings a task was learned with, after defaults.

    Attributes:
        epochs: Passes over the training images.
        learning_rate: Base learning rate.
        rank: Upper bound of the rank of the update.
        batch_size: Images per step.
        seed: Seed of every random choice.
        held_out_share: Share of images held out, 0 to 0.5.
        preset: Named settings these were derived from.
        threshold: Share of energy that is protected after this task, 0 to 1.
        device: Where the task was learned, for example ``cpu``.
    """

    epochs: int
    learning_rate: float
    rank: int
    batch_size: int
    seed: int
    held_out_share: float
    preset: str
    threshold: float
    device: str


@dataclass(frozen=True, slots=True)
class LayerReport:
    """What one task did to one attention layer, whose input has ``dimension`` dimensions.

    Attributes:
        layer: The layer's name in the backbone.
        dimension: Dimension d of the layer's input.
        rank: Rank of the update; 0 where nothing was free.
        free_before: Free dimensions before this task.
        free_after: Free dimensions after this task.
        leak: norm(dW M) / norm(dW); 0 up to rounding.
        interference: norm(dW C_old^(1/2)) / (norm(dW) lambda_max(C_old)^(1/2)), 0 to 1.
    """

    layer: str
    dimension: int
    rank: int
    free_before: int
    free_after: int
    leak: float
    interference: float


@dataclass(frozen=True, slots=True)
class ParityReport:
    """How well the ONNX file and the learner agree on the task's own images.

    Attributes:
        images: Images compared.
        max_abs_diff: Largest absolute difference of a logit.
        preprocessing_grey_levels: Mean absolute difference of the pixels, in grey levels of 255.
        top1_agreement: Share of images with the same best class, 0 to 1.
    """

    images: int
    max_abs_diff: float
    preprocessing_grey_levels: float
    top1_agreement: float


@dataclass(frozen=True, slots=True)
class StageSeconds:
    """Wall-clock seconds spent in one stage."""

    stage: TaskStage
    seconds: float


@dataclass(frozen=True, slots=True)
class GateCheck:
    """One thing that the publish gate looks at before a version becomes current.

    Attributes:
        name: What is looked at, as the server's option that limits it is called.
        value: What was measured; None where it was not, and then the check is passed.
        limit: What the value was held against.
        passed: Whether there is nothing against the version.
        message: What was found, in English.
    """

    name: str
    value: float | None
    limit: float
    passed: bool
    message: str


@dataclass(frozen=True, slots=True)
class TaskReport:
    """What became of a learned task.

    Attributes:
        layers: One entry for each attention layer, first to last.
        leak: Largest leak of any layer.
        interference: Largest interference of any layer.
        capacity: Free share of all layers' dimensions after this task, 0 to 1.
        training_accuracy: On the training images, among this task's classes, 0 to 1.
        held_out_accuracy_task_known: The same on the held-out images; None without any.
        held_out_accuracy: On the held-out images, among all classes; None without any.
        parity: ONNX against the learner; None when it was not measured.
        stage_seconds: Wall-clock seconds for each stage, in order.
        settings: The settings in use.
        epoch_losses: Mean loss of each epoch.
        warnings: Things the owner of the task should know, in English.
        held_out_method: What the held-out accuracies were measured on.
        temperature: What logits were divided by so that probabilities mean what they say.
        tasks_left: About how many more tasks of this kind fit; None after the first task.
        class_bytes: Bytes that each class adds to a version's state.
        shared_bytes: Bytes of statistics that all classes share.
        kept_epoch: The epoch, from 1, whose weights were kept; 0 where there was nothing to train.
        checks: What the publish gate found, without checks that are switched off.
        untrained_accuracy: On the training images, among this task's classes, before anything is
            trained, each left out in turn, 0 to 1; None where every class has one image only.
    """

    layers: tuple[LayerReport, ...]
    leak: float
    interference: float
    capacity: float
    training_accuracy: float
    held_out_accuracy_task_known: float | None
    held_out_accuracy: float | None
    parity: ParityReport | None
    stage_seconds: tuple[StageSeconds, ...]
    settings: LearningSettings
    epoch_losses: tuple[float, ...]
    warnings: tuple[str, ...]
    held_out_method: HeldOutMethod
    temperature: float
    tasks_left: float | None
    class_bytes: int
    shared_bytes: int
    kept_epoch: int
    checks: tuple[GateCheck, ...] = ()
    untrained_accuracy: float | None = None

    @property
    def failed_checks(self) -> tuple[GateCheck, ...]:
        """What the publish gate has against the version."""
        return tuple(check for check in self.checks if not check.passed)


@dataclass(frozen=True, slots=True)
class Forget:
    """Classes to forget.

    Attributes:
        labels: Labels or aliases of the classes; ``[forgotten]`` once they are purged.
        purge: Whether the data of older versions that know them go, too.
    """

    labels: tuple[str, ...]
    purge: bool


@dataclass(frozen=True, slots=True)
class ClassUpdate:
    """A change of what a class is called.

    Attributes:
        label: What it was called: its label, or an alias.
        new_label: Its new label; None if it keeps the old one.
        add_aliases: Aliases that were added.
        remove_aliases: Aliases that were removed.
    """

    label: str
    new_label: str | None
    add_aliases: tuple[str, ...]
    remove_aliases: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Task:
    """Labelled images, or a change of the classes, on their way to become a version.

    Attributes:
        name: ``models/{model}/tasks/{task}``.
        display_name: Free text for people.
        request_id: Chosen by the client; makes a repeated upload harmless.
        state: Where the task is.
        stage: What the learner does now; UNSPECIFIED unless the state is LEARNING.
        epoch: The running epoch, from 1; 0 before training.
        epochs: Epochs in all; 0 before training.
        loss: Mean loss of the running epoch so far; 0 before training.
        fraction_done: Share of the work done, 0 to 1.
        classes: The classes, in the order they arrived.
        example_count: Images in all.
        example_bytes: Encoded size of all images, in bytes.
        version: The version that came of it; empty unless PUBLISHED or HELD_BACK.
        error: Why the task failed, or was held back or set aside; None unless FAILED, HELD_BACK
            or SET_ASIDE.
        create_time: When the task was accepted.
        start_time: When the learner began; None before.
        end_time: When the task ended; None before.
        report: What became of it; None unless of kind LEARN, and PUBLISHED or HELD_BACK, and in
            lists.
        kind: What it does. Only tasks of kind LEARN have classes and examples.
        forget: For FORGET: the classes.
        update: For UPDATE_CLASS: the change.
    """

    name: str
    display_name: str
    request_id: str
    state: TaskState
    stage: TaskStage
    epoch: int
    epochs: int
    loss: float
    fraction_done: float
    classes: tuple[TaskClass, ...]
    example_count: int
    example_bytes: int
    version: str
    error: Failure | None
    create_time: datetime | None
    start_time: datetime | None
    end_time: datetime | None
    report: TaskReport | None
    kind: TaskKind = TaskKind.UNSPECIFIED
    forget: Forget | None = None
    update: ClassUpdate | None = None

    @property
    def id(self) -> str:
        """The last part of the name: what every method accepts in its place."""
        return self.name.rpartition("/")[2]

    @property
    def ended(self) -> bool:
        """Whether the task will not change any more."""
        return self.state in (
            TaskState.PUBLISHED,
            TaskState.FAILED,
            TaskState.CANCELLED,
            TaskState.HELD_BACK,
            TaskState.SET_ASIDE,
        )


@dataclass(frozen=True, slots=True)
class VersionClass:
    """A class that a version knows.

    Attributes:
        label: Its label, which predictions name.
        task: The task that first taught it.
        aliases: Other names under which examples of it may arrive.
    """

    label: str
    task: str
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Agreement:
    """How alike two files answer, measured on images of the task that made the version.

    Attributes:
        images: How many images were compared.
        top1: Share of them that both name alike.
        distance: Mean total variation of the probabilities, from 0 (the same) to 1.
    """

    images: int
    top1: float
    distance: float


@dataclass(frozen=True, slots=True)
class Artifact:
    """A file of a version.

    Attributes:
        name: File name, for example ``model.onnx``.
        size: Size in bytes.
        sha256: SHA-256 of the content, 64 lower-case hexadecimal digits.
        agreement: With ``model.onnx``; of its smaller forms, as a version lists them.
    """

    name: str
    size: int
    sha256: str
    agreement: Agreement | None = None


@dataclass(frozen=True, slots=True)
class Version:
    """An immutable state of the model.

    Attributes:
        name: ``models/{model}/versions/{n}``, n from 1.
        parent: The version it was learned from; empty for the first.
        task: The task that made it.
        create_time: When it was made.
        current: Whether it answers ``predict``.
        classes: The classes it knows, without those forgotten since; position i belongs to logit i.
        artifacts: Its files, without those that hold a class forgotten since.
        provider: Execution provider that runs it; empty when not loaded.
        purged: Whether its data were deleted with a class that was purged.
        pinned: Whether it is kept however old it is.
        retired: Whether its data were deleted because it was old.
        stand_in: Whether it answers in place of the version that is current, which is damaged.
        candidate: Whether the publish gate held it back; promoting it takes ``force``.
        failed_checks: What the publish gate has against a candidate.
    """

    name: str
    parent: str
    task: str
    create_time: datetime | None
    current: bool
    classes: tuple[VersionClass, ...]
    artifacts: tuple[Artifact, ...]
    provider: str
    purged: bool = False
    pinned: bool = False
    retired: bool = False
    stand_in: bool = False
    candidate: bool = False
    failed_checks: tuple[GateCheck, ...] = ()

    @property
    def number(self) -> int:
        """The version's number, from 1."""
        return int(self.name.rpartition("/")[2])


@dataclass(frozen=True, slots=True)
class ClassScore:
    """A class and its probability among the competing classes, 0 to 1."""

    label: str
    probability: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer for one image.

    Attributes:
        scores: The likeliest classes, best first; never empty.
        novelty: How little the image looks like any known class, 0 (known) to 1 (new).
        embedding: What the version's backbone makes of the image, float32; empty unless asked for.
            Those of one version can be compared; learning moves them.
    """

    scores: tuple[ClassScore, ...]
    novelty: float
    embedding: tuple[float, ...] = ()

    @property
    def label(self) -> str:
        """The likeliest class."""
        return self.scores[0].label

    @property
    def probability(self) -> float:
        """Probability of the likeliest class, 0 to 1."""
        return self.scores[0].probability


@dataclass(frozen=True, slots=True)
class PredictResult:
    """The answer to one request.

    Attributes:
        version: The version that answered, ``models/{model}/versions/{n}``.
        predictions: One for each image, in the order of the images.
    """

    version: str
    predictions: tuple[Prediction, ...]


@dataclass(frozen=True, slots=True)
class ClassEvaluation:
    """How one class fared.

    Attributes:
        label: The class.
        task: The task that taught it.
        images: Images of it, at least 1.
        accuracy: Share of them that were answered with it, 0 to 1.
        mean_probability: Mean probability that they were given of being of this class, 0 to 1.
        confused_with: What wrong answers were most often; empty if there was none.
        confused_images: How often that was.
    """

    label: str
    task: str
    images: int
    accuracy: float
    mean_probability: float
    confused_with: str
    confused_images: int


@dataclass(frozen=True, slots=True)
class TaskEvaluation:
    """How the classes of one task fared.

    Attributes:
        task: The task.
        images: Images of its classes, at least 1.
        accuracy: Share of right answers, all classes competing, 0 to 1.
        accuracy_task_known: The same when only the task's own classes compete.
    """

    task: str
    images: int
    accuracy: float
    accuracy_task_known: float


@dataclass(frozen=True, slots=True)
class Confusion:
    """One kind of error.

    Attributes:
        truth: The class of the images.
        answer: The class that was answered.
        images: How often.
        share: Of the images of ``truth``, 0 to 1.
    """

    truth: str
    answer: str
    images: int
    share: float


@dataclass(frozen=True, slots=True)
class CalibrationBin:
    """The answers of similar confidence: above ``lower``, at most ``upper``.

    Attributes:
        lower: Lower bound of the confidence; itself in the bin only if it is 0.
        upper: Upper bound, itself in the bin.
        images: Images, at least 1.
        mean_confidence: Their mean confidence.
        accuracy: Share of them that were answered right, 0 to 1.
    """

    lower: float
    upper: float
    images: int
    mean_confidence: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """How far probabilities can be believed.

    Attributes:
        expected_error: Expected calibration error over 15 bins, 0 (calibrated) to 1.
        bins: The bins it was computed from; empty ones are left out.
        negative_log_likelihood: Mean of -ln(probability of the truth).
        brier: Mean over images of the sum over classes of (probability - truth)^2, 0 to 2.
    """

    expected_error: float
    bins: tuple[CalibrationBin, ...]
    negative_log_likelihood: float
    brier: float


@dataclass(frozen=True, slots=True)
class NoveltyShare:
    """How many images have a novelty above a threshold.

    Attributes:
        threshold: The threshold.
        known: Share of the images of known classes, 0 to 1; None if there are none.
        unknown: Share of the images of unknown classes; None if there are none.
    """

    threshold: float
    known: float | None
    unknown: float | None


@dataclass(frozen=True, slots=True)
class NoveltyEvaluation:
    """How well novelty tells images of unknown classes from those of known ones.

    Attributes:
        auroc: Probability that an image of an unknown class has the higher novelty of two, 0 to 1;
            None unless there are images of both kinds.
        shares: How many images are above some thresholds.
    """

    auroc: float | None
    shares: tuple[NoveltyShare, ...]


@dataclass(frozen=True, slots=True)
class UnknownLabel:
    """A label that the version does not know, and how many images have it."""

    label: str
    images: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How good a version is. All but ``novelty`` is about images of classes that it knows.

    Attributes:
        version: The version, ``models/{model}/versions/{n}``.
        images: Images of known classes.
        unknown_images: Images of classes that the version does not know.
        accuracy: Share of right answers, all classes competing, 0 to 1; None without images.
        accuracy_task_known: The same when only the classes of the image's task compete.
        mean_class_accuracy: Mean of the accuracies of the classes; None without images.
        classes: The classes that have images, in the order of ``Version.classes``.
        tasks: Their tasks, in the order of their first classes.
        confusions: The most frequent errors, most frequent first.
        calibration: How far probabilities can be believed; None without images.
        novelty: How well novelty finds images of unknown classes.
        unknown_labels: The labels that the version does not know.
    """

    version: str
    images: int
    unknown_images: int
    accuracy: float | None
    accuracy_task_known: float | None
    mean_class_accuracy: float | None
    classes: tuple[ClassEvaluation, ...]
    tasks: tuple[TaskEvaluation, ...]
    confusions: tuple[Confusion, ...]
    calibration: Calibration | None
    novelty: NoveltyEvaluation
    unknown_labels: tuple[UnknownLabel, ...]


@dataclass(frozen=True, slots=True)
class Download:
    """A downloaded and verified file.

    Attributes:
        path: Where it lies.
        version: The version it belongs to, ``models/{model}/versions/{n}``.
        artifact: Its name, size and hash, as the server states them and as they were found.
    """

    path: Path
    version: str
    artifact: Artifact
