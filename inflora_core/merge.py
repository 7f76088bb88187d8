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
    merged = np.empty_like(key_value)
    reduction = factors.reduction.astype(np.float64)
    # Some rows at a time, which stay in the processor's cache for all of the rank: four times as
    # fast for a large layer, and the same bits, since no element knows of another.
    for start in range(0, len(key_value), _ROWS):
        rows = slice(start, start + _ROWS)
        total = key_value[rows].astype(np.float64)
        term = np.empty_like(total)
        for column, row in zip(factors.expansion[rows].T, reduction, strict=True):
            np.multiply(column[:, None].astype(np.float64), row, out=term)
            total += term
        merged[rows] = total
    return merged


_ROWS = 32


def product(factors: Factors) -> Array:
    """Return dW = A_t B_t, (2a, d) float64, for measurements (not for merging)."""
    return np.asarray(factors.expansion.astype(np.float64) @ factors.reduction.astype(np.float64))
