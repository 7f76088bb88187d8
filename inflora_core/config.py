"""Settings of the method, their limits, and the named presets."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from inflora_core.errors import InvalidInputError

Criterion = Literal["code", "paper"]
FirstTask = Literal["reach", "one-fewer"]


LEAST_STEPS = 10
"""Steps that a task with few images is trained for. Not many more: sixty tasks of one class ended
12 points lower with 60 steps each (docs/method.md)."""

MOST_STEPS = 3000
"""Steps after which a task with many images has had enough."""


class LearnConfig(BaseModel):
    """How one task is learned. Defaults are ours; ``PRESETS["published"]`` is the paper's code.

    docs/method.md gives the reason for every default that differs from the published one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    preset: str = "default"
    rank: int = Field(10, ge=1, le=1024)
    """Upper bound of r, the rank of ``A_t B_t``."""
    epochs: int | None = Field(None, ge=1, le=10_000)
    """None: 5, or as many as make LEAST_STEPS steps, fewer once MOST_STEPS are reached; then
    training also ends early, when the held-out images stop getting better."""
    batch_size: int = Field(32, ge=1, le=4096)
    learning_rate: float = Field(1e-3, gt=0, le=10)
    """Base rate, for the expansions and the new head."""
    head_learning_rate: float | None = Field(None, gt=0, le=10)
    """Base rate of the new head alone. None: ``learning_rate``, too."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """``sgd``: with a momentum of 0.9."""
    schedule: Literal["cosine", "published", "step"] = "cosine"
    """``published``: the cosine that lags one epoch (``training.learning_rate_at``). ``step``: a
    tenth of the base rate in the last fifth of the epochs."""
    seed: int = Field(0, ge=0, le=2**63 - 1)
    shuffle: bool = True
    """Visit the images in a new order in every epoch; without, in the order they came."""
    held_out_share: float = Field(0.1, ge=0, le=0.5)
    design_images: int = Field(96, ge=1)
    """Training images, of every class its share, that B_t is designed from, and the head that A_t
    is trained against. And at most as many, at equal steps through the classes, stand for all in
    what the memory is extended by: 90 of 360, 50 of 100."""
    augmentation: Literal["none", "flip"] = "none"
    """``flip``: mirror half of the training images, anew in every epoch."""
    criterion: Criterion = "code"
    """What the design and the memory rank directions by: ``C C`` or ``C``."""
    first_task: FirstTask = "reach"
    """``one-fewer``: after the first task one direction fewer than the threshold asks for."""
    threshold_first: float = Field(0.98, gt=0, lt=1)
    """``lamb``: share of energy protected after the first task."""
    threshold_last: float = Field(1.0, gt=0, le=1)
    """``lame``: what the threshold rises towards."""
    threshold_limit: float = Field(0.99, gt=0, lt=1)
    """Never reached by the schedule's own doing: at 1 nothing would be free for later tasks."""
    expected_tasks: int | None = Field(None, ge=1, le=100_000)
    """T of the published schedule. None: the number of tasks is not known."""
    head: Literal["trained", "statistics"] = "statistics"
    """What answers: the heads as each was trained in its task, or linear discriminants made of the
    statistics of all classes. The latter keep tasks apart, too (``heads.py``)."""

    softness: float = Field(0.2, ge=0, lt=1)
    """How unsure of itself the head is that A_t is trained against, where it is made of statistics:
    its cross-entropy on the task's images, each left out, as a share of that of a head that knows
    nothing."""

    def epochs_for(self, images: int) -> int:
        """Return how many passes over so many training images there will be, at most."""
        if self.epochs is not None:
            return self.epochs
        steps = math.ceil(images / self.batch_size)
        wanted = max(5, math.ceil(LEAST_STEPS / steps))
        return max(1, min(wanted, MOST_STEPS // steps))

    @model_validator(mode="after")
    def _thresholds_rise(self) -> LearnConfig:
        if self.threshold_first > min(self.threshold_last, self.threshold_limit):
            raise ValueError("threshold_first is above threshold_last or threshold_limit")
        return self

    def updated(self, **changes: Any) -> LearnConfig:
        """Return a copy with ``changes`` that are not None, checked.

        Raises:
            InvalidInputError: naming the first field that is out of its limits.
        """
        known = {key: value for key, value in changes.items() if value is not None}
        try:
            return LearnConfig.model_validate({**self.model_dump(), **known})
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            raise InvalidInputError(f"{field}: {first['msg']}", field=field) from error


_PUBLISHED = LearnConfig(
    preset="published",
    epochs=20,
    batch_size=128,
    learning_rate=5e-4,
    schedule="published",
    first_task="one-fewer",
    threshold_first=0.95,
    threshold_last=1.0,
    threshold_limit=0.9999,
    expected_tasks=10,
    head="trained",
    held_out_share=0.0,
    design_images=2**31,
)

PRESETS: dict[str, LearnConfig] = {
    "default": LearnConfig(),
    "published": _PUBLISHED,
    "published-cifar100": _PUBLISHED.updated(preset="published-cifar100"),
    "published-imagenet-r": _PUBLISHED.updated(
        preset="published-imagenet-r", epochs=50, threshold_first=0.98
    ),
    # Its memory keeps no complement side. Q and k hold the same space either way: both sides of
    # the published memory grow by the same rule (tests/golden/test_dualgpm.py, lamb95 and lamb99).
    "published-domainnet": _PUBLISHED.updated(
        preset="published-domainnet",
        rank=30,
        epochs=5,
        optimizer="sgd",
        learning_rate=5e-3,
        head_learning_rate=1e-2,
        schedule="step",
        expected_tasks=5,
    ),
}
"""Named settings, chosen with ``inflora serve --preset``. ``expected_tasks`` is to be set where a
stream has another number of tasks than the published one."""


def preset(name: str) -> LearnConfig:
    """Return the settings called ``name``.

    Raises:
        InvalidInputError: if there are none; the message lists those there are.
    """
    try:
        return PRESETS[name]
    except KeyError:
        known = ", ".join(sorted(PRESETS))
        raise InvalidInputError(f"no preset {name!r}; there are: {known}", field="preset") from None


class Gate(BaseModel):
    """What keeps a version from becoming current; None switches a check off.

    docs/operations.md has the figures behind the defaults.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    not_finite: int | None = Field(0, ge=0)
    """Most numbers of head, statistics and factors that may be NaN or infinite."""
    leak: float | None = Field(0.01, ge=0, le=1)
    """Largest leak of a layer: the share of its update that touches protected directions."""
    interference: float | None = Field(0.5, ge=0, le=1)
    """Largest interference of a layer, where no canary images tell what it comes to."""
    accuracy: float | None = Field(0.2, ge=0, le=1)
    """Least share of the way from chance to perfect that the task's own images, unseen, are told
    right; half of it where one class alone is told from all others. And at the least so much that
    chance gets there in one task of a hundred."""
    distinct: float | None = Field(None, ge=0, le=1)
    """Least share of a new class's images that are told from any one other class. Off: some honest
    classes look alike to a backbone, and ``similar`` names them."""
    similar: float | None = Field(0.75, ge=0, le=1)
    """The same; a class below it is no reason to hold a version back, but is named in a warning."""
    canary: float | None = Field(0.25, ge=0, le=1)
    """Most accuracy on the canary images of old classes that may be lost, new ones competing."""
    fp16: float | None = Field(0.995, ge=0, le=1)
    """Least share of images that the smaller form of a version has to name as ``model.onnx`` does.
    It is no reason to hold a version back: a form of which some of the task's images say, 95% sure,
    that it falls short is not handed out, and neither is one that is off."""
    int8: float | None = Field(0.98, ge=0, le=1)
    """Likewise."""
    form_distance: float | None = Field(0.05, ge=0, le=1)
    """Most that a form's probabilities may differ by on average: their total variation."""


class Retention(BaseModel):
    """Which versions are kept, beside the current one and those that are pinned; 0: all."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    versions: int = Field(0, ge=0)
    """Newest versions that can be used. Of older ones only the factors stay, of which later ones
    are made."""
    onnx_files: int = Field(3, ge=0)
    """Newest versions whose ``model.onnx`` stays. Others' is made again when it is asked for."""


class Limits(BaseModel):
    """What the server accepts before it refuses."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image_bytes: int = Field(20 * 2**20, ge=1)
    """Encoded size of one image."""
    image_pixels: int = Field(64_000_000, ge=1, le=178_956_970)
    """Width x height, read from the header before anything is decoded. Pillow reads no more than
    the highest value."""
    image_side_min: int = Field(2, ge=1)
    """Pixels of the shorter side."""
    image_aspect: int = Field(100, ge=1)
    """Longest side over shortest. Models resize the shorter side to theirs: a 2 x 60000 image of
    a few hundred bytes would become 224 x 6.7 million float pixels on the way."""
    message_bytes: int = Field(32 * 2**20, ge=1024)
    """One gRPC message."""
    predict_images: int = Field(256, ge=1)
    """Images of one Predict call."""
    predict_waiting_images: int = Field(1024, ge=1)
    """Images of all Predict calls that are not answered yet; a call that is alone may have more."""
    predict_waiting_bytes: int = Field(2**28, ge=1)
    """Encoded; likewise."""
    task_images: int = Field(50_000, ge=1)
    """The learner holds them all at model size, and again in two parts while it learns: twice
    7.5 GB at 224 x 224."""
    task_bytes: int = Field(4 * 2**30, ge=1)
    """Encoded; the learner holds them while it decodes."""
    task_classes: int = Field(10_000, ge=1)
    queued_tasks: int = Field(100, ge=1)
    max_calls: int = Field(4096, ge=1)
    """Calls at a time, but for health; a ``WatchTask`` is one as long as it lasts."""
    task_attempts: int = Field(3, ge=1)
    """How often in a row a worker may end in work on a task before the task is set aside."""
    task_seconds: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Longest time in work on a task; 0: any."""
    upload_idle_seconds: float = Field(60.0, gt=0, allow_inf_nan=False)
    """Longest wait for the next message of an upload."""
    upload_seconds: float = Field(3600.0, ge=0, allow_inf_nan=False)
    """How long an upload that broke off is kept after its last example."""
    partial_uploads: int = Field(32, ge=0)
    """Uploads that broke off and are kept; those that have waited longest go first."""
    partial_bytes: int = Field(8 * 2**30, ge=0)
    """Encoded images of all of them."""
    reserve_bytes: int = Field(2**30, ge=0)
    """Free on the store's filesystem, or nothing is accepted; and room for the versions to come."""
