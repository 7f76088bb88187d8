"""A training step that is recorded on a GPU once and played back from then on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from inflora_core.compute import Compute

log = logging.getLogger(__name__)


class Recorded:
    """A function from tensors to a tensor that leaves gradients, played back where it can be.

    A step is some thousand short kernels. A processor takes 30 ms to start them, however few images
    there are; an H100 is done with 32 images of a small model in 4 ms (docs/benchmarks.md).

    Inputs of the first call decide the shapes: others are computed as they come, and so is
    everything where recording fails.

    Args:
        run: Called with the inputs. It must do the same whatever is in them, wait for nothing, and
            leave gradients in ``parameters``, not add to those that are there.
        parameters: Whose gradients it leaves.
        compute: Of a GPU. What it knows of memory is as before where recording fails.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Tensor]], Tensor],
        parameters: Sequence[nn.Parameter],
        compute: Compute,
    ) -> None:
        self._run = run
        self._parameters = parameters
        self._compute = compute
        self._fails = False
        self._stream = torch.cuda.Stream(compute.device)
        self._inputs: list[Tensor] = []
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result = torch.empty(0)
        self._gradients: list[Tensor | None] = []

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        """Return what ``run`` makes of ``inputs``; the next call may overwrite it."""
        if not self._inputs:
            return self._rehearse(inputs)
        fit = all(x.shape == kept.shape for x, kept in zip(inputs, self._inputs, strict=True))
        if self._fails or not fit:
            return self._run(inputs)
        for kept, given in zip(self._inputs, inputs, strict=True):
            kept.copy_(given)
        if self._graph is None and not self._record():
            return self._run(inputs)
        assert self._graph is not None
        self._graph.replay()
        # Calls that were not played back have left others.
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        return self._result

    def _rehearse(self, inputs: Sequence[Tensor]) -> Tensor:
        """Run once beside the recording's stream: what is set up lazily must not be recorded."""
        self._inputs = [torch.empty_like(x) for x in inputs]
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            result = self._run(inputs)
        torch.cuda.current_stream().wait_stream(self._stream)
        return result

    def _record(self) -> bool:
        """Record, and tell whether that worked. Nothing is computed."""
        most = self._compute.most
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads of the process may do what a recording forbids.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._result = self._run(self._inputs)
        except (RuntimeError, MemoryError) as error:
            # The recording has memory of its own, and there may be none left for it.
            log.warning("steps are not recorded: %s", str(error)[:200])
            self._fails, self._compute.most = True, most
            return False
        self._graph = graph
        self._gradients = [parameter.grad for parameter in self._parameters]
        return True
