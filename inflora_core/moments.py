"""Second moments of layer inputs. The only file with forward hooks."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor, nn

from inflora_core.group import Group


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
        self += SecondMoment((rows.mT @ rows).double(), len(rows))

    def __iadd__(self, other: SecondMoment) -> Self:
        """Add what ``other`` has."""
        if other.total is not None:
            self.total = other.total if self.total is None else self.total + other.total
            self.tokens += other.tokens
        return self

    def sum(self, group: Group) -> None:
        """Add what the other processes of ``group`` have; each must have something."""
        if group.size == 1:
            return
        assert self.total is not None
        tokens = torch.tensor(self.tokens)
        group.sum(self.total, tokens)
        self.tokens = int(tokens)

    def standing_for(self, images: int, whole: int) -> SecondMoment:
        """Return the same of ``whole`` images, of which the ``images`` that were added are some."""
        assert self.total is not None
        return SecondMoment(self.total * whole / images, self.tokens * whole // images)

    @property
    def mean(self) -> Tensor:
        """C (d, d), float64."""
        if self.total is None:
            raise ValueError("no inputs were added")
        return self.total / self.tokens


@dataclass
class Moments:
    """The second moments of several layers."""

    by_layer: dict[str, SecondMoment]
    _apart: threading.local = field(default_factory=threading.local)

    @classmethod
    def of(cls, layers: Iterable[str]) -> Moments:
        """Return those of ``layers``, with no inputs yet."""
        return cls({name: SecondMoment() for name in layers})

    def __getitem__(self, layer: str) -> SecondMoment:
        """Return the moment of ``layer``."""
        return self.by_layer[layer]

    def __iadd__(self, other: Moments) -> Self:
        """Add what ``other`` has of the same layers."""
        for layer, moment in other.by_layer.items():
            self.by_layer[layer] += moment
        return self

    def add(self, layer: str, inputs: Tensor) -> None:
        """Add inputs (..., d) of ``layer``: here, or to what is apart in this thread."""
        getattr(self._apart, "moments", self)[layer].add(inputs)

    @contextmanager
    def apart(self) -> Iterator[Moments]:
        """Have what this thread adds meanwhile in moments of their own, to be added or forgotten.

        A forward pass that breaks off, for want of memory, has been through some layers and not
        through others; and passes side by side add in an order of their own.
        """
        self._apart.moments = apart = Moments.of(self.by_layer)
        try:
            yield apart
        finally:
            del self._apart.moments

    def standing_for(self, images: int, whole: int) -> Moments:
        """Return what ``whole`` images would have added, of which these ``images`` are a sample."""
        return Moments(
            {name: moment.standing_for(images, whole) for name, moment in self.by_layer.items()}
        )

    def sum(self, group: Group) -> None:
        """Add what the other processes have."""
        for moment in self.by_layer.values():
            moment.sum(group)


@contextmanager
def record_moments(layers: Mapping[str, nn.Module]) -> Iterator[Moments]:
    """Accumulate the second moment of each layer's input while the context lasts.

    Args:
        layers: Modules by name that are called with one tensor (..., d); for InfLoRA the ``qkv`` of
            every attention layer, whose input K and V share.
    """
    moments = Moments.of(layers)

    def hook(name: str):  # type: ignore[no-untyped-def]
        def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            with torch.autocast(args[0].device.type, enabled=False):
                moments.add(name, args[0].float() if args[0].dtype.itemsize < 4 else args[0])

        return record

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in layers.items()]
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()
