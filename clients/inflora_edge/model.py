"""Answers from an exported file."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from PIL import Image, ImageOps

from inflora_edge.errors import ImageError, ModelError

_OUTPUTS = ("logits", "probabilities", "embedding", "novelty")


@dataclass(frozen=True)
class Prediction:
    """What a model says about one image.

    Attributes:
        classes: All labels, the likeliest first.
        probabilities: Of each of them; they sum to 1.
        novelty: 0 (as known images look) to 1 (like nothing that was learned).
        version: The version that answered.
    """

    classes: tuple[str, ...]
    probabilities: tuple[float, ...]
    novelty: float
    version: int

    @property
    def label(self) -> str:
        """The likeliest class."""
        return self.classes[0]


class Model:
    """A version, ready to answer. Safe to call from several threads at once.

    Args:
        path: An exported file: ``model.onnx``, a smaller form of it, or an ``.ort`` file of one.
        threads: That a prediction may use; 0: one for each processor.

    Attributes:
        classes: Labels of the classes it knows.
        version: Its number.
        form: ``fp16`` or ``int8``; empty for ``model.onnx``.

    Raises:
        ModelError: it cannot be read, or is not one of ours.
    """

    def __init__(self, path: Path, threads: int = 0) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        # Where memory is little: an arena keeps the most that any image ever took.
        options.enable_cpu_mem_arena = False
        try:
            self._session = ort.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
            said = self._session.get_modelmeta().custom_metadata_map
            self.classes: tuple[str, ...] = tuple(json.loads(said["classes"]))
            self.version = int(said["version"])
            self.form: str = said.get("form", "")
        except MemoryError:
            raise
        except Exception as error:  # onnxruntime's have no common class that it would export
            raise ModelError(f"{path} is no model of InfLoRA Server: {error}") from error
        if not self.classes:
            raise ModelError(f"{path} knows no class")

    def predict(self, image: bytes | Path | Image.Image | NDArray[np.uint8]) -> Prediction:
        """Classify one image.

        Args:
            image: A file's content or its path, a Pillow image, or (h, w, 3) uint8 RGB.

        Raises:
            ImageError: it cannot be read.
            ModelError: the model does not answer.
        """
        pixels = _pixels(image)
        try:
            found = self._session.run(_OUTPUTS, {"images": pixels[None]})
            probabilities, novelty = found[1][0], found[3][0]
            order = np.argsort(-found[0][0], kind="stable")
            return Prediction(
                tuple(self.classes[i] for i in order),
                tuple(float(probabilities[i]) for i in order),
                float(novelty),
                self.version,
            )
        except MemoryError:
            raise
        except Exception as error:  # onnxruntime's, or it gives other outputs than ours do
            raise ModelError(f"version {self.version} does not answer: {error}") from error

    def check(self) -> None:
        """See that it answers at all, before anything depends on it.

        Raises:
            ModelError: it does not, or its answers make no sense.
        """
        noise = np.random.default_rng(0).integers(0, 256, (61, 83, 3), np.uint8)
        answer = self.predict(noise)
        probabilities = np.array(answer.probabilities)
        sound = (
            len(answer.probabilities) == len(self.classes)
            and np.isfinite(probabilities).all()
            and abs(probabilities.sum() - 1) < 1e-3
            and 0 <= answer.novelty <= 1
        )
        if not sound:
            raise ModelError(f"version {self.version} answers what makes no sense: {answer}")


def _pixels(image: bytes | Path | Image.Image | NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return (h, w, 3) uint8 RGB, upright, what is transparent in front of white."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ImageError(f"an array of {image.dtype} {image.shape} is no (h, w, 3) uint8")
        return image
    try:
        if isinstance(image, bytes | Path):
            image = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)
        picture = ImageOps.exif_transpose(image)
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(white, picture)
        return np.asarray(picture.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError(f"the image cannot be read: {error}") from error
