"""Where the training of a task stands, after each epoch, in one file beside the task's examples.

A checkpoint is taken up only if training begins from the same bits as the one that wrote it: its
fingerprint covers settings, reductions, initial head, labels and what computes. On a CPU the result
is then that of a training that was never interrupted, to the bit.
"""

from __future__ import annotations

import hashlib
import io
import logging
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inflora_core import durable, failpoints
from inflora_core.spool import CHECKPOINT

log = logging.getLogger(__name__)


class Checkpoint:
    """One checkpoint, which replaces the one before.

    Args:
        folder: Where the file is; None keeps nothing.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._path = folder / CHECKPOINT if folder else None

    def load(self, fingerprint: str) -> dict[str, Any] | None:
        """Return what ``save`` was given, or None where there is nothing that fits."""
        if self._path is None or not self._path.exists():
            return None
        content = self._path.read_bytes()
        digest, _, data = content.partition(b"\n")
        if hashlib.sha256(data).hexdigest().encode() != digest:
            log.warning("%s does not have its checksum; training begins anew", self._path)
            return None
        try:
            state: dict[str, Any] = torch.load(io.BytesIO(data), weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
            log.warning("%s is of another release; training begins anew: %s", self._path, error)
            return None
        if state["fingerprint"] != fingerprint:
            log.info("the checkpoint began from something else; training begins anew")
            return None
        return state

    def save(self, fingerprint: str, state: dict[str, Any]) -> None:
        """Keep ``state``: tensors, numbers, text, and lists and dictionaries of them.

        A disk that does not take it costs time after a crash, and nothing else.
        """
        if self._path is None:
            return
        buffer = io.BytesIO()
        torch.save(state | {"fingerprint": fingerprint}, buffer)
        data = buffer.getvalue()
        try:
            failpoints.reach("checkpoint.replace")
            durable.replace(self._path, hashlib.sha256(data).hexdigest().encode() + b"\n" + data)
            failpoints.reach("checkpoint.replaced")
        except OSError as error:
            log.warning("no checkpoint could be written: %s", error)


def fingerprint(settings: str, tensors: Iterable[Tensor]) -> str:
    """Return what tells one beginning of training from any other.

    Args:
        settings: Of the task, as text.
        tensors: All that training begins from.
    """
    digest = hashlib.sha256(settings.encode())
    digest.update(f"{torch.__version__} {torch.get_num_threads()}".encode())
    for tensor in tensors:
        digest.update(f"{tensor.device} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
