"""Plain data: what the learner, the store and the service hand to each other. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

Array = NDArray[Any]

# What is read from a manifest becomes a path, or an int64 of a message: nothing else may be in one.
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
FileName = Annotated[str, Field(pattern="^[0-9A-Za-z_-][0-9A-Za-z._-]{0,99}$")]
ClassKey = Annotated[str, Field(pattern=r"^[^/\x00]*[^/\x00.][^/\x00]*$", max_length=200)]
Number = Annotated[int, Field(ge=1, le=10**9)]

TEMPERATURES = np.geomspace(0.5, 50.0, 93)
"""What logits may be divided by: steps of 5%."""

MOST_NOVEL = 2.0
"""No novelty score is higher."""

SCORE_BINS = 400
"""Into which novelty scores, 0 to MOST_NOVEL, are counted."""

MARK = "[forgotten]"
"""What stands in place of a purged class's names."""


class TaskState(StrEnum):
    """Where a task is on its way from upload to version."""

    QUEUED = "QUEUED"
    LEARNING = "LEARNING"
    PUBLISHED = "PUBLISHED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    HELD_BACK = "HELD_BACK"
    """Its version is a candidate: the publish gate has something against it."""
    SET_ASIDE = "SET_ASIDE"
    """It kept ending the worker. Its examples are kept, and it can be tried again."""

    @property
    def ended(self) -> bool:
        """Whether nothing will change any more."""
        return self not in (TaskState.QUEUED, TaskState.LEARNING)


class TaskKind(StrEnum):
    """What a task does to the model."""

    LEARN = "LEARN"
    FORGET = "FORGET"
    UPDATE_CLASS = "UPDATE_CLASS"


class Stage(StrEnum):
    """What the learner is doing, in this order."""

    DECODING = "DECODING"
    DESIGNING = "DESIGNING"
    TRAINING = "TRAINING"
    EXTENDING = "EXTENDING"
    MERGING = "MERGING"
    EXPORTING = "EXPORTING"
    CHECKING = "CHECKING"
    PUBLISHING = "PUBLISHING"


@dataclass(frozen=True)
class Progress:
    """One moment of learning. ``fraction`` (0 to 1) never falls; ``epoch`` counts from 1."""

    stage: Stage
    fraction: float
    epoch: int = 0
    epochs: int = 0
    loss: float = 0.0


class HeldOut(StrEnum):
    """What a task's held-out figures were measured on."""

    NONE = "NONE"
    HELD_OUT = "HELD_OUT"
    LEAVE_ONE_OUT = "LEAVE_ONE_OUT"


@dataclass(frozen=True)
class LayerReport:
    """What one task did to one attention layer; see ``inflora.v1.LayerReport``."""

    layer: str
    dimension: int
    rank: int
    free_before: int
    free_after: int
    leak: float
    interference: float


@dataclass(frozen=True)
class ParityReport:
    """How well ONNX and torch agree on the task's own images."""

    images: int
    max_abs_diff: float
    preprocessing_grey_levels: float
    top1_agreement: float


@dataclass(frozen=True)
class GateCheck:
    """One thing that the publish gate looks at.

    Attributes:
        name: Field of ``config.Gate`` that limits it.
        value: What was measured; None where it was not, and then it is passed.
        limit: What ``value`` was held against.
        passed: Whether there is nothing against the version.
        message: What was found, in plain English. Names of classes are quoted.
    """

    name: str
    value: float | None
    limit: float
    passed: bool
    message: str


@dataclass(frozen=True)
class TaskReport:
    """What became of a learned task; see ``inflora.v1.TaskReport``."""

    layers: tuple[LayerReport, ...]
    threshold: float
    training_accuracy: float
    held_out_accuracy_task_known: float | None
    held_out_accuracy: float | None
    held_out_counts: dict[str, int]
    held_out_method: HeldOut
    temperature: float
    """What logits are divided by, so that probabilities mean what they say."""
    tasks_left: float | None
    """About how many more tasks of this kind fit; None after the first."""
    class_bytes: int
    """State that each class adds to a version."""
    shared_bytes: int
    """State that all classes share."""
    epoch_losses: tuple[float, ...]
    stage_seconds: dict[Stage, float]
    settings: dict[str, Any]
    device: str
    warnings: tuple[str, ...] = ()
    parity: ParityReport | None = None
    kept_epoch: int = 0
    """The epoch, from 1, whose weights were kept; 0 where there was nothing to train."""
    checks: tuple[GateCheck, ...] = ()
    """What the publish gate found; those that are switched off are left out."""
    untrained_accuracy: float | None = None
    """Share of training images whose class wins among this task's before A_t is trained, each left
    out of the statistics in turn: nothing has seen their labels. None without any."""

    def without_classes(self, labels: Collection[str]) -> TaskReport:
        """Return the report without what it says of classes of these labels."""
        kept = {name: n for name, n in self.held_out_counts.items() if name not in labels}
        warnings = tuple(redacted(warning, labels) for warning in self.warnings)
        checks = tuple(
            replace(check, message=redacted(check.message, labels)) for check in self.checks
        )
        return replace(self, held_out_counts=kept, warnings=warnings, checks=checks)

    @property
    def failed_checks(self) -> tuple[GateCheck, ...]:
        """What the publish gate has against the version."""
        return tuple(check for check in self.checks if not check.passed)

    @property
    def leak(self) -> float:
        """Largest leak of any layer."""
        return max((layer.leak for layer in self.layers), default=0.0)

    @property
    def interference(self) -> float:
        """Largest interference of any layer."""
        return max((layer.interference for layer in self.layers), default=0.0)

    @property
    def capacity(self) -> float:
        """Free share of all layers' dimensions."""
        total = sum(layer.dimension for layer in self.layers)
        return sum(layer.free_after for layer in self.layers) / total if total else 0.0


@dataclass(frozen=True)
class Failure:
    """Why a task failed: ``reason`` of an ``InfloraError``, its message and field."""

    reason: str
    message: str
    field: str = ""


@dataclass(frozen=True)
class Forget:
    """Forget classes for good.

    Attributes:
        labels: What the classes are called: labels or aliases.
        purge: Whether the data of older versions that know them go, too.
    """

    labels: tuple[str, ...]
    purge: bool = False


@dataclass(frozen=True)
class ClassUpdate:
    """Change what a class is called; at least one of the changes is asked for.

    Attributes:
        label: What it is called: its label or an alias.
        new_label: Its label from now on, None to keep it.
        add_aliases: More names that mean it.
        remove_aliases: Names that do not mean it any more.
    """

    label: str
    new_label: str | None = None
    add_aliases: tuple[str, ...] = ()
    remove_aliases: tuple[str, ...] = ()


Edit = Forget | ClassUpdate
"""What a task other than LEARN asks for: a change of the class table, without any learning."""


@dataclass(frozen=True)
class Task:
    """A task's record. ``id`` is the last part of its resource name."""

    id: str
    display_name: str
    request_id: str
    content_sha256: str
    labels: tuple[str, ...]
    """Classes in the order they arrived."""
    example_counts: tuple[int, ...]
    """Images of each class."""
    example_bytes: int
    settings: dict[str, Any]
    """What the spec asked for; keys are fields of ``LearnConfig``."""
    create_time: datetime
    state: TaskState = TaskState.QUEUED
    start_time: datetime | None = None
    end_time: datetime | None = None
    version: int | None = None
    failure: Failure | None = None
    report: TaskReport | None = None
    edit: Edit | None = None
    """What to change, unless the task is to learn. It has no classes or examples then."""
    crashes: int = 0
    """How often in a row a worker, or the server, ended in work on it, none having come further."""
    crashed_at: int = 0
    """The last epoch that any worker that ended was in; 0 before the first."""
    killed_at: str = ""
    """What the last server that was killed left as its checkpoint (``spool.checkpoint_sum``)."""
    withheld: tuple[str, ...] = ()
    """Names of purged classes that it mentions. They are taken out when it ends, unless what it
    makes is a version: then it taught, or named, something else so."""
    who: str = ""
    """Who sent it, as the audit log has it; "" for one that an older release accepted."""
    traceparent: str = ""
    """The trace of the call that sent it, as W3C Trace Context has it; "" without one."""

    def withholding(self, names: Collection[str]) -> Task:
        """Return the record with those of ``names`` that it mentions among the withheld."""
        shown = replace(self, withheld=())
        more = [name for name in names if shown.without_classes([name]) != shown]
        return replace(self, withheld=tuple(sorted({*self.withheld, *more})))

    def without_classes(self, names: Collection[str]) -> Task:
        """Return the record without names of classes, and without what would give them away."""

        def shown(name: str) -> str:
            return MARK if name in names else name

        edit = self.edit
        match edit:
            case Forget():
                edit = replace(edit, labels=tuple(map(shown, edit.labels)))
            case ClassUpdate():
                edit = ClassUpdate(
                    shown(edit.label),
                    edit.new_label and shown(edit.new_label),
                    tuple(map(shown, edit.add_aliases)),
                    tuple(map(shown, edit.remove_aliases)),
                )
        failure = self.failure
        if failure is not None:
            failure = replace(failure, message=redacted(failure.message, names))
        return replace(
            self,
            display_name=shown(self.display_name),
            # Whose hash it is, is soon guessed where there is nothing but a name in it.
            content_sha256=self.content_sha256 if edit == self.edit else "",
            labels=tuple(map(shown, self.labels)),
            failure=failure,
            report=self.report and self.report.without_classes(names),
            edit=edit,
        )

    @property
    def kind(self) -> TaskKind:
        """What it does to the model."""
        if self.edit is None:
            return TaskKind.LEARN
        return TaskKind.FORGET if isinstance(self.edit, Forget) else TaskKind.UPDATE_CLASS


@dataclass(frozen=True)
class ClassEntry:
    """A class that the model knows; its position in the table is its logit's.

    Attributes:
        label: What it is called.
        task: The task that first taught it.
        key: Which class it is, whatever it is called: no two classes of a store share one.
        aliases: Other names under which examples of it may arrive.
    """

    label: str
    task: str
    key: ClassKey
    aliases: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Its label, then its aliases; no name means two classes of a table."""
        return (self.label, *self.aliases)


def new_classes(labels: Iterable[str], task: str) -> tuple[ClassEntry, ...]:
    """Return the entries of the classes that ``task`` is the first to teach."""
    return tuple(ClassEntry(label, task, f"{task}.{i}") for i, label in enumerate(labels))


def position_of(classes: Sequence[ClassEntry], name: str) -> int | None:
    """Return the position of the class with this label or alias, None if there is none."""
    return next((i for i, entry in enumerate(classes) if name in entry.names), None)


def positions_by_label(classes: Iterable[ClassEntry]) -> dict[str, int]:
    """Return which label or alias means which position in the class table."""
    return {name: position for position, entry in enumerate(classes) for name in entry.names}


class VersionState(StrEnum):
    """What became of a version since it was published."""

    WHOLE = "WHOLE"
    REDUCED = "REDUCED"
    """It knew classes that were forgotten since; it answers without them."""
    PURGED = "PURGED"
    """Its data were deleted with a class that it knew; only its factors are kept."""
    RETIRED = "RETIRED"
    """Its data were deleted because it was old; only its factors are kept."""

    @property
    def stripped(self) -> bool:
        """Whether only what later versions are made of is left: it can never be used again."""
        return self in (VersionState.PURGED, VersionState.RETIRED)


@dataclass(frozen=True)
class FileEntry:
    """A file of a version, with what it must contain."""

    name: FileName
    size: Annotated[int, Field(ge=0, lt=2**63)]
    sha256: Sha256

    @classmethod
    def of(cls, name: str, content: bytes) -> Self:
        """Return what a file of this name has to be to have this content."""
        return cls(name, len(content), hashlib.sha256(content).hexdigest())


@dataclass(frozen=True)
class Agreement:
    """How alike two files answer images, the same version's in two forms.

    Attributes:
        images: How many were compared.
        differing: How many were named differently.
        distance: Mean total variation of the probabilities, from 0 (the same) to 1.
    """

    images: Annotated[int, Field(ge=1)]
    differing: Annotated[int, Field(ge=0)]
    distance: Annotated[float, Field(ge=0, le=1)]

    @property
    def top1(self) -> float:
        """Share of the images that were named alike."""
        return 1 - self.differing / self.images


@dataclass(frozen=True)
class Form:
    """A smaller form of a version's ``model.onnx`` (``inflora_core.forms``), made when asked for.

    Attributes:
        file: What it is then.
        agreement: With ``model.onnx``, on images of the task.
    """

    file: FileEntry
    agreement: Agreement


@dataclass(frozen=True)
class Version:
    """A version's manifest: immutable, numbered from 1."""

    number: Number
    parent: Number | None
    task: str
    backbone: Sha256
    """SHA-256 that names the frozen backbone in the store."""
    classes: tuple[ClassEntry, ...]
    files: tuple[FileEntry, ...]
    create_time: datetime
    report: TaskReport | None
    """None where nothing was learned: its task changed the class table only."""
    forgets: tuple[ClassKey, ...] = ()
    """Keys of the classes that are forgotten from this version on."""
    forms: tuple[Form, ...] = ()
    """Those that agree with ``model.onnx`` well enough."""
    state: VersionState = VersionState.WHOLE
    """Not in the manifest: it is found when that is read."""
    pinned: bool = False
    """Whether it is kept however old it is. Not in the manifest either."""

    @property
    def candidate(self) -> bool:
        """Whether the publish gate held it back: only a person may make it current."""
        return self.report is not None and bool(self.report.failed_checks)

    def file(self, name: str) -> FileEntry | None:
        """Return the entry called ``name``, or None."""
        return next((entry for entry in self.files if entry.name == name), None)


@dataclass(frozen=True)
class LayerState:
    """What the model knows about one attention layer whose ``qkv`` maps d to 3a.

    Attributes:
        key_value: (2a, d) float32, the merged K rows, then V rows of ``qkv.weight``.
        basis: (d, d) Q, orthonormal columns; the first ``protected`` span the gradient memory M.
        protected: k, the number of protected directions.
        moment: (d, d) running second moment C_old of all old tasks' inputs, mean over tokens.
        tokens: How many tokens ``moment`` is the mean of.
    """

    key_value: Array
    basis: Array
    protected: int
    moment: Array
    tokens: int


@dataclass(frozen=True)
class Factors:
    """What one task adds to one layer: ``float32(float64(key_value) + expansion @ reduction)``.

    Attributes:
        expansion: (2a, r) float32, A_t: rows of K, then of V.
        reduction: (r, d) float32, B_t.
    """

    expansion: Array
    reduction: Array


@dataclass(frozen=True)
class Novelty:
    """How unlike every known class an image is: 1 - the largest cosine in the whitened space.

    For features z: s = 1 - max_c (z weight_c + bias_c) / |z whitening + offset|. What is answered
    is the share of known images with a lower s, from ``Calibration.scores``.

    Attributes:
        weight: (classes, e) float32.
        bias: (classes,) float32.
        whitening: (e, e) float32, H with H H^T the inverse of the shared covariance.
        offset: (e,) float32.
    """

    weight: Array
    bias: Array
    whitening: Array
    offset: Array

    @classmethod
    def untaught(cls, embedding_size: int) -> Novelty:
        """Return what no class is known to."""
        return cls(
            weight=np.zeros((0, embedding_size), np.float32),
            bias=np.zeros(0, np.float32),
            whitening=np.eye(embedding_size, dtype=np.float32),
            offset=np.zeros(embedding_size, np.float32),
        )


@dataclass(frozen=True)
class Calibration:
    """What gives probabilities and novelty a meaning. Sums, so that tasks of any size add up.

    Attributes:
        images: How many images the losses are over.
        losses: (93,) float64, summed cross-entropy at each of ``TEMPERATURES``, of logits as if
            there were ten classes (``heads.sureness``).
        scores: (400,) int64, novelty scores counted in bins of equal width.
    """

    images: int
    losses: Array
    scores: Array

    @classmethod
    def untaught(cls) -> Calibration:
        """Return what nothing was measured for."""
        return cls(0, np.zeros(len(TEMPERATURES)), np.zeros(SCORE_BINS, np.int64))


@dataclass(frozen=True)
class ContinualModel:
    """All that learning has changed so far; the frozen backbone is kept beside it.

    Attributes:
        layers: By layer name, first to last.
        head_weight: (classes, e) float32.
        head_bias: (classes,) float32.
        classes: The class table; position i is logit i.
        tasks: Number of tasks learned, t.
        version: The version this state was read from, or None before the first task.
        class_means: (classes, e) float32, mean final features of each class.
        class_counts: (classes,) int64, images each mean is over.
        class_scatter: (e, e) float32, scatter of all images about their class's mean.
        class_freedom: Degrees of freedom of the scatter: images beyond the first of each class,
            also of classes that were forgotten since.
        novelty: How unlike every known class an image is.
        calibration: What probabilities and novelty were measured on.
        capacity: (t,) float64, free share of all layers' dimensions after each task.
    """

    layers: dict[str, LayerState]
    head_weight: Array
    head_bias: Array
    class_means: Array
    class_counts: Array
    class_scatter: Array
    class_freedom: int
    novelty: Novelty
    calibration: Calibration
    capacity: Array
    classes: tuple[ClassEntry, ...] = ()
    tasks: int = 0
    version: int | None = None

    @classmethod
    def untaught(cls, layers: dict[str, LayerState], embedding_size: int) -> ContinualModel:
        """Return the state before the first task: no class known."""
        return cls(
            layers=layers,
            head_weight=np.zeros((0, embedding_size), np.float32),
            head_bias=np.zeros(0, np.float32),
            class_means=np.zeros((0, embedding_size), np.float32),
            class_counts=np.zeros(0, np.int64),
            class_scatter=np.zeros((embedding_size, embedding_size), np.float32),
            class_freedom=0,
            novelty=Novelty.untaught(embedding_size),
            calibration=Calibration.untaught(),
            capacity=np.zeros(0),
        )

    def logits(self, features: Array) -> Array:
        """Return logits (n, classes) float32 for final features (n, e)."""
        rows = np.asarray(features, np.float32)
        return np.asarray(rows @ self.head_weight.T + self.head_bias, np.float32)


@dataclass(frozen=True)
class Told:
    """How often images were told right by what had not been made from them.

    Attributes:
        right: How many were.
        images: Of so many.
        chance: Share that would have been right had the answers nothing to do with the images.
        typical: Share beyond chance that may be expected of a task whose labels mean something.
    """

    right: int
    images: int
    chance: float
    typical: float


@dataclass(frozen=True)
class Likeness:
    """A new class, and the class that it is the hardest to tell from.

    Attributes:
        position: Of the new class in the class table.
        other: Of the other one.
        told: Share of its images that are told from the other one, before A_t is trained.
    """

    position: int
    other: int
    told: float


@dataclass(frozen=True)
class Evidence:
    """What learning shows about a task's labels; the publish gate judges by it.

    Attributes:
        untrained: The training images before A_t is trained, each left out in turn.
        held_out: The held-out images in the end; None where there were none.
        likenesses: Of the new classes that have images enough.
    """

    untrained: Told | None = None
    held_out: Told | None = None
    likenesses: tuple[Likeness, ...] = ()


@dataclass(frozen=True)
class Learned:
    """What ``learn_task`` returns: the new state, and what this task added to the old one.

    Attributes:
        model: The new state.
        factors: What was added to each layer that was adapted.
        report: What the owner of the task is told.
        evidence: What the publish gate is told.
        rows: (n,) int64, which of the task's images it was trained on.
        features: (n, e) float32, what those became with W_(t-1) and the branches beside it: what a
            file made of merged weights is compared with.
    """

    model: ContinualModel
    factors: dict[str, Factors]
    report: TaskReport
    evidence: Evidence = Evidence()
    rows: Array = field(default_factory=lambda: np.zeros(0, np.int64))
    features: Array = field(default_factory=lambda: np.zeros((0, 0), np.float32))


@dataclass(frozen=True)
class BackboneConfig:
    """How to build a backbone, in the form of a timm hub ``config.json``.

    Attributes:
        architecture: timm's name of the model.
        model_args: Arguments of ``timm.create_model`` beyond the name.
        pretrained_cfg: timm's data configuration: ``input_size`` (c, h, w), ``mean``, ``std``,
            ``interpolation``, ``crop_pct``, ``crop_mode``.
        layers: Names of the attention layers, first to last.
        embedding_size: e, width of the final features.
    """

    architecture: str
    model_args: dict[str, Any]
    pretrained_cfg: dict[str, Any]
    layers: tuple[str, ...] = ()
    embedding_size: int = 0


@dataclass(frozen=True)
class Preprocessing:
    """From a decoded image to model-sized pixels, as the backbone's own configuration has it.

    Resize so that the shorter side is ``resize`` (``crop_mode`` "center"), or both sides are
    ("squash"); crop the middle ``height`` x ``width``; scale to 0..1; subtract ``mean``, divide
    by ``std``.
    """

    height: int
    width: int
    resize_height: int
    resize_width: int
    interpolation: str
    crop_mode: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass
class LabelledImages:
    """Images at model size: ``images`` (n, S, S', 3) uint8, ``labels`` (n,) int64 in ``names``."""

    images: Array
    labels: Array
    names: tuple[str, ...]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)


def redacted(text: str, names: Iterable[str]) -> str:
    """Return a message without names of classes, which our messages always quote."""
    for name in names:
        for quoted in (repr(name), ascii(name)):
            text = text.replace(quoted, MARK)
    return text


def now() -> datetime:
    """Return the present time in UTC, to the microsecond, as records keep it."""
    return datetime.now(UTC)
