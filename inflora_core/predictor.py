"""Answers from a published ONNX file, with onnxruntime alone.

The file is one graph from images to answers, which devices run as it is. Here it is run as two:
one prepares a single image of any size, the other takes a batch of model-sized tensors, because
images of different sizes cannot be stacked.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from inflora_core.errors import DamagedError, InvalidInputError, StateError, UnavailableError
from inflora_core.graph import IMAGES, OUTPUTS, PIXELS, ModelCard, read_metadata, split

Floats = NDArray[np.float32]

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"


@dataclass(frozen=True)
class RuntimeOptions:
    """How onnxruntime runs a model.

    Attributes:
        intra_op_threads: Threads of one run; 0 means as many as this process has processors.
        provider: ``auto`` takes CUDA where it works and the CPU otherwise; ``cuda`` and ``cpu``
            insist.
    """

    intra_op_threads: int = 0
    provider: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True)
class Answers:
    """What the model says about n images; row i belongs to image i.

    Attributes:
        logits: (n, classes) float32.
        probabilities: (n, classes) float32, each row sums to 1 over all classes.
        embedding: (n, e) float32, the features that the head reads.
        novelty: (n,) float32, how unlike everything learned; larger is stranger.
    """

    logits: Floats
    probabilities: Floats
    embedding: Floats
    novelty: Floats

    def __len__(self) -> int:
        """Return n."""
        return len(self.logits)


class Predictor:
    """One version, ready to answer. Safe to call from several threads at once.

    Build it with ``load``. ``card`` says which classes it knows and what they are called.
    """

    def __init__(
        self, card: ModelCard, preprocess: ort.InferenceSession, classify: ort.InferenceSession
    ) -> None:
        self.card = card
        self._preprocess = preprocess
        self._classify = classify

    @classmethod
    def load(cls, model: bytes | Path, options: RuntimeOptions | None = None) -> Predictor:
        """Open a composed ONNX file.

        Args:
            model: The file, or where it is.
            options: How to run it; the defaults if None.

        Raises:
            DamagedError: if the file cannot be read or is not a model of ours.
            UnavailableError: if ``provider`` is ``cuda`` and onnxruntime runs on something else.
        """
        options = options or RuntimeOptions()
        try:
            content = model.read_bytes() if isinstance(model, Path) else model
        except OSError as error:
            raise DamagedError(f"the model cannot be read: {error}") from error
        try:
            preprocess, classify = split(content)
            card = read_metadata(preprocess)
        except (DamagedError, MemoryError):
            raise
        except Exception as error:
            # A flipped bit in a name leaves bytes where protobuf promises text.
            raise DamagedError(f"the ONNX file is damaged: {str(error)[:300]}") from error
        if card.version is None or not card.classes or len(card.classes) != len(card.tasks):
            raise DamagedError("the ONNX file is a template or cut short: it has no class table")
        return cls(
            card,
            _open(preprocess, _preprocess_options(options), [CPU]),
            _open_classify(classify, options),
        )

    @property
    def provider(self) -> str:
        """The provider that really runs the model, whatever was asked for."""
        return str(self._classify.get_providers()[0])

    def preprocess(self, image: NDArray[np.uint8]) -> Floats:
        """Return the model-sized tensor of one image.

        Args:
            image: (h, w, 3) uint8, RGB, any size.

        Returns:
            (1, 3, height, width) float32, normalised as the backbone expects.
        """
        with _telling_memory():
            (pixels,) = self._preprocess.run([PIXELS], {IMAGES: image[np.newaxis]})
        return np.asarray(pixels, np.float32)

    def classify(self, pixels: Floats) -> Answers:
        """Return the answers for n >= 1 model-sized tensors.

        Args:
            pixels: (n, 3, height, width) float32, from ``preprocess``.
        """
        with _telling_memory():
            answers = self._classify.run(OUTPUTS, {PIXELS: pixels})
        return Answers(*answers)

    def predict(self, images: Sequence[NDArray[np.uint8]]) -> Answers:
        """Return the answers for n >= 1 images, each (h, w, 3) uint8 of its own size.

        Raises:
            InvalidInputError: if there is no image.
        """
        if not images:
            raise InvalidInputError("no images to predict", field="images")
        return self.classify(np.concatenate([self.preprocess(image) for image in images]))

    def warm_up(self) -> None:
        """Answer once, so that the first caller does not pay for what is set up lazily."""
        size = self.card.preprocessing
        self.predict([np.zeros((size.height, size.width, 3), np.uint8)])


def top_classes(
    answers: Answers, card: ModelCard, top_k: int, task: str | None = None
) -> list[list[tuple[str, float]]]:
    """Return the likeliest classes of each image, the likeliest first; equals by position.

    Args:
        answers: Of the version that ``card`` describes.
        card: The class table.
        top_k: At most how many classes to return, at least 1.
        task: If given, only this task's classes compete and their probabilities sum to 1.

    Raises:
        InvalidInputError: if ``top_k`` is less than 1.
        StateError: if this version has no class of ``task``.
    """
    if top_k < 1:
        raise InvalidInputError(f"top_k is {top_k}; it must be at least 1", field="top_k")
    if task is None:
        columns = np.arange(len(card.classes))
        probabilities = answers.probabilities
    else:
        columns = np.flatnonzero([owner == task for owner in card.tasks])
        if not len(columns):
            raise StateError(
                f"version {card.version} has no class of task {task!r}: the task is not learned "
                "yet, or this version is older than it",
                field="task",
            )
        probabilities = softmax(answers.logits[:, columns])
    logits = answers.logits[:, columns]
    # By logit where probabilities are equal: those of unlikely classes all round to zero.
    order = np.lexsort((-logits, -probabilities), axis=1)[:, :top_k]
    return [
        [(card.classes[columns[i]], float(row[i])) for i in best]
        for row, best in zip(probabilities, order, strict=True)
    ]


def softmax(logits: Floats) -> Floats:
    """Return (n, k) probabilities over the columns of ``logits`` (n, k), k >= 1."""
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(axis=1, keepdims=True), np.float32)


def _open_classify(model: bytes, options: RuntimeOptions) -> ort.InferenceSession:
    """Open the classifier on the provider asked for.

    Raises:
        DamagedError: if onnxruntime cannot open it at all.
        UnavailableError: if CUDA was insisted on and is not what runs.
    """
    session = None
    if options.provider != "cpu" and CUDA in ort.get_available_providers():
        _preload_cuda()
        # TF32 keeps 10 bits of every factor: logits would differ from the CPU's by 1e-3 and more,
        # and the exported file must give the server's answers.
        with contextlib.suppress(DamagedError):
            session = _open(
                model, session_options(options.intra_op_threads), [(CUDA, {"use_tf32": "0"}), CPU]
            )
    if session is None:
        session = _open(model, session_options(options.intra_op_threads), [CPU])
    actual = session.get_providers()[0]
    if options.provider == "cuda" and actual != CUDA:
        # onnxruntime itself falls back without a word; a server that was promised a GPU would be
        # ready and far too slow.
        raise UnavailableError(
            f"provider cuda was asked for, but onnxruntime fell back to {actual}: check the GPU "
            "and its driver, and that onnxruntime-gpu is installed and onnxruntime is not"
        )
    return session


def _open(model: bytes, options: ort.SessionOptions, providers: list[Any]) -> ort.InferenceSession:
    """Open a session that never changes its provider later on.

    Raises:
        DamagedError: if onnxruntime does not take the model.
        MemoryError: there is not enough.
    """
    try:
        with _telling_memory():
            return ort.InferenceSession(model, options, providers=providers, enable_fallback=0)
    except MemoryError:
        raise
    except Exception as error:
        raise DamagedError(f"onnxruntime does not take the model: {str(error)[:300]}") from error


NO_MEMORY = re.compile(
    r"bad_alloc|bad allocation|Failed to allocate memory|can't allocate memory|out of memory"
)
"""What torch and onnxruntime say in errors that are no ``MemoryError``."""


@contextlib.contextmanager
def _telling_memory() -> Iterator[None]:
    """Turn onnxruntime's errors for want of memory, which are like all others, into that."""
    try:
        yield
    except Exception as error:
        if NO_MEMORY.search(str(error)):
            raise MemoryError(str(error)) from error
        raise


def session_options(threads: int) -> ort.SessionOptions:
    """Return the settings that every session of ours shares.

    Args:
        threads: Of one run; 0 for one on each processor.
    """
    session = ort.SessionOptions()
    # Not 0: onnxruntime would pin a thread to every core of the machine, also in a container that
    # may use two of them.
    session.intra_op_num_threads = threads or processors()
    session.inter_op_num_threads = 1
    session.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    session.log_severity_level = 3  # errors
    # Idle threads would spin on the cores that learning needs.
    session.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return session


def _preprocess_options(options: RuntimeOptions) -> ort.SessionOptions:
    session = session_options(options.intra_op_threads)
    # An arena never shrinks: one photo of 60 million pixels would hold gigabytes for good. And a
    # memory plan would be kept for every size of image that ever came.
    session.enable_cpu_mem_arena = False
    session.enable_mem_pattern = False
    return session


def processors() -> int:
    """Return how many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@cache
def _preload_cuda() -> None:
    """Load the CUDA libraries of the nvidia wheels, which the system's loader does not find.

    A failure shows itself when the session is opened. What onnxruntime prints about it goes to
    stderr: stdout belongs to the program.
    """
    with contextlib.suppress(Exception), contextlib.redirect_stdout(sys.stderr):
        ort.preload_dlls(directory="")
