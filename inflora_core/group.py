"""Processes that learn together: one by default, many under ``torchrun``.

Each works on its share of every batch; sums, features and moments are reduced, so that all of them
hold the same numbers. Whatever only one can do (talk to the server, write) is done by rank 0, and
what has to be equal to the bit on all comes from there, too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

_FOREVER = timedelta(days=365)
"""Between two tasks, others wait for rank 0. A rank that is lost is noticed all the same: its
connections break."""


class LostRankError(Exception):
    """Another process of the group is gone, and with it what it was working on."""


@dataclass(frozen=True)
class Group:
    """Who learns together, and what they tell each other; alone, nothing has to be told.

    Attributes:
        rank: Of this process, from 0.
        size: Processes.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def of_environment(cls, device: torch.device) -> Group:
        """Join the group that ``torchrun`` describes in the environment, if it does.

        Raises:
            LostRankError: others do not come.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        with _telling_loss():
            dist.init_process_group(backend, timeout=_FOREVER)
        return cls(dist.get_rank(), size)

    @property
    def leads(self) -> bool:
        """Whether this is the process that talks and writes."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """Return this process's part of ``count`` rows; parts differ by one row at the most."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def sum(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over all processes, the same bits on all of them."""
        if self.size > 1:
            with _telling_loss():
                for tensor in tensors:
                    dist.all_reduce(tensor)

    def joined(self, rows: Tensor, count: int) -> Tensor:
        """Return all of ``count`` rows, of which ``rows`` are this process's share."""
        if self.size == 1:
            return rows
        whole = rows.new_empty((count, *rows.shape[1:]))
        with _telling_loss():
            for rank in range(self.size):
                part = whole[Group(rank, self.size).share(count)]
                if rank == self.rank:
                    part.copy_(rows)
                if part.numel():
                    dist.broadcast(part, rank)
        return whole

    def told(self, value: T) -> T:
        """Return what rank 0 has for ``value``; it can be pickled."""
        if self.size == 1:
            return value
        values: list[Any] = [value]
        with _telling_loss():
            dist.broadcast_object_list(values, device=torch.device("cpu"))
        told: T = values[0]
        return told


@contextmanager
def _telling_loss() -> Iterator[None]:
    """Turn what torch says of a broken connection into an error that says so."""
    try:
        yield
    except RuntimeError as error:  # torch.distributed.DistError is one, and gloo raises plain ones
        raise LostRankError(str(error)) from error
