"""The low-rank branch beside a frozen fused ``qkv``, on its K and V rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inflora_core.model import Factors


class AdaptedQKV(nn.Module):
    """``qkv(x)`` plus, on the K and V rows, ``A_t (B_t x)``.

    The branch is never formed as a d x d matrix: ``x B^T`` is computed once for K and V, then the
    thin product (paper, section 4.1).

    Args:
        qkv: The frozen linear layer, d to 3a.
        reduction: B_t (r, d), kept as a buffer: designed, not trained.
    """

    reduction: Tensor

    def __init__(self, qkv: nn.Module, reduction: Tensor) -> None:
        super().__init__()
        self.qkv = qkv
        weight = qkv.get_parameter("weight")
        self.register_buffer("reduction", reduction.to(weight))
        self.expansion = nn.Parameter(weight.new_zeros(len(weight) // 3 * 2, len(reduction)))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d) to (..., 3a)."""
        frozen: Tensor = self.qkv(x)
        branch = F.linear(F.linear(x, self.reduction), self.expansion)
        return frozen + F.pad(branch, (frozen.shape[-1] - branch.shape[-1], 0))

    @property
    def factors(self) -> Factors:
        """A_t (2a, r) and B_t (r, d) as they are now, float32."""
        return Factors(
            self.expansion.detach().float().cpu().numpy().copy(),
            self.reduction.detach().float().cpu().numpy().copy(),
        )


@contextmanager
def adapted(
    attention: Mapping[str, nn.Module], reductions: Mapping[str, Tensor]
) -> Iterator[dict[str, AdaptedQKV]]:
    """Put a branch beside the ``qkv`` of every attention layer in ``reductions``, for a while.

    Args:
        attention: Attention modules by layer name; ``module.qkv`` is replaced and put back.
        reductions: B_t (r, d) by layer name; a layer with r = 0 gets no branch.
    """
    branches = {}
    frozen = {name: module.get_submodule("qkv") for name, module in attention.items()}
    try:
        for name, reduction in reductions.items():
            if len(reduction):
                branches[name] = AdaptedQKV(frozen[name], reduction)
                attention[name].qkv = branches[name]
        yield branches
    finally:
        for name, module in attention.items():
            module.qkv = frozen[name]


@torch.no_grad()
def set_key_value(qkv: nn.Module, key_value: Tensor) -> None:
    """Write merged K and V rows (2a, d) into the fused weight; Q rows stay as they are."""
    weight = qkv.get_parameter("weight")
    weight[len(weight) - len(key_value) :].copy_(key_value)
