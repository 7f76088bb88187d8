"""Linear heads on the final features: how a task's head starts and is trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def random_head(embedding_size: int, classes: int, seed: int) -> nn.Linear:
    """Return a head with random weights as ``nn.Linear`` draws them, as the published code does."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(embedding_size, classes)


def class_means_head(features: Tensor, labels: Tensor, classes: int) -> nn.Linear:
    """Return the head that assigns the class with the nearest mean.

    ``-|z - mu_c|^2 / (2 s^2)`` less its part that is the same for all classes is linear in z:
    weight ``mu_c / s^2``, bias ``-|mu_c|^2 / (2 s^2)``. Logits of heads that were made apart can be
    compared, which those of heads from random weights cannot.

    Args:
        features: (n, e) final features of the task's images.
        labels: (n,) positions of their classes, each class at least once.
        classes: Number of classes.
    """
    one_hot = nn.functional.one_hot(labels, classes).to(features)
    means = (one_hot.mT @ features) / one_hot.sum(0)[:, None]
    scale = SCALE / features.shape[1]
    head = nn.Linear(features.shape[1], classes, device=features.device)
    with torch.no_grad():
        head.weight.copy_(means * scale)
        head.bias.copy_(-0.5 * scale * means.square().sum(1))
    return head


SCALE = 2.0
"""1 / s^2 times e: timm's backbones end in a LayerNorm, so features have about unit variance."""
