"""Second moments of layer inputs. The only file with forward hooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class SecondMoment:
    """A running C = X^T X / n, uncentred, in float64.

    The products are made in the inputs' own precision and summed in float64: chunks of any size,
    in any order, give the same C up to float32 rounding of the single products.
    """

    total: Tensor | None = None
    tokens: int = 0

    def add(self, inputs: Tensor) -> None:
        """Add inputs (..., d); every leading position counts as one token."""
        rows = inputs.detach().flatten(0, -2)
        product = (rows.mT @ rows).double()
        self.total = product if self.total is None else self.total + product
        self.tokens += len(rows)

    @property
    def mean(self) -> Tensor:
        """C (d, d), float64."""
        if self.total is None:
            raise ValueError("no inputs were added")
        return self.total / self.tokens


@dataclass
class Moments:
    """The second moments of several layers."""

    by_layer: dict[str, SecondMoment] = field(default_factory=dict)

    def __getitem__(self, layer: str) -> SecondMoment:
        """Return the moment of ``layer``."""
        return self.by_layer[layer]


@contextmanager
def record_moments(layers: Mapping[str, nn.Module]) -> Iterator[Moments]:
    """Accumulate the second moment of each layer's input while the context lasts.

    Args:
        layers: Modules by name that are called with one tensor (..., d); for InfLoRA the ``qkv`` of
            every attention layer, whose input K and V share.
    """
    moments = Moments({name: SecondMoment() for name in layers})

    def hook(name: str):  # type: ignore[no-untyped-def]
        def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            with torch.autocast(args[0].device.type, enabled=False):
                moments[name].add(args[0].float() if args[0].dtype.itemsize < 4 else args[0])

        return record

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in layers.items()]
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()
