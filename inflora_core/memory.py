"""GradientMemory: what old tasks use of one layer's input space (DualGPM)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from inflora_core import subspace
from inflora_core.config import Criterion, FirstTask
from inflora_core.model import Array, LayerState
from inflora_core.moments import SecondMoment


@dataclass(frozen=True)
class GradientMemory:
    """The protected directions M_t of one layer, and how much old tasks use which direction.

    Attributes:
        basis: Q (d, d) float64, orthonormal columns; the first ``protected`` are M.
        protected: k, 0 to d.
        moment: C_old (d, d) float64, mean over all old tasks' tokens.
        tokens: How many tokens that are; some stand for others (``config.design_images``).
    """

    basis: Tensor
    protected: int
    moment: Tensor
    tokens: int

    @classmethod
    def of(cls, layer: LayerState, device: torch.device) -> GradientMemory:
        """Read the memory from a layer's state (float32), orthonormal again in float64."""
        basis = torch.from_numpy(layer.basis).to(device, torch.float64)
        moment = torch.from_numpy(layer.moment).to(device, torch.float64)
        return cls(subspace.orthonormalise(basis), layer.protected, moment, layer.tokens)

    def state(self, key_value: Array) -> LayerState:
        """Return the layer's state to keep, with the merged K and V rows (2a, d)."""
        return LayerState(
            key_value=key_value,
            basis=_float32(self.basis),
            protected=self.protected,
            moment=_float32(self.moment),
            tokens=self.tokens,
        )

    @property
    def free(self) -> int:
        """D - k."""
        return self.basis.shape[1] - self.protected

    def design(self, moment: Tensor, rank: int, criterion: Criterion) -> Tensor:
        """Return B_t (r, d); see ``subspace.design_reduction``."""
        return subspace.design_reduction(moment, self.basis, self.protected, rank, criterion)

    def extend(
        self,
        moment: SecondMoment,
        threshold: float,
        criterion: Criterion,
        first_task: FirstTask,
    ) -> GradientMemory:
        """Return the memory after a task whose inputs have the second moment ``moment``."""
        basis, protected = subspace.extend_basis(
            moment.mean,
            self.basis,
            self.protected,
            threshold,
            criterion,
            first_task if self.tokens == 0 else None,
        )
        tokens = self.tokens + moment.tokens
        share = moment.tokens / tokens
        mixed = (1 - share) * self.moment + share * moment.mean
        return GradientMemory(basis, protected, mixed, tokens)


def _float32(matrix: Tensor) -> Array:
    return np.ascontiguousarray(matrix.cpu().numpy(), np.float32)
