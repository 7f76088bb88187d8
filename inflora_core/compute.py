"""What the learner computes with: device, precision, other processes, what fits in memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import torch

from inflora_core import allocator
from inflora_core.group import Group
from inflora_core.predictor import NO_MEMORY

log = logging.getLogger(__name__)

T = TypeVar("T")

Precision = Literal["auto", "float32", "bfloat16"]


@dataclass
class Compute:
    """How a task is computed; the result is the same within rounding, whatever it says.

    Attributes:
        device: Where the backbone is.
        half: Whether matrices are multiplied in bfloat16 while training. All that is summed up or
            kept (moments, features, gradients, A_t, heads) stays in float32 or better.
        group: Who learns along.
        most: Images at a time that are known to fit in memory; lowered where they do not.
        record: Whether steps on a GPU are recorded and played back, if there is no group.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    half: bool = False
    group: Group = field(default_factory=Group)
    most: int = 2**31
    record: bool = True

    @property
    def records(self) -> bool:
        """Whether steps are recorded."""
        return self.record and self.device.type == "cuda" and self.group.size == 1

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context that training multiplies matrices in."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.half)

    def in_parts(self, count: int, run: Callable[[Sequence[slice]], T], at_most: int = 2**31) -> T:
        """Return what ``run`` makes of ``count`` rows, given to it in parts that fit in memory.

        When memory runs out, the parts become half as large, and ``run`` begins anew: it must not
        count twice what an attempt that broke off had done.

        Args:
            count: Rows; with none, there is no part.
            run: Called with the parts, in order.
            at_most: Rows of a part.

        Raises:
            MemoryError, torch.OutOfMemoryError: not even one row fits.
        """
        while True:
            size = max(min(self.most, at_most, count), 1)
            parts = [slice(start, min(start + size, count)) for start in range(0, count, size)]
            try:
                return run(parts)
            except (MemoryError, RuntimeError) as error:
                # A recording would hold what this attempt has done, and do it in every step.
                if size == 1 or self._is_recording() or not is_memory_error(error):
                    raise
                log.warning("%d images at a time do not fit in memory: %s", size, str(error)[:200])
            # Here, after the error's frames and what they hold are gone.
            self.most = size // 2
            allocator.give_back()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _is_recording(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@contextmanager
def full_precision() -> Iterator[None]:
    """Keep GPUs from rounding a convolution's inputs to 10 bits (TF32), as they do by default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def is_memory_error(error: BaseException) -> bool:
    """Tell want of memory from other errors; on CPUs, torch has no type of its own for it."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or bool(
        NO_MEMORY.search(str(error))
    )


def halves(precision: Precision, device: torch.device, *, limited: bool = False) -> bool:
    """Return whether to multiply in bfloat16: where it is asked for, or the hardware does it.

    Args:
        precision: What is asked for.
        device: Where the backbone is.
        limited: Whether the process may take only so much memory.
    """
    if precision != "auto":
        return precision == "bfloat16"
    if limited and device.type == "cpu":
        # What multiplies in bfloat16 there takes memory of its own and does not look whether it got
        # any: where float32 is tried again in smaller parts, it ends with SIGSEGV.
        return False
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return _processor_multiplies_bfloat16()


def _processor_multiplies_bfloat16() -> bool:
    # Others emulate it, at a fraction of the speed of float32.
    known = (getattr(torch.cpu, name, None) for name in _BFLOAT16_PROBES)
    return any(probe() for probe in known if probe is not None)


_BFLOAT16_PROBES = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
