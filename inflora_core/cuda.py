"""The classifier on a GPU: arrays that stay where they are, and runs that are recorded once.

A run of a small model is over before its hundreds of kernels have been launched one after the
other. A CUDA graph launches them together, but only as they were recorded: for one size of batch,
with the same memory. So there is a recording for every power of two, and batches are filled up.

All runs of all versions, and the end of each, take place in one thread. While one is recorded, CUDA
refuses others' memory calls, so a version that is being loaded would fail the calls that another
one answers; and onnxruntime keeps recordings for the thread that made them.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray


@dataclass(frozen=True)
class _Slot:
    """What runs of one size use."""

    inputs: ort.OrtValue
    outputs: dict[str, ort.OrtValue]
    binding: ort.IOBinding
    options: ort.RunOptions


class BoundSession:
    """A session whose inputs and outputs lie on its device; is used as onnxruntime's own is.

    Safe to call from several threads.

    Args:
        session: Of one input, (n, ...) float32, and outputs of (n, ...) float32, n open.
        open_sides: Length of each side that the session's outputs leave open, by its name.
        device: Where it runs: ``cuda`` or ``cpu``, of onnxruntime's names.
        most: Images of a run, a power of two; larger batches are several runs.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        open_sides: dict[str, int],
        *,
        device: str = "cuda",
        most: int = 64,
    ) -> None:
        self._held = [session]
        self._open_sides = open_sides
        self._device = device
        self._most = most
        self._slots: dict[int, _Slot] = {}
        # It may be collected anywhere, also within a lock that handing work to a thread takes.
        weakref.finalize(self, _unused.append, (self._slots, self._held)).atexit = False

    def run(
        self, names: Sequence[str], feeds: Mapping[str, NDArray[np.float32]]
    ) -> list[NDArray[np.float32]]:
        """Return the outputs of these names, each (n, ...) float32, for n >= 1 inputs."""
        (inputs,) = feeds.values()
        parts = [
            _thread().submit(self._run, inputs[start : start + self._most]).result()
            for start in range(0, len(inputs), self._most)
        ]
        if len(parts) == 1:
            return [parts[0][name] for name in names]
        return [np.concatenate([part[name] for part in parts]) for name in names]

    def get_providers(self) -> list[str]:
        """Return what runs it, in order of preference."""
        return list(self._held[0].get_providers())

    def get_outputs(self) -> list[ort.NodeArg]:
        """Return what it says of its outputs."""
        return list(self._held[0].get_outputs())

    def _run(self, inputs: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        while _unused:
            slots, held = _unused.popleft()
            slots.clear()  # first: they are of the session
            held.clear()
        size = 1 << (len(inputs) - 1).bit_length()
        slot = self._slots.get(size)
        if slot is None:
            slot = self._slots[size] = self._slot(size, inputs.shape[1:])
        rows = len(inputs)
        if rows < size:
            inputs = np.concatenate(
                [inputs, np.zeros((size - rows, *inputs.shape[1:]), np.float32)]
            )
        slot.inputs.update_inplace(np.ascontiguousarray(inputs))
        self._held[0].run_with_iobinding(slot.binding, slot.options)
        # Copies: on a CPU they would show what the next run puts there.
        return {name: value.numpy()[:rows].copy() for name, value in slot.outputs.items()}

    def _slot(self, size: int, shape: Sequence[int]) -> _Slot:
        session = self._held[0]
        (source,) = session.get_inputs()
        inputs = self._value((size, *shape))
        binding = session.io_binding()
        binding.bind_ortvalue_input(source.name, inputs)
        outputs = {}
        for node in session.get_outputs():
            sides = [size, *(self._open_sides.get(side, side) for side in node.shape[1:])]
            value = self._value(sides)
            outputs[node.name] = value
            binding.bind_ortvalue_output(node.name, value)
        options = ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(size))
        return _Slot(inputs, outputs, binding, options)

    def _value(self, shape: Sequence[int]) -> ort.OrtValue:
        return ort.OrtValue.ortvalue_from_shape_and_type(shape, np.float32, self._device, 0)


_unused: deque[tuple[dict[int, _Slot], list[ort.InferenceSession]]] = deque()
"""Of sessions that nobody holds any more; the next run ends them."""


@cache
def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "cuda")
