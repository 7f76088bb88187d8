"""The training of one task: A_t by gradient descent against heads that know each other."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inflora_core.adapters import AdaptedQKV
from inflora_core.backbone import Backbone
from inflora_core.checkpoint import Checkpoint, fingerprint
from inflora_core.compute import Compute, Parts
from inflora_core.config import LearnConfig
from inflora_core.errors import InvalidInputError
from inflora_core.model import Array
from inflora_core.progress import Tracker
from inflora_core.recording import Recorded

PATIENCE = 3
"""Epochs without a lower loss on the held-out images after which training ends."""

FEWEST_TO_STOP = 20
"""Held-out images that it takes to say so."""

DEVICE_SHARE = 0.5
"""Most of a GPU's free memory that a task's images may take."""


@dataclass(frozen=True)
class Images:
    """Some of the images of a task.

    Attributes:
        pixels: (N, S, S', 3) uint8, all of them: on the device, or pinned where they do not fit.
        rows: (n,) int64, which of ``pixels``; where those are.
        labels: (n,) int64, on the device.
    """

    pixels: Tensor
    rows: Tensor
    labels: Tensor

    @classmethod
    def placed(cls, pixels: Array, labels: Array, device: torch.device) -> Images:
        """Bring images (n, S, S', 3) uint8 and labels (n,) to where they are learned."""
        whole = torch.from_numpy(pixels)
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            fits = whole.nbytes < DEVICE_SHARE * free
            whole = whole.to(device) if fits else whole.pin_memory()
        rows = torch.arange(len(whole), device=whole.device)
        return cls(whole, rows, torch.from_numpy(labels).to(device))

    def __len__(self) -> int:
        """Return n."""
        return len(self.labels)

    def at(self, index: Tensor | slice) -> Images:
        """Return the images at ``index``, (m,) on any device."""
        if isinstance(index, slice):
            return Images(self.pixels, self.rows[index], self.labels[index])
        here, there = (
            index.to(part.device, non_blocking=True) for part in (self.rows, self.labels)
        )
        return Images(self.pixels, self.rows[here], self.labels[there])

    def loaded(self) -> Tensor:
        """Return their pixels (n, S, S', 3) uint8 on the device."""
        if self.pixels.device == self.labels.device:
            return self.pixels[self.rows]
        # A buffer of its own for each batch: the one before may be on its way still.
        buffer = torch.empty(
            (len(self), *self.pixels.shape[1:]), dtype=torch.uint8, pin_memory=True
        )
        torch.index_select(self.pixels, 0, self.rows, out=buffer)
        return buffer.to(self.labels.device, non_blocking=True)

    def with_upside_down(self, label: int) -> Images:
        """Return these and a copy of each, turned by half, as images of class ``label``."""
        pixels = self.pixels[self.rows]
        return Images(
            torch.cat([pixels, pixels.flip(1, 2)]),
            torch.arange(2 * len(self), device=self.rows.device),
            torch.cat([self.labels, torch.full_like(self.labels, label)]),
        )


@dataclass(frozen=True)
class Lesson:
    """What A_t is trained against.

    Attributes:
        head: e to classes; whatever needs a gradient in it is trained with A_t.
        images: To train on; labels are rows of ``head``.
        held_out: To notice when to stop; the same labels.
    """

    head: nn.Module
    images: Images
    held_out: Images


def split(
    pixels: Array, labels: Array, share: float, seed: int, device: torch.device
) -> tuple[Images, Images]:
    """Return the images to train on and those held out: ``share`` of each class, rounded down."""
    generator = np.random.default_rng(seed)
    held_out = np.zeros(len(labels), bool)
    for label in dict.fromkeys(labels.tolist()):
        members = np.flatnonzero(labels == label)
        held_out[generator.permutation(members)[: int(share * len(members))]] = True
    images = Images.placed(pixels, labels, device)
    train, rest = (images.at(torch.from_numpy(np.flatnonzero(x))) for x in (~held_out, held_out))
    return train, rest


def random_head(embedding_size: int, classes: int, seed: int) -> nn.Linear:
    """Return a head with random weights as ``nn.Linear`` draws them, as the published code does."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(embedding_size, classes)


class GrowingHead(nn.Module):
    """Rows of known classes, which stay as they are, and rows of new ones, which are trained.

    Args:
        weight: (classes, e) what all rows start from.
        bias: (classes,)
        known: How many of them, the first, stay.
    """

    def __init__(self, weight: Array, bias: Array, known: int) -> None:
        super().__init__()
        self.known_weight: Tensor
        self.known_bias: Tensor
        rows, offsets = torch.from_numpy(weight), torch.from_numpy(bias)
        self.register_buffer("known_weight", rows[:known])
        self.register_buffer("known_bias", offsets[:known])
        self.new_weight = nn.Parameter(rows[known:].clone(), requires_grad=known < len(rows))
        self.new_bias = nn.Parameter(offsets[known:].clone(), requires_grad=known < len(rows))

    def forward(self, features: Tensor) -> Tensor:
        """Map (n, e) to (n, classes)."""
        weight = torch.cat([self.known_weight, self.new_weight])
        return F.linear(features, weight, torch.cat([self.known_bias, self.new_bias]))


def train_expansions(
    backbone: Backbone,
    branches: Mapping[str, AdaptedQKV],
    lesson: Lesson,
    config: LearnConfig,
    tracker: Tracker,
    checkpoint: Checkpoint,
    compute: Compute,
) -> int:
    """Train every A_t, and the head as far as it is free, by cross-entropy (section 4.1).

    Goes on from ``checkpoint``, if that is of this very training.

    Returns:
        The epoch, from 1, that is kept: the last, or the best one where training ends early. 0 if
        there was nothing to train.

    Raises:
        InvalidInputError: the loss became NaN or infinite.
    """
    head, images, held_out = lesson.head, lesson.images, lesson.held_out
    expansions = [branch.expansion for branch in branches.values()]
    free = [part for part in head.parameters() if part.requires_grad]
    parameters = expansions + free
    if not expansions and config.head == "statistics":
        return 0  # nothing is free: rows that are let go afterwards need no training
    optimizer = optimizer_for(expansions, free, config)
    generator = torch.Generator().manual_seed(config.seed)
    steps = math.ceil(len(images) / config.batch_size)
    watch = Watch(on=config.epochs is None and len(held_out) >= FEWEST_TO_STOP)
    training = Training(parameters, optimizer, generator, watch, tracker)
    differentiate_batch = recorded(backbone, head, parameters, config, compute)
    beginning = fingerprint(
        f"{config.model_dump_json()} {compute.half} {compute.group.size}",
        [
            *(branch.reduction for branch in branches.values()),
            *expansions,
            *head.state_dict().values(),
            # Pixels are those of the spool that the checkpoint lies in; the reductions follow from
            # some of them, to the last bit.
            *(images.labels, held_out.labels),
        ],
    )
    if saved := compute.group.told(checkpoint.load(beginning)):
        training.restore(saved)
    while len(tracker.losses) < tracker.epochs and not watch.over:
        epoch = len(tracker.losses)
        losses = Losses(epoch)
        tracker.losses.append(losses.known)
        for step, batch in enumerate(batches(images, config, generator)):
            done = (epoch + step / steps) / tracker.epochs
            for group in optimizer.param_groups:
                group["lr"] = group["scale"] * learning_rate_at(config, epoch, tracker.epochs, done)
            losses.add(differentiate_batch(batch))
            optimizer.step()
            losses.look()
            tracker.step((epoch + (step + 1) / steps) / tracker.epochs)
        losses.look(wait=True)
        if watch.on:
            watch.note(held_out_loss(backbone, head, held_out, config, compute), parameters)
        checkpoint.save(beginning, training.state())
    return watch.restore(parameters) or len(tracker.losses)


Batch: TypeAlias = tuple[Images, Tensor]
"""Images of one step, and which of them to mirror, (n,) bool."""


def batches(images: Images, config: LearnConfig, generator: torch.Generator) -> Iterator[Batch]:
    """Yield the steps of one epoch.

    Everything random is drawn, and brought to the device, before the first of them.
    """
    order, mirrored = torch.arange(len(images)), torch.zeros(len(images), dtype=torch.bool)
    if config.shuffle:
        order = torch.randperm(len(images), generator=generator)
    if config.augmentation == "flip":
        mirrored = torch.rand(len(images), generator=generator) < 0.5
    images, mirrored = images.at(order), mirrored.to(images.labels.device)
    for start in range(0, len(images), config.batch_size):
        rows = slice(start, start + config.batch_size)
        yield images.at(rows), mirrored[rows]


def recorded(
    backbone: Backbone,
    head: nn.Module,
    parameters: Sequence[nn.Parameter],
    config: LearnConfig,
    compute: Compute,
) -> Callable[[Batch], Tensor]:
    """Return ``differentiate`` for one batch after another, played back where that is sooner."""
    if not compute.records:
        return lambda batch: differentiate(backbone, head, batch, parameters, config, compute)

    def run(inputs: Sequence[Tensor]) -> Tensor:
        pixels, labels, mirrored = inputs
        images = Images(pixels, torch.arange(len(pixels), device=pixels.device), labels)
        return differentiate(backbone, head, (images, mirrored), parameters, config, compute)

    player = Recorded(run, parameters, compute)

    def differentiate_batch(batch: Batch) -> Tensor:
        images, mirrored = batch
        return player((images.loaded(), images.labels, mirrored))

    return differentiate_batch


def differentiate(
    backbone: Backbone,
    head: nn.Module,
    batch: Batch,
    parameters: Sequence[nn.Parameter],
    config: LearnConfig,
    compute: Compute,
) -> Tensor:
    """Leave the gradient of a batch's mean cross-entropy in ``parameters``; return that, ().

    Whatever parts the batch is taken in, by memory or by processes, adds up to the same.
    """
    images, mirrored = batch
    mine = compute.group.share(len(images))
    mine_images, mine_mirrored = images.at(mine), mirrored[mine]

    def one(part: slice) -> tuple[Tensor, Sequence[Tensor]]:
        some = mine_images.at(part)
        pixels = some.loaded()
        if config.augmentation == "flip":
            pixels = flipped(pixels, mine_mirrored[part])
        with compute.autocast():
            features = pass_through(pixels)
        loss = F.cross_entropy(head(features.float()), some.labels, reduction="sum")
        loss = loss / len(images)
        gradients = torch.autograd.grad(loss, parameters)
        # In the parameter's own layout: the optimizer's kernel goes through both alike.
        return loss.detach(), [gradient.contiguous() for gradient in gradients]

    def run(parts: Parts) -> Tensor:
        total = torch.zeros((), device=images.labels.device)
        for parameter in parameters:
            parameter.grad = None
        for loss, gradients in parts.each(one):
            total += loss
            for parameter, gradient in zip(parameters, gradients, strict=True):
                whole = parameter.grad
                parameter.grad = gradient if whole is None else whole.add_(gradient)
        return total

    with backbone.passing() as pass_through:
        loss = compute.in_parts(len(mine_images), run)
    if compute.group.size == 1:
        return loss
    # A share may be empty, and has no gradient then.
    gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in parameters]
    flat = torch.cat([loss.view(1), *(gradient.flatten() for gradient in gradients)])
    compute.group.sum(flat)
    total: Tensor
    total, *pieces = flat.split([1, *(gradient.numel() for gradient in gradients)])
    for parameter, piece in zip(parameters, pieces, strict=True):
        parameter.grad = piece.view_as(parameter)
    return total.view(())


class Losses:
    """The loss of each step of an epoch, read without making anybody wait for the device.

    Attributes:
        known: Those that the device is done with, in order.
    """

    def __init__(self, epoch: int) -> None:
        self.known: list[float] = []
        self._epoch = epoch
        self._on_gpu = False
        self._coming: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def add(self, loss: Tensor) -> None:
        """Take the loss of a step, ()."""
        arrived = None
        if loss.is_cuda:
            host = torch.empty((), dtype=loss.dtype, pin_memory=True)
            loss, arrived = host.copy_(loss, non_blocking=True), torch.cuda.Event()
            arrived.record()
            self._on_gpu = True
        self._coming.append((loss, arrived))

    def look(self, *, wait: bool = False) -> None:
        """Take in what has arrived; all, if ``wait``.

        Raises:
            InvalidInputError: a loss is NaN or infinite. On a GPU that is told only after ``wait``:
                all processes of a group must find it at the same step.
        """
        while self._coming:
            loss, arrived = self._coming[0]
            if arrived is not None:
                if wait:
                    arrived.synchronize()
                elif not arrived.query():
                    break
            self.known.append(loss.item())
            self._coming.popleft()
        bad = [loss for loss in self.known if not math.isfinite(loss)]
        if bad and (wait or not self._on_gpu):
            raise diverged(f"in epoch {self._epoch + 1}, the loss is {bad[0]}")


def diverged(how: str) -> InvalidInputError:
    """Return what to raise when numbers are no longer finite."""
    return InvalidInputError(
        f"training diverged: {how}. Choose a lower learning rate.", field="learning_rate"
    )


def optimizer_for(
    expansions: list[nn.Parameter], head: list[nn.Parameter], config: LearnConfig
) -> torch.optim.Optimizer:
    """Return the optimizer; each group's ``scale`` is its share of the learning rate."""
    scale = (config.head_learning_rate or config.learning_rate) / config.learning_rate
    groups = [
        {"params": part, "scale": share}
        for part, share in ((expansions, 1.0), (head, scale))
        if part
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, fused=True)
    return torch.optim.Adam(groups, fused=True)


@dataclass
class Watch:
    """Notices when the held-out images stop getting better, and keeps the best parameters."""

    on: bool
    lowest: float = math.inf
    epochs: int = 0
    since: int = 0
    best: list[Tensor] | None = None

    @property
    def over(self) -> bool:
        """Whether to stop."""
        return self.since >= PATIENCE

    def note(self, loss: float, parameters: list[nn.Parameter]) -> None:
        """Take note of an epoch's held-out loss."""
        self.epochs += 1
        if loss < self.lowest:
            self.lowest, self.since = loss, 0
            self.best = [part.detach().clone() for part in parameters]
        else:
            self.since += 1

    def restore(self, parameters: list[nn.Parameter]) -> int:
        """Go back to the best epoch, and return which it was, from 1; 0 if none was looked at."""
        with torch.no_grad():
            for part, best in zip(parameters, self.best or [], strict=False):
                part.copy_(best)
        return self.epochs - self.since


@dataclass
class Training:
    """All that changes from epoch to epoch."""

    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    watch: Watch
    tracker: Tracker

    def state(self) -> dict[str, Any]:
        """Return a copy, as ``Checkpoint.save`` takes it."""
        return {
            "parameters": [part.detach() for part in self.parameters],
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "watch": asdict(self.watch),
            "losses": self.tracker.losses,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go to where ``state`` was taken."""
        with torch.no_grad():
            for part, saved in zip(self.parameters, state["parameters"], strict=True):
                part.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        for name, value in state["watch"].items():
            setattr(self.watch, name, value)
        self.tracker.losses[:] = state["losses"]


@torch.no_grad()
def held_out_loss(
    backbone: Backbone, head: nn.Module, images: Images, config: LearnConfig, compute: Compute
) -> float:
    """Return the mean cross-entropy of ``images``."""
    mine = images.at(compute.group.share(len(images)))

    def one(part: slice) -> Tensor:
        some = mine.at(part)
        with compute.autocast():
            features = pass_through(some.loaded())
        return F.cross_entropy(head(features.float()), some.labels, reduction="sum")

    def run(parts: Parts) -> Tensor:
        total = torch.zeros((), device=images.labels.device)
        for loss in parts.each(one):
            total += loss
        return total

    with backbone.passing() as pass_through:
        total = compute.in_parts(len(mine), run, config.batch_size)
    compute.group.sum(total)
    return float(total) / len(images)


def learning_rate_at(config: LearnConfig, epoch: int, epochs: int, done: float) -> float:
    """Return the learning rate in ``epoch`` (from 0) of ``epochs``, a share ``done`` of all of it.

    "published" lags one epoch behind the cosine that its authors wrote down: the base rate is used
    for two epochs, and the smallest never. "step" is the published one for SGD.
    """
    if config.schedule == "step":
        return config.learning_rate * (0.1 if 5 * epoch >= 4 * epochs else 1.0)
    if config.schedule == "published":
        angle = 99 * math.pi * max(epoch - 1, 0) / (200 * max(epochs - 1, 1))
        return config.learning_rate * math.cos(angle)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def flipped(pixels: Tensor, which: Tensor) -> Tensor:
    """Return images (n, S, S', 3), those mirrored that ``which`` (n,) bool says."""
    return torch.where(which[:, None, None, None], pixels.flip(2), pixels)
