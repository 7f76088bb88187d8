"""Merge a task's factors into the K and V weights: the same bits on every processor. No torch."""

from __future__ import annotations

import numpy as np

from inflora_core.model import Array, Factors
from inflora_edge.merging import add_product


def merge(key_value: Array, factors: Factors) -> Array:
    """Return ``float32(float64(key_value) + expansion @ reduction)`` (docs/method.md, step 4).

    A device that follows the model computes the same (``inflora_edge.merging`` says how).

    Args:
        key_value: (2a, d) float32.
        factors: expansion (2a, r) and reduction (r, d), float32.

    Returns:
        (2a, d) float32, a new array.
    """
    return add_product(key_value, factors.expansion, factors.reduction)


def product(factors: Factors) -> Array:
    """Return dW = A_t B_t, (2a, d) float64, for measurements (not for merging)."""
    return np.asarray(factors.expansion.astype(np.float64) @ factors.reduction.astype(np.float64))
