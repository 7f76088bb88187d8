"""The low-rank branch beside a frozen fused ``qkv``, on its K and V rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inflora_core.model import Factors


class _Branched(torch.autograd.Function):
    """``x W^T + b`` with ``(x B^T) A^T`` added in place to the last columns.

    Autograd would pad the branch to the width of the frozen product, add the two in a pass of their
    own, keep x, and do all of that once more backwards. Here BLAS adds up while it multiplies, and
    all that is kept is B x^T, (r, tokens).
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor | None) -> Tensor:
        """Return (..., 3a) for x (..., d), W (3a, d), b (3a,) or None, B (r, d) and A (2a, r)."""
        x, weight, bias, reduction, expansion = inputs
        assert x is not None
        assert weight is not None
        assert reduction is not None
        assert expansion is not None
        # (r, tokens), like the thin product in the backward pass: on CPUs, BLAS takes half as long
        # for that as for (tokens, r).
        reduced = reduction @ x.flatten(0, -2).mT
        result = F.linear(x, weight, bias)
        result.flatten(0, -2)[:, -len(expansion) :].addmm_(reduced.mT, expansion.mT)
        ctx.save_for_backward(reduced, weight, reduction, expansion)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, if it needs one, and of A; no other input is trained."""
        reduced, weight, reduction, expansion = ctx.saved_tensors
        (gradient,) = gradients
        rows = gradient.flatten(0, -2)
        branch = rows[:, -len(expansion) :]
        of_x = None
        if ctx.needs_input_grad[0]:
            thin = expansion.mT.contiguous() @ branch.mT
            of_x = (rows @ weight).addmm_(thin.mT, reduction)
            of_x = of_x.view(*gradient.shape[:-1], -1)
        return of_x, None, None, None, (reduced @ branch).mT


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
        kind = x.device.type
        half = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        layer: Any = self.qkv
        inputs = (x, layer.weight, layer.bias, self.reduction, self.expansion)
        result: Tensor = _Branched.apply(
            *(each if each is None else each.to(half) for each in inputs)
        )
        return result

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
