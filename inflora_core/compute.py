"""What the learner computes with: device, precision, other processes, what fits in memory."""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Literal, TypeVar

import torch

from inflora_core import allocator
from inflora_core.group import Group
from inflora_core.predictor import NO_MEMORY

log = logging.getLogger(__name__)

T = TypeVar("T")

Precision = Literal["auto", "float32", "bfloat16"]


LEAST_ABREAST = 8
"""Images of a part that is taken beside others, at the least: with fewer, threads would wait for
each other's Python."""


@dataclass(frozen=True)
class Parts:
    """Some rows, in parts.

    Attributes:
        slices: The parts, in order.
        abreast: How many of them are taken at the same time, by threads that share out torch's.
    """

    slices: Sequence[slice]
    abreast: int

    @classmethod
    def of(cls, count: int, size: int, abreast: int = 1) -> Parts:
        """Return ``count`` rows in parts, ``size`` rows at a time in ``abreast`` equal ones."""
        slices = []
        for start in range(0, count, size):
            rows = min(size, count - start)
            ends = [start + rows * i // abreast for i in range(abreast + 1)]
            slices += [slice(*pair) for pair in itertools.pairwise(ends) if pair[0] < pair[1]]
        return cls(slices, abreast)

    def each(self, one: Callable[[slice], T]) -> Iterator[T]:
        """Yield what ``one`` makes of each part, in order.

        On a processor, parts that are taken abreast are done sooner than one after the other by all
        threads: no operation waits for its slowest thread. Precision is a thread's own, so ``one``
        has to see to it; gradients are recorded as here.
        """
        if self.abreast == 1:
            yield from map(one, self.slices)
            return
        threads, differentiates = torch.get_num_threads(), torch.is_grad_enabled()

        def beside_others(part: slice) -> T:
            # It holds for this thread, and for those that begin after it.
            torch.set_num_threads(threads // self.abreast)
            with torch.set_grad_enabled(differentiates):
                return one(part)

        pool = _threads(self.abreast)
        ahead: deque[Future[T]] = deque()
        try:
            for part in self.slices:
                ahead.append(pool.submit(beside_others, part))
                if len(ahead) > self.abreast:  # not all: their results may be large
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            # Also when whoever asked for the results has had enough of them: what is under way
            # holds memory, and what it works with is about to change.
            for future in ahead:
                future.cancel()
            wait(ahead)
            torch.set_num_threads(threads)


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    """Return a pool whose threads have begun: no part fails later because one of them cannot.

    Raises:
        RuntimeError: there is no room for so many.
    """
    pool = ThreadPoolExecutor(count, thread_name_prefix="abreast")
    all_here = threading.Barrier(count)
    try:
        wait([pool.submit(all_here.wait) for _ in range(count)])
    except RuntimeError:
        all_here.abort()
        pool.shutdown()
        raise
    return pool


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

    def in_parts(self, count: int, run: Callable[[Parts], T], at_most: int = 2**31) -> T:
        """Return what ``run`` makes of ``count`` rows, given to it in parts that fit in memory.

        When memory runs out, the parts become half as large, and ``run`` begins anew: it must not
        count twice what an attempt that broke off had done.

        Args:
            count: Rows; with none, there is no part.
            run: Called with the parts.
            at_most: Rows at a time.

        Raises:
            MemoryError, torch.OutOfMemoryError: not even one row fits.
        """
        while True:
            size = max(min(self.most, at_most, count), 1)
            try:
                return run(Parts.of(count, size, self._abreast(size)))
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

    def _abreast(self, size: int) -> int:
        """Return how many parts to take at the same time, together ``size`` rows."""
        if self.device.type != "cpu":
            return 1
        threads = torch.get_num_threads()
        most = max(min(threads, size // LEAST_ABREAST), 1)
        # As many as share out the threads evenly: with 7, four parts would leave 3 idle.
        return next(parts for parts in range(most, 0, -1) if threads % parts == 0)

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
