"""The one product that a device and the server must compute alike: the same bits everywhere."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

_ROWS = 32


def add_product(weight: Floats, left: Floats, right: Floats) -> Floats:
    """Return ``float32(float64(weight) + left @ right)`` (docs/method.md, step 4).

    The product is accumulated over the rank in order, elementwise. A product of two float32 values
    is exact in float64, so neither a fused multiply-add nor a BLAS's order of summation can change
    the result, as they would change ``left @ right``. For the same reason it does not matter if all
    three are transposed.

    Args:
        weight: (n, d) float32.
        left: (n, r) float32.
        right: (r, d) float32.

    Returns:
        (n, d) float32, a new array.

    Raises:
        ValueError: their sides do not fit.
    """
    if left.shape != (len(weight), len(right)) or right.shape[1:] != weight.shape[1:]:
        raise ValueError(f"{left.shape} x {right.shape} cannot be added to {weight.shape}")
    merged = np.empty_like(weight)
    rows_of_right = right.astype(np.float64)
    # Some rows at a time, which stay in the processor's cache for all of the rank: four times as
    # fast for a large layer, and the same bits, since no element knows of another.
    for start in range(0, len(weight), _ROWS):
        rows = slice(start, start + _ROWS)
        total = weight[rows].astype(np.float64)
        term = np.empty_like(total)
        for column, row in zip(left[rows].T, rows_of_right, strict=True):
            np.multiply(column[:, None].astype(np.float64), row, out=term)
            total += term
        merged[rows] = total
    return merged
