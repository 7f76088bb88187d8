"""The training of one task: A_t by gradient descent against heads that know each other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inflora_core.adapters import AdaptedQKV
from inflora_core.backbone import Backbone
from inflora_core.checkpoint import Checkpoint, fingerprint
from inflora_core.config import LearnConfig
from inflora_core.errors import InvalidInputError
from inflora_core.model import Array
from inflora_core.progress import Tracker

PATIENCE = 3
"""Epochs without a lower loss on the held-out images after which training ends."""

FEWEST_TO_STOP = 20
"""Held-out images that it takes to say so."""


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

    def with_upside_down(self, label: int) -> Images:
        """Return these and a copy of each, turned by half, as images of class ``label``."""
        return Images(
            torch.cat([self.pixels, self.pixels.flip(1, 2)]),
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
    sides = []
    for mask in (~held_out, held_out):
        sides.append(
            Images(
                torch.from_numpy(pixels[mask]).to(device),
                torch.from_numpy(labels[mask]).to(device),
            )
        )
    return sides[0], sides[1]


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
    beginning = fingerprint(
        config.model_dump_json(),
        [
            *(branch.reduction for branch in branches.values()),
            *expansions,
            *head.state_dict().values(),
            # Pixels are covered by the reductions, which follow from them to the last bit.
            *(images.labels, held_out.labels),
        ],
    )
    if saved := checkpoint.load(beginning):
        training.restore(saved)
    while len(tracker.losses) < tracker.epochs and not watch.over:
        epoch = len(tracker.losses)
        tracker.losses.append([])
        order = torch.arange(len(images))
        if config.shuffle:
            order = torch.randperm(len(images), generator=generator)
        for step, index in enumerate(order.split(config.batch_size)):
            batch = images.at(index.to(images.labels.device))
            pixels = augment(batch.pixels, config.augmentation, generator)
            loss = F.cross_entropy(head(backbone.module(backbone.normalise(pixels))), batch.labels)
            if not loss.isfinite():
                raise diverged(f"in epoch {epoch + 1}, the loss is {loss.item()}")
            done = (epoch + step / steps) / tracker.epochs
            for group in optimizer.param_groups:
                group["lr"] = group["scale"] * learning_rate_at(config, epoch, tracker.epochs, done)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            tracker.losses[-1].append(loss.item())
            tracker.step((epoch + (step + 1) / steps) / tracker.epochs)
        if watch.on:
            watch.note(held_out_loss(backbone, head, held_out, config), parameters)
        checkpoint.save(beginning, training.state())
    return watch.restore(parameters) or len(tracker.losses)


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
        return torch.optim.SGD(groups, momentum=0.9)
    return torch.optim.Adam(groups)


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


@torch.inference_mode()
def held_out_loss(
    backbone: Backbone, head: nn.Module, images: Images, config: LearnConfig
) -> float:
    """Return the mean cross-entropy of ``images``."""
    losses = []
    for start in range(0, len(images), config.batch_size):
        pixels = images.pixels[start : start + config.batch_size]
        labels = images.labels[start : start + config.batch_size]
        logits = head(backbone.module(backbone.normalise(pixels)))
        losses.append(F.cross_entropy(logits, labels, reduction="sum"))
    return float(torch.stack(losses).sum()) / len(images)


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


def augment(pixels: Tensor, augmentation: str, generator: torch.Generator) -> Tensor:
    """Return training images (n, S, S', 3) uint8 after random changes."""
    if augmentation == "none":
        return pixels
    mirrored = torch.rand(len(pixels), generator=generator) < 0.5
    return torch.where(mirrored.to(pixels.device)[:, None, None, None], pixels.flip(2), pixels)
