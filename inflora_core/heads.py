"""Linear heads on the final features, and the statistics of the classes they are made from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inflora_core.model import Array, ContinualModel

RIDGE = 0.01
"""Least ridge of ``lda_head``, as a share of the mean variance of a feature."""

TEMPERATURE = 4.0
"""What LDA's logits are divided by: the few images of a task make its covariance too small."""

LARGEST_LOGIT = 30.0
"""Of a class's mean; easy classes would have logits of 1e5, which float32 cannot hold to 1e-4."""


def random_head(embedding_size: int, classes: int, seed: int) -> nn.Linear:
    """Return a head with random weights as ``nn.Linear`` draws them, as the published code does."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(embedding_size, classes)


@dataclass(frozen=True)
class ClassStatistics:
    """What is kept of the images of all classes: no image, nothing that grows with their number.

    Attributes:
        means: (classes, e) mean final features of each class.
        counts: (classes,) int64, images that a mean is over.
        scatter: (e, e) sum over all images of (z - mu_c)(z - mu_c)^T.
    """

    means: Array
    counts: Array
    scatter: Array

    @classmethod
    def of(cls, model: ContinualModel) -> ClassStatistics:
        """Return the statistics that ``model`` keeps."""
        return cls(model.class_means, model.class_counts, model.class_scatter)

    def with_classes(self, features: Tensor, labels: Tensor, classes: int) -> ClassStatistics:
        """Append ``classes`` new classes.

        Args:
            features: (n, e) final features of the new classes' images.
            labels: (n,) positions among the new classes, each class at least once.
            classes: Number of new classes.
        """
        rows = features.double()
        one_hot = F.one_hot(labels, classes).double()
        counts = one_hot.sum(0)
        means = (one_hot.mT @ rows) / counts[:, None]
        deviations = rows - means[labels]
        scatter = (deviations.mT @ deviations).cpu().numpy()
        return ClassStatistics(
            np.concatenate([self.means, means.float().cpu().numpy()]),
            np.concatenate([self.counts, counts.long().cpu().numpy()]),
            (self.scatter + scatter).astype(np.float32),
        )


def lda_head(statistics: ClassStatistics) -> tuple[Array, Array]:
    """Linear discriminant analysis over all classes: heads of different tasks can be compared.

    With the shared covariance S, ``w_c = S^-1 (mu_c - m)`` and ``b_c = -w_c (mu_c + m) / 2``, m
    being the mean of the means; equal priors. S gets a ridge of its mean variance times
    max(RIDGE, e / (20 n)) for n images. Logits are divided by TEMPERATURE, or by as much as keeps
    those of the means within LARGEST_LOGIT; neither changes which class wins.

    Returns:
        Weight (classes, e) and bias (classes,), float32.
    """
    means = statistics.means.astype(np.float64)
    classes, size = means.shape
    images = int(statistics.counts.sum())
    covariance = statistics.scatter.astype(np.float64) / max(images - classes, 1)
    # With one image a class there is no deviation: then the nearest mean is all that can be said.
    variance = covariance.trace() / size or float(np.mean(means**2)) or 1.0
    ridge = max(RIDGE, size / (20 * images))
    centre = means.mean(0)
    weight = np.linalg.solve(covariance + ridge * variance * np.eye(size), (means - centre).T).T
    bias = -0.5 * (weight * (means + centre)).sum(1)
    largest = float(np.abs(means @ weight.T + bias).max())
    divisor = max(TEMPERATURE, largest / LARGEST_LOGIT)
    return (weight / divisor).astype(np.float32), (bias / divisor).astype(np.float32)
