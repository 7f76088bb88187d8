"""``learn_task``: the whole method, readable top to bottom. Start reading here.

docs/method.md gives the equations beside the function names, and every departure from the paper and
from the published code.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inflora_core import subspace
from inflora_core.adapters import AdaptedQKV, adapted, set_key_value
from inflora_core.backbone import Backbone
from inflora_core.config import LearnConfig
from inflora_core.errors import InvalidInputError, StateError
from inflora_core.heads import ClassStatistics, lda_head, random_head
from inflora_core.memory import GradientMemory
from inflora_core.merge import merge, product
from inflora_core.model import (
    Array,
    ClassEntry,
    ContinualModel,
    Factors,
    LabelledImages,
    LayerReport,
    Learned,
    Stage,
    TaskReport,
)
from inflora_core.moments import Moments, record_moments
from inflora_core.progress import Tracker


def learn_task(
    before: ContinualModel,
    backbone: Backbone,
    data: LabelledImages,
    task: str,
    config: LearnConfig,
    tracker: Tracker,
    initial_head: nn.Linear | None = None,
) -> Learned:
    """Teach ``before`` the classes of one task; ``before`` itself stays as it is.

    Args:
        before: What earlier tasks taught.
        backbone: The backbone, on the device to learn on. Its K and V weights are scratch space:
            they are set here, and left as merged.
        data: The task's images at model size.
        task: The task's id.
        config: Settings.
        tracker: Told about every stage and step; may raise ``CancelledError`` to stop.
        initial_head: What the head starts from, instead of what ``config.head`` says.

    Raises:
        StateError: a class is known already.
        InvalidInputError: there is no image, or training diverged.
    """
    check_classes(before, data)
    device = next(backbone.module.parameters()).device
    train, held_out = split(data, config.held_out_share, config.seed, device)
    memories = {name: GradientMemory.of(layer, device) for name, layer in before.layers.items()}
    threshold = threshold_after(before.tasks, config)
    load_weights(backbone, before)

    tracker.start(Stage.DESIGNING)
    moments, features = measure(backbone, train, config.batch_size, tracker)
    reductions = {
        name: memory.design(moments[name].mean, config.rank, config.criterion)
        for name, memory in memories.items()
    }
    head = initial_head or random_head(features.shape[1], len(data.names), config.seed).to(device)

    with adapted(backbone.layers, reductions) as branches:
        tracker.start(Stage.TRAINING)
        train_expansions(backbone, branches, head, train, config, tracker)

        tracker.start(Stage.EXTENDING)
        moments, features = measure(backbone, train, config.batch_size, tracker)
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
    statistics = ClassStatistics.of(before).with_classes(features, train.labels, len(data.names))
    weight, bias = lda_head(statistics) if config.head == "lda" else appended(before, head)
    after = replace(
        before,
        layers=layers,
        head_weight=weight,
        head_bias=bias,
        classes=before.classes + tuple(ClassEntry(name, task) for name in data.names),
        tasks=before.tasks + 1,
        class_means=statistics.means,
        class_counts=statistics.counts,
        class_scatter=statistics.scatter,
    )
    load_weights(backbone, after)
    task_known, overall = held_out_accuracies(backbone, after, held_out, config.batch_size)
    report = TaskReport(
        layers=tuple(
            report_layer(name, memories[name], extended[name], factors.get(name)) for name in layers
        ),
        threshold=threshold,
        training_accuracy=share_equal(
            logits_of(after, features)[:, len(before.classes) :].argmax(1), train.labels
        ),
        held_out_accuracy_task_known=task_known,
        held_out_accuracy=overall,
        held_out_counts=dict(Counter(data.names[i] for i in held_out.labels.tolist())),
        epoch_losses=tuple(sum(losses) / len(losses) for losses in tracker.losses),
        stage_seconds=tracker.seconds,
        settings=config.model_dump(),
        device=str(device),
        warnings=tuple(warnings_about(data, reductions)),
    )
    return Learned(after, factors, report)


@dataclass(frozen=True)
class Images:
    """Images on the device: ``pixels`` (n, S, S', 3) uint8 and ``labels`` (n,) int64."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """Return n."""
        return len(self.labels)

    def at(self, index: Tensor) -> Images:
        """Return the images at ``index`` (m,)."""
        return Images(self.pixels[index], self.labels[index])


def split(
    data: LabelledImages, share: float, seed: int, device: torch.device
) -> tuple[Images, Images]:
    """Return the images to train on and those held out: ``share`` of each class, rounded down."""
    generator = np.random.default_rng(seed)
    held_out = np.zeros(len(data), bool)
    for label in range(len(data.names)):
        members = np.flatnonzero(data.labels == label)
        held_out[generator.permutation(members)[: int(share * len(members))]] = True
    pixels, labels = torch.from_numpy(data.images), torch.from_numpy(data.labels)
    return tuple(  # type: ignore[return-value]
        Images(pixels[mask].to(device), labels[mask].to(device))
        for mask in (torch.from_numpy(~held_out), torch.from_numpy(held_out))
    )


@torch.no_grad()
def measure(
    backbone: Backbone, images: Images, batch_size: int, tracker: Tracker
) -> tuple[Moments, Tensor]:
    """Pass over ``images`` once: second moments of every layer's input, and features (n, e)."""
    features = []
    with record_moments({name: backbone.qkv(name) for name in backbone.config.layers}) as moments:
        for pixels in images.pixels.split(batch_size):
            features.append(backbone.module(backbone.normalise(pixels)))
            tracker.step(len(features) * batch_size / len(images))
    return moments, torch.cat(features)


def appended(model: ContinualModel, head: nn.Linear) -> tuple[Array, Array]:
    """Return the heads of all tasks as they were trained, the new one last."""
    weight, bias = (part.detach().float().cpu().numpy() for part in (head.weight, head.bias))
    return np.concatenate([model.head_weight, weight]), np.concatenate([model.head_bias, bias])


def train_expansions(
    backbone: Backbone,
    branches: Mapping[str, AdaptedQKV],
    head: nn.Linear,
    images: Images,
    config: LearnConfig,
    tracker: Tracker,
) -> None:
    """Train every A_t and the head by the cross-entropy over the task's own classes (section 4.1).

    Raises:
        InvalidInputError: the loss became NaN or infinite.
    """
    optimizer = optimizer_for(
        [branch.expansion for branch in branches.values()], list(head.parameters()), config
    )
    generator = torch.Generator().manual_seed(config.seed)
    steps = math.ceil(len(images) / config.batch_size)
    for epoch in range(config.epochs):
        tracker.losses.append([])
        order = torch.arange(len(images))
        if config.shuffle:
            order = torch.randperm(len(images), generator=generator)
        for step, index in enumerate(order.split(config.batch_size)):
            batch = images.at(index.to(images.labels.device))
            pixels = augment(batch.pixels, config.augmentation, generator)
            loss = F.cross_entropy(head(backbone.module(backbone.normalise(pixels))), batch.labels)
            if not loss.isfinite():
                raise InvalidInputError(
                    f"training diverged in epoch {epoch + 1}: the loss is {loss.item()}. "
                    "Choose a lower learning rate.",
                    field="learning_rate",
                )
            for group in optimizer.param_groups:
                group["lr"] = group["scale"] * learning_rate_at(config, epoch, step / steps)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            tracker.losses[-1].append(loss.item())
            tracker.step((epoch + (step + 1) / steps) / config.epochs)


def optimizer_for(
    expansions: list[nn.Parameter], head: list[nn.Parameter], config: LearnConfig
) -> torch.optim.Optimizer:
    """Return the optimizer; each group's ``scale`` is its share of the learning rate."""
    scale = (config.head_learning_rate or config.learning_rate) / config.learning_rate
    groups = [{"params": expansions, "scale": 1.0}, {"params": head, "scale": scale}]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9)
    return torch.optim.Adam(groups)


def learning_rate_at(config: LearnConfig, epoch: int, share: float) -> float:
    """Return the learning rate in ``epoch`` (from 0) when ``share`` of it is done.

    "published" lags one epoch behind the cosine that its authors wrote down: the base rate is used
    for two epochs, and the smallest never. "step" is the published one for SGD.
    """
    if config.schedule == "step":
        return config.learning_rate * (0.1 if 5 * epoch >= 4 * config.epochs else 1.0)
    if config.schedule == "published":
        angle = 99 * math.pi * max(epoch - 1, 0) / (200 * max(config.epochs - 1, 1))
        return config.learning_rate * math.cos(angle)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (epoch + share) / config.epochs))


def augment(pixels: Tensor, augmentation: str, generator: torch.Generator) -> Tensor:
    """Return training images (n, S, S', 3) uint8 after random changes."""
    if augmentation == "none":
        return pixels
    mirrored = torch.rand(len(pixels), generator=generator) < 0.5
    return torch.where(mirrored.to(pixels.device)[:, None, None, None], pixels.flip(2), pixels)


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


@contextmanager
def before_merging(
    backbone: Backbone, before: ContinualModel, learned: Learned
) -> Iterator[Callable[[Tensor], Tensor]]:
    """The learned model as it was trained: W_(t-1) with this task's branches beside it.

    Yields a function from normalised pixels (n, 3, S, S') to logits (n, classes) of all classes:
    what the exported file, made of merged weights, is compared with. Leaves the merged weights.
    """
    reductions = {
        name: torch.from_numpy(factors.reduction) for name, factors in learned.factors.items()
    }
    load_weights(backbone, before)
    try:
        with adapted(backbone.layers, reductions) as branches:
            for name, branch in branches.items():
                branch.expansion.data.copy_(torch.from_numpy(learned.factors[name].expansion))
            yield lambda pixels: logits_of(learned.model, backbone.module(pixels))
    finally:
        load_weights(backbone, learned.model)


def logits_of(model: ContinualModel, features: Tensor) -> Tensor:
    """Return logits (n, classes) of all classes for final features (n, e)."""
    weight = torch.from_numpy(model.head_weight).to(features)
    return F.linear(features, weight, torch.from_numpy(model.head_bias).to(features))


@torch.inference_mode()
def held_out_accuracies(
    backbone: Backbone, model: ContinualModel, images: Images, batch_size: int
) -> tuple[float | None, float | None]:
    """Return accuracy with the task known, and among all classes; None without images."""
    if len(images) == 0:
        return None, None
    logits = torch.cat(
        [
            logits_of(model, backbone.module(backbone.normalise(pixels)))
            for pixels in images.pixels.split(batch_size)
        ]
    )
    first = len(model.classes) - len(model.columns_of(model.classes[-1].task))
    return (
        share_equal(logits[:, first:].argmax(1), images.labels),
        share_equal(logits.argmax(1), images.labels + first),
    )


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


def check_classes(model: ContinualModel, data: LabelledImages) -> None:
    """Refuse a task without images, and classes that are known already."""
    if len(data) == 0:
        raise InvalidInputError("the task has no images", field="examples")
    known = {entry.label: entry.task for entry in model.classes}
    for name in data.names:
        if name in known:
            raise StateError(f"class {name!r} was taught by task {known[name]}", field="examples")


def warnings_about(data: LabelledImages, reductions: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield what the owner of the task should know."""
    if len(data.names) == 1:
        yield (
            "The task has one class only. A softmax over one class has no gradient, so the "
            "backbone was not adapted; the class is told apart by the statistics of its features."
        )
    full = [name for name, reduction in reductions.items() if len(reduction) == 0]
    if full:
        yield f"No free direction was left in {', '.join(full)}: these layers were not adapted."


def share_equal(left: Tensor, right: Tensor) -> float:
    """Return the share of positions at which both (n,) tensors agree."""
    return float((left == right).double().mean())
