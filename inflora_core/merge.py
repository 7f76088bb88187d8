"""Merge a task's factors into the K and V weights: the same bits on every processor. No torch."""

from __future__ import annotations

import numpy as np

from inflora_core.model import Array, Factors


def merge(key_value: Array, factors: Factors) -> Array:
    """Return ``float32(float64(key_value) + expansion @ reduction)`` (docs/method.md, step 4).

    The product is accumulated over the rank in order, elementwise. A product of two float32 values
    is exact in float64, so neither a fused multiply-add nor a BLAS's order of summation can change
    the result, as they would change ``expansion @ reduction``.

    Args:
        key_value: (2a, d) float32.
        factors: expansion (2a, r) and reduction (r, d), float32.

    Returns:
        (2a, d) float32, a new array.
    """
    total = key_value.astype(np.float64)
    expansion = factors.expansion.astype(np.float64)
    reduction = factors.reduction.astype(np.float64)
    for column, row in zip(expansion.T, reduction, strict=True):
        total += column[:, None] * row
    return total.astype(np.float32)


def product(factors: Factors) -> Array:
    """Return dW = A_t B_t, (2a, d) float64, for measurements (not for merging)."""
    return np.asarray(factors.expansion.astype(np.float64) @ factors.reduction.astype(np.float64))
