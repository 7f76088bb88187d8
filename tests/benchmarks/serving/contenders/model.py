"""The model as every peer runs it, in the peer's own environment: nothing of ours is there."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

WORKERS = int(os.environ.get("BENCH_WORKERS", "1"))
"""Copies of the model."""

THREADS = int(os.environ.get("BENCH_THREADS", "1"))
"""Threads of each."""

PORT = int(os.environ.get("BENCH_PORT", "8000"))
MORE_PORTS = [int(port) for port in os.environ.get("BENCH_MORE_PORTS", "").split(",") if port]


class Model:
    """Both parts of the ONNX file, each in a session of its own."""

    def __init__(self) -> None:
        folder = Path(os.environ["BENCH_MODEL"])
        self._preprocess = _open(folder / "preprocess.onnx", 1)
        self._classify = _open(folder / "classify.onnx", THREADS)
        metadata = self._preprocess.get_modelmeta().custom_metadata_map
        self._classes = json.loads(metadata["classes"])

    def prepare(self, content: bytes) -> np.ndarray:
        """Return the model-sized tensor of an encoded image."""
        return self.resize(Image.open(io.BytesIO(content)))

    def resize(self, image: Image.Image) -> np.ndarray:
        """Return the model-sized tensor of an image."""
        pixels = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        return self._preprocess.run(["pixels"], {"images": pixels[None]})[0]

    def labels(self, pixels: np.ndarray) -> list[str]:
        """Return the best class of each of n tensors."""
        (probabilities,) = self._classify.run(["probabilities"], {"pixels": pixels})
        return [self._classes[i] for i in probabilities.argmax(1)]


def _open(path: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
