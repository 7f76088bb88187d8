"""``learn_task``: the whole method, readable top to bottom. Start reading here.

docs/method.md gives the equations beside the function names, and every departure from the paper and
from the published code.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from inflora_core import gate, subspace
from inflora_core.adapters import adapted, set_key_value
from inflora_core.backbone import Backbone
from inflora_core.checkpoint import Checkpoint
from inflora_core.compute import Compute, Parts, full_precision
from inflora_core.config import LearnConfig
from inflora_core.errors import InvalidInputError, StateError
from inflora_core.group import Group
from inflora_core.heads import (
    EVEN_SHARE,
    TEMPERATURE,
    ClassStatistics,
    Discriminant,
    accuracy,
    answering,
    examine,
    leave_one_out,
    pooled,
    spread,
    teaching_temperature,
    temperature_of,
)
from inflora_core.memory import GradientMemory
from inflora_core.merge import merge, product
from inflora_core.model import (
    Array,
    ClassEntry,
    ContinualModel,
    Factors,
    HeldOut,
    LabelledImages,
    LayerReport,
    LayerState,
    Learned,
    Stage,
    TaskReport,
    new_classes,
    positions_by_label,
)
from inflora_core.moments import Moments, record_moments
from inflora_core.progress import Tracker
from inflora_core.training import (
    GrowingHead,
    Images,
    Lesson,
    diverged,
    random_head,
    split,
    train_expansions,
)

FEW_OF_A_CLASS = 5
"""Images by which a class's mean can be told from an image."""

LITTLE_CAPACITY = 0.1
"""Free share of all dimensions below which a task's report warns."""

FEW_TASKS = 3
"""Tasks still to fit below which it warns."""


def learn_task(
    before: ContinualModel,
    backbone: Backbone,
    data: LabelledImages,
    task: str,
    config: LearnConfig,
    tracker: Tracker,
    initial_head: nn.Linear | None = None,
    checkpoint: Checkpoint | None = None,
    compute: Compute | None = None,
) -> Learned:
    """Teach ``before`` the classes of one task; ``before`` itself stays as it is.

    Args:
        before: What earlier tasks taught.
        backbone: The backbone, on the device to learn on. Its K and V weights are scratch space:
            they are set here, and left as merged.
        data: The task's images at model size; of new classes, of known ones, or of both.
        task: The task's id.
        config: Settings.
        tracker: Told about every stage and step; may raise ``CancelledError`` to stop.
        initial_head: What the head starts from, instead of what ``config.head`` says.
        checkpoint: Where to keep how far training has come, and to go on from.
        compute: How to compute it; float32, alone, if None. In a group, every process has to call
            this with the same arguments, and what rank 0 returns is the result.

    Raises:
        StateError: a class is known already, and ``config.head`` cannot add to known ones.
        InvalidInputError: there is no image, or training diverged.
    """
    classes, positions = class_table(before, data, task, config)
    device = next(backbone.module.parameters()).device
    compute = compute or Compute(device)
    train, held_out = split(data.images, positions, config.held_out_share, config.seed, device)
    memories = {name: GradientMemory.of(layer, device) for name, layer in before.layers.items()}
    threshold = threshold_after(before.tasks, config)
    tracker.epochs = config.epochs_for(len(train))
    load_weights(backbone, before)

    tracker.start(Stage.DESIGNING)
    labels, held_out_labels = (part.labels.cpu().numpy() for part in (train, held_out))
    few = some_of_each(labels, config.design_images)
    moments, seen = measure(
        backbone, train.at(torch.from_numpy(few)), config.batch_size, compute, tracker.step
    )
    reductions = compute.group.told(
        {
            name: memory.design(moments[name].mean, config.rank, config.criterion).cpu()
            for name, memory in memories.items()
        }
    )
    untrained = ClassStatistics.of(before).with_images(seen, labels[few], len(classes))
    left_out = each_left_out(untrained, seen, labels[few])
    lesson = prepare(
        *(before, untrained, left_out, backbone, train, held_out),
        *((seen, labels[few]), config, initial_head, compute),
    )

    with adapted(backbone.layers, reductions) as branches:
        tracker.start(Stage.TRAINING)
        kept_epoch = train_expansions(
            backbone, branches, lesson, config, tracker, checkpoint or Checkpoint(), compute
        )

        tracker.start(Stage.EXTENDING)
        sample = np.sort(spread(labels, config.design_images))
        moments, features = measure_with_some(
            backbone, train, sample, config.batch_size, compute, tracker.step
        )
        if not np.isfinite(features).all():
            raise diverged("features are not finite")
        extended = {
            name: memory.extend(moments[name], threshold, config.criterion, config.first_task)
            for name, memory in memories.items()
        }
        factors = {name: branch.factors for name, branch in branches.items()}

    tracker.start(Stage.MERGING)
    layers = {
        name: extended[name].state(
            merge(layer.key_value, factors[name]) if name in factors else layer.key_value
        )
        for name, layer in before.layers.items()
    }
    merged = replace(
        before,
        layers=layers,
        classes=classes,
        tasks=before.tasks + 1,
        capacity=np.append(before.capacity, free_share(layers)),
    )
    load_weights(backbone, merged)
    unseen = features_of(backbone, held_out, config.batch_size, compute)
    old = ClassStatistics.of(before).drifted(seen, features[few])
    statistics = old.with_images(features, labels, len(classes))
    trained = appended(before, lesson.head) if config.head == "trained" else None
    examined = examine(
        answering(merged, statistics, before.calibration, trained),
        statistics,
        (features, labels),
        (unseen, held_out_labels),
        from_statistics=trained is None,
    )
    after = answering(
        merged,
        statistics.with_images(unseen, held_out_labels, len(classes)),
        pooled(before.calibration, examined),
        trained,
    )
    taught = np.unique(labels)
    report = TaskReport(
        layers=tuple(
            report_layer(name, memories[name], extended[name], factors.get(name)) for name in layers
        ),
        threshold=threshold,
        training_accuracy=accuracy(after.logits(features), labels, taught) or 0.0,
        held_out_accuracy_task_known=examined.accuracy(taught),
        held_out_accuracy=examined.accuracy(),
        held_out_counts=dict(Counter(classes[i].label for i in held_out_labels.tolist())),
        held_out_method=examined.method,
        temperature=1.0 if trained else temperature_of(after.calibration, len(classes)),
        tasks_left=tasks_left(after.capacity),
        class_bytes=class_bytes(after),
        shared_bytes=after.class_scatter.nbytes + after.novelty.whitening.nbytes,
        kept_epoch=kept_epoch,
        epoch_losses=tuple(sum(losses) / len(losses) for losses in tracker.losses),
        stage_seconds=dict(tracker.seconds),
        settings=config.model_dump() | {"epochs": tracker.epochs},
        device=str(device),
        warnings=tuple(warnings_about(data, config, reductions, after.capacity, examined.method)),
        untrained_accuracy=accuracy(*left_out, taught),
    )
    evidence = gate.evidence(left_out, examined, taught, known=len(before.classes))
    return Learned(after, factors, report, evidence, train.rows.cpu().numpy(), features)


def class_table(
    before: ContinualModel, data: LabelledImages, task: str, config: LearnConfig
) -> tuple[tuple[ClassEntry, ...], Array]:
    """Return the class table after the task, and each image's position in it, (n,) int64.

    Raises:
        InvalidInputError: there is no image.
        StateError: a class is known, and heads are kept as trained.
    """
    if len(data) == 0:
        raise InvalidInputError("the task has no images", field="examples")
    known = positions_by_label(before.classes)
    again = [name for name in data.names if name in known]
    if again and config.head == "trained":
        raise StateError(
            f"class {again[0]!r} is known already, and heads that stay as they were trained cannot "
            "learn more of it: use head statistics",
            field="examples",
        )
    new = [name for name in data.names if name not in known]
    known |= {name: len(before.classes) + i for i, name in enumerate(new)}
    positions = np.array([known[name] for name in data.names], np.int64)[data.labels]
    return before.classes + new_classes(new, task), positions


def each_left_out(
    statistics: ClassStatistics, features: Array, positions: Array
) -> tuple[Array, Array]:
    """Return logits (m, classes) of images, each as if it were not in ``statistics``.

    From the head that A_t is trained against, before its temperature. And their classes, (m,):
    of every class its share, and none of a class's only image.

    Args:
        statistics: Over all images, those of ``features`` among them.
        features: (n, e).
        positions: (n,) int, the class of each.
    """
    sample = spread(positions)
    logits, _, kept = leave_one_out(statistics, features[sample], positions[sample], EVEN_SHARE)
    return logits, positions[sample][kept]


def prepare(
    before: ContinualModel,
    statistics: ClassStatistics,
    left_out: tuple[Array, Array],
    backbone: Backbone,
    train: Images,
    held_out: Images,
    measured: tuple[Array, Array],
    config: LearnConfig,
    initial_head: nn.Linear | None,
    compute: Compute,
) -> Lesson:
    """Return what A_t is trained against.

    Heads as published know the task's own classes only. Otherwise it is a head like the one that
    will answer (with even shares), of all classes, made from the statistics of old ones and the
    features of new ones: it asks of the features what the next head will. Rows of known classes
    stay; those of new classes are trained with A_t, because what they can take on themselves need
    not move the features.

    Args:
        before: What is known.
        statistics: Of all classes, with some of ``train``.
        left_out: Logits and classes of those images, from ``each_left_out``.
        backbone: With the weights that ``statistics`` were measured with.
        train: Labels are positions among all classes.
        held_out: The same.
        measured: Features (m, e) and classes (m,) of those images.
        config: Settings.
        initial_head: What a head as published starts from.
        compute: How to compute it.
    """
    device = train.labels.device
    if config.head == "trained":
        first = len(before.classes)
        new = len(statistics.means) - first
        head = initial_head or random_head(backbone.config.embedding_size, new, config.seed)
        return Lesson(
            head.to(device),
            replace(train, labels=train.labels - first),
            replace(held_out, labels=held_out.labels - first),
        )
    if len(statistics.means) == 1:
        # A softmax over one class has no gradient. The first class of all is told from its own
        # images upside down; later ones are told from the classes that are known.
        train, held_out = train.with_upside_down(1), held_out.with_upside_down(1)
        turned = train.at(slice(len(train) // 2, None))
        turned = turned.at(slice(config.design_images))
        statistics = statistics.with_images(
            features_of(backbone, turned, config.batch_size, compute),
            turned.labels.cpu().numpy(),
            2,
        )
        left_out = each_left_out(statistics, *measured)
    logits, positions = left_out
    temperature = TEMPERATURE
    if len(positions):
        temperature = teaching_temperature(logits, positions, config.softness)
    discriminant = Discriminant.of(statistics, EVEN_SHARE)
    weight, bias = compute.group.told(discriminant.divided(statistics.means, temperature))
    growing = GrowingHead(weight, bias, known=len(before.classes))
    return Lesson(growing.to(device), train, held_out)


def measure(
    backbone: Backbone,
    images: Images,
    batch_size: int,
    compute: Compute,
    on_share: Callable[[float], None],
) -> tuple[Moments, Array]:
    """Pass over ``images`` once: second moments of every layer's input, and features (n, e)."""
    if len(images) < compute.group.size:  # not one image for each process: each takes them all
        compute = replace(compute, group=Group())
    with record_moments({name: backbone.qkv(name) for name in backbone.config.layers}) as moments:
        features = features_of(backbone, images, batch_size, compute, on_share, moments)
    moments.sum(compute.group)
    return moments, features


def measure_with_some(
    backbone: Backbone,
    images: Images,
    sample: Array,
    batch_size: int,
    compute: Compute,
    on_share: Callable[[float], None],
) -> tuple[Moments, Array]:
    """Pass over ``images`` once: features (n, e) of all, and second moments from some.

    Args:
        backbone: The backbone.
        images: All.
        sample: (m,) which of them stand for all in the moments; of every class its share, since
            the memory is the mean over all images of all tasks.
        batch_size: Images at a time.
        compute: How to compute it.
        on_share: Told how far it is, 0 to 1.
    """
    count, whole = len(sample), len(images)
    rest = np.setdiff1d(np.arange(whole), sample)
    features = np.empty((whole, backbone.config.embedding_size), np.float32)
    moments, features[sample] = measure(
        *(backbone, images.at(torch.from_numpy(sample)), batch_size, compute),
        lambda share: on_share(share * count / whole),
    )
    if len(rest):
        features[rest] = features_of(
            *(backbone, images.at(torch.from_numpy(rest)), batch_size, compute),
            lambda share: on_share((count + share * len(rest)) / whole),
        )
    return moments.standing_for(count, whole), features


def some_of_each(labels: Array, count: int) -> Array:
    """Return which images to take, (m,) int64 ascending: of every class its share of ``count``.

    And of a small class more than that, as far as it has ``FEW_OF_A_CLASS``.
    """
    share = min(count / max(len(labels), 1), 1.0)
    chosen = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        wanted = min(max(math.ceil(share * len(members)), FEW_OF_A_CLASS), len(members))
        chosen.append(members[np.arange(wanted) * len(members) // wanted])
    return np.sort(np.concatenate(chosen))


@torch.no_grad()
@full_precision()
def features_of(
    backbone: Backbone,
    images: Images,
    batch_size: int,
    compute: Compute,
    on_share: Callable[[float], None] = lambda share: None,
    moments: Moments | None = None,
) -> Array:
    """Return the final features (n, e), float32, as the backbone's weights are now."""
    mine = images.at(compute.group.share(len(images)))
    moments = Moments.of(()) if moments is None else moments

    def one(part: slice) -> tuple[Tensor, Moments]:
        with moments.apart() as some:
            return pass_through(mine.at(part).loaded()).float(), some

    def run(parts: Parts) -> tuple[Tensor, Moments]:
        features = [torch.zeros((0, backbone.config.embedding_size), device=images.labels.device)]
        total, done = Moments.of(moments.by_layer), 0
        for embeddings, some in parts.each(one):
            features.append(embeddings)
            total += some
            done += len(embeddings)
            on_share(done / len(mine))
        return torch.cat(features), total

    with backbone.passing() as pass_through:
        features, total = compute.in_parts(len(mine), run, batch_size)
    moments += total
    return compute.group.joined(features, len(images)).cpu().numpy()


def appended(model: ContinualModel, head: nn.Module) -> tuple[Array, Array]:
    """Return the heads of all tasks as they were trained, the new one last."""
    weight, bias = (
        head.get_parameter(name).detach().float().cpu().numpy() for name in ("weight", "bias")
    )
    return np.concatenate([model.head_weight, weight]), np.concatenate([model.head_bias, bias])


def threshold_after(task: int, config: LearnConfig) -> float:
    """Return eps_t after task t (0-based)."""
    return subspace.threshold_at(
        task,
        config.threshold_first,
        config.threshold_last,
        config.threshold_limit,
        config.expected_tasks,
    )


def load_weights(backbone: Backbone, model: ContinualModel) -> None:
    """Set the backbone's K and V weights to the merged ones of ``model``."""
    for name, layer in model.layers.items():
        set_key_value(backbone.qkv(name), torch.from_numpy(layer.key_value))


def report_layer(
    name: str, old: GradientMemory, new: GradientMemory, factors: Factors | None
) -> LayerReport:
    """Measure what the task did to one layer."""
    update = None if factors is None else torch.from_numpy(product(factors)).to(old.basis)
    return LayerReport(
        layer=name,
        dimension=len(old.basis),
        rank=0 if factors is None else len(factors.reduction),
        free_before=old.free,
        free_after=new.free,
        leak=0.0 if update is None else subspace.leak(update, old.basis, old.protected),
        interference=0.0 if update is None else subspace.interference(update, old.moment),
    )


def free_share(layers: Mapping[str, LayerState]) -> float:
    """Return the free share of all layers' dimensions."""
    total = sum(len(layer.basis) for layer in layers.values())
    return sum(len(layer.basis) - layer.protected for layer in layers.values()) / max(total, 1)


def tasks_left(capacity: Array) -> float | None:
    """Return about how many more tasks of this kind fit, from what the last three have used.

    None after the first task, which always takes far more than the next ones, and where the last
    ones took nothing.

    Args:
        capacity: (t,) free share after each task.
    """
    recent = capacity[-4:]
    used = float(recent[0] - recent[-1]) / max(len(recent) - 1, 1)
    return float(capacity[-1]) / used if used > 0 else None


def class_bytes(model: ContinualModel) -> int:
    """Return the bytes that each class adds to a version's state, its label aside."""
    rows = (
        model.head_weight,
        model.head_bias,
        model.class_means,
        model.class_counts,
        model.novelty.weight,
        model.novelty.bias,
    )
    return sum(array[:1].nbytes for array in rows)


def warnings_about(
    data: LabelledImages,
    config: LearnConfig,
    reductions: Mapping[str, Tensor],
    capacity: Array,
    method: HeldOut,
) -> Iterator[str]:
    """Yield what the owner of the task should know."""
    if len(data.names) == 1 and config.head == "trained":
        yield (
            "The task has one class only. A softmax over one class has no gradient, so the "
            "backbone was not adapted; use head statistics."
        )
    if method is HeldOut.LEAVE_ONE_OUT:
        yield (
            "No image of some class was held out: held-out accuracies are of training images, each "
            "left out of the statistics in turn, and flatter."
        )
    full = [name for name, reduction in reductions.items() if len(reduction) == 0]
    if full:
        yield f"No free direction was left in {', '.join(full)}: these layers were not adapted."
    left = tasks_left(capacity)
    if capacity[-1] < LITTLE_CAPACITY or (left is not None and left < FEW_TASKS):
        about = "" if left is None else f", room for about {left:.1f} more tasks of this kind"
        yield (
            f"{capacity[-1]:.0%} of all directions are free{about}. When none is left, new classes "
            "are still told apart by the statistics of their features, but the backbone stays as "
            "it is."
        )
