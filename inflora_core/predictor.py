"""Answers from a published ONNX file, with onnxruntime alone.

The file is one graph from images to answers, which devices run as it is. Here only what takes a
batch of model-sized tensors is: images of different sizes cannot be stacked, and are brought to
that size by Pillow, which takes half as long as the graph and makes the pixels that learning sees.

On CPUs, the model is opened once or twice. A run that has the processors to itself is soonest done
when all of them share its work; several runs get most done when each keeps to its own
(docs/serving.md). What a GPU is given instead is in ``cuda``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from PIL import Image

from inflora_core import allocator, wire
from inflora_core.cuda import BoundSession
from inflora_core.errors import DamagedError, InvalidInputError, StateError, UnavailableError
from inflora_core.graph import (
    CLASSES,
    EMBEDDING,
    IMAGES,
    OUTPUTS,
    PIXELS,
    ModelCard,
    read_metadata,
    split,
)
from inflora_core.images import resized
from inflora_core.model import Preprocessing
from inflora_core.passes import attention_fused, first_token, halved

log = logging.getLogger(__name__)

Floats = NDArray[np.float32]

Session: TypeAlias = ort.InferenceSession | BoundSession

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"


@dataclass(frozen=True)
class RuntimeOptions:
    """How onnxruntime runs a model.

    Attributes:
        threads: Threads of all runs together; 0 means as many as this process has processors.
        provider: ``auto`` takes CUDA where it works and the CPU otherwise; ``cuda`` and ``cpu``
            insist.
        runs: Runs on the CPU that share the threads; 0 means one for each thread.
        precision: Of the backbone on a GPU. ``float16`` is faster, and its answers are not those of
            the file to the last digit.
        record: Whether runs on a GPU are recorded, and played back from then on.
    """

    threads: int = 0
    provider: Literal["auto", "cpu", "cuda"] = "auto"
    runs: int = 1
    precision: Literal["float32", "float16"] = "float32"
    record: bool = True

    @property
    def all_threads(self) -> int:
        """Threads of all runs, and of one that is alone."""
        return self.threads or processors()

    @property
    def cpu_runs(self) -> int:
        """Runs that share the threads, at least one thread each."""
        return min(self.runs or self.all_threads, self.all_threads)

    @property
    def tries_gpu(self) -> bool:
        """Whether a model is opened on a GPU if that works."""
        offered = CUDA in ort.get_available_providers()
        return self.provider == "cuda" or (self.provider == "auto" and offered)


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

    def __getitem__(self, rows: slice) -> Answers:
        """Return the answers for some of the images."""
        return Answers(*(array[rows] for array in self._arrays))

    @classmethod
    def joined(cls, parts: Iterable[Answers]) -> Answers:
        """Return the answers for the images of all parts, at least one, in their order."""
        columns = zip(*(part._arrays for part in parts), strict=True)
        return cls(*(np.concatenate(arrays) for arrays in columns))

    @property
    def _arrays(self) -> tuple[Floats, ...]:
        return self.logits, self.probabilities, self.embedding, self.novelty


class Predictor:
    """One version, ready to answer. Safe to call from several threads at once.

    Build it with ``load``. ``card`` says which classes it knows and what they are called.

    Args:
        card: What the file says of itself.
        classify: Its second part, as it is run beside other runs.
        open_alone: Opens that with all threads; None where ``classify`` has them.
    """

    def __init__(
        self,
        card: ModelCard,
        classify: Session,
        open_alone: Callable[[], Session] | None = None,
    ) -> None:
        self.card = card
        self._shades = _shades(card.preprocessing)
        self._beside = classify
        self._alone = None if open_alone else classify
        self._open_alone = open_alone
        self._opening = threading.Lock()

    @classmethod
    @allocator.apart()
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
        with _telling_damage():
            skeleton, weights = wire.part(content)
            _, classify = split(skeleton)
            card = read_metadata(classify)
            ranks = wire.ranks(weights)
        if card.version is None or not card.classes or len(card.classes) != len(card.tasks):
            raise DamagedError("the ONNX file is a template or cut short: it has no class table")
        if options.tries_gpu:
            with _telling_damage():
                sparing = first_token(classify, ranks)
            with _as_file(wire.appended(sparing, weights)) as file:
                if on_gpu := _open_cuda(file, card, options):
                    return cls(card, on_gpu)
        with _telling_damage():
            sparing = first_token(attention_fused(classify), ranks)
        pieces = wire.appended(sparing, weights)
        with _as_file(pieces) as file:
            threads = options.all_threads // options.cpu_runs
            runner = _open(file, session_options(threads), [CPU])
            if options.cpu_runs == 1:
                return cls(card, runner)
        return cls(card, runner, partial(_open_alone, pieces, options))

    @property
    def provider(self) -> str:
        """The provider that really runs the model, whatever was asked for."""
        return str(self._beside.get_providers()[0])

    @property
    def embedding_size(self) -> int:
        """Width of the embedding."""
        (shape,) = (node.shape for node in self._beside.get_outputs() if node.name == EMBEDDING)
        return int(shape[1])

    def preprocess(self, image: Image.Image | NDArray[np.uint8]) -> Floats:
        """Return the model-sized tensor of one image.

        Args:
            image: Of mode RGB, or (h, w, 3) uint8 RGB, any size.

        Returns:
            (1, 3, height, width) float32, normalised as the backbone expects.
        """
        small = resized(image, self.card.preprocessing)
        pixels = np.empty((1, 3, *small.shape[:2]), np.float32)
        for channel, shades in enumerate(self._shades):
            shades.take(small[:, :, channel], out=pixels[0, channel], mode="clip")
        return pixels

    def classify(self, pixels: Floats, *, alone: bool = False) -> Answers:
        """Return the answers for n >= 1 model-sized tensors.

        Args:
            pixels: (n, 3, height, width) float32, from ``preprocess``.
            alone: Whether nothing else needs the processors: it may use them all, once what that
                takes is opened in a thread of its own. The answers are the same to the bit.
        """
        session = self._session(alone)
        with _telling_memory():
            answers = session.run(OUTPUTS, {PIXELS: pixels})
        return Answers(*answers)

    def predict(self, images: Sequence[NDArray[np.uint8]]) -> Answers:
        """Return the answers for n >= 1 images, each (h, w, 3) uint8 of its own size.

        Raises:
            InvalidInputError: if there is no image.
        """
        if not images:
            raise InvalidInputError("no images to predict", field="images")
        return self.classify(np.concatenate([self.preprocess(image) for image in images]))

    @allocator.apart()
    def warm_up(self, batch: int = 1) -> None:
        """Answer once in every way, so that no caller pays for what is set up lazily.

        Args:
            batch: Most images of a run, a power of two. What a GPU does is prepared for each size.
        """
        pixels = self._blank()
        images = 1
        while images <= batch:
            self.classify(np.repeat(pixels, images, axis=0))
            images *= 2

    @allocator.apart()
    def open_alone(self) -> None:
        """Open what a run takes that has the processors to itself, unless it is open already.

        It doubles what a version takes, so it is there from the first such run on. Versions that
        are swapped under load never need it.
        """
        with self._opening:
            if self._open_alone is None:
                return
            classify = self._open_alone()
            classify.run(OUTPUTS, {PIXELS: self._blank()})
            self._alone, self._open_alone = classify, None

    def _session(self, alone: bool) -> Session:
        if not alone:
            return self._beside
        if self._alone is None and not self._opening.locked():
            with contextlib.suppress(RuntimeError, MemoryError):  # no thread is to be had
                threading.Thread(target=self._try_alone, name="version-alone").start()
        return self._alone or self._beside

    def _try_alone(self) -> None:
        try:
            self.open_alone()
        except Exception as error:
            log.warning("runs have one thread each, more cannot be opened: %s", error)
            self._alone = self._beside

    def best_batch(self, most: int = 64) -> int:
        """Find out how many images a run should take at a time.

        As many as make each image cheaper by ``_WORTH_WAITING``: a larger batch keeps all of its
        images waiting until the last one is done. On CPUs that is 1 for most models.

        Args:
            most: Where to stop, a power of 2.
        """
        pixels = self._blank()
        best, cost = 1, self._cost(pixels)
        while best < most:
            more = self._cost(np.repeat(pixels, 2 * best, axis=0))
            if more > cost * (1 - _WORTH_WAITING):
                break
            best, cost = 2 * best, more
        return best

    def _cost(self, pixels: Floats) -> float:
        """Return the seconds for each image of a batch, the least of some trials."""
        self.classify(pixels)
        trials = []
        for _ in range(3):
            start = time.perf_counter()
            self.classify(pixels)
            trials.append(time.perf_counter() - start)
        return min(trials) / len(pixels)

    def _blank(self) -> Floats:
        size = self.card.preprocessing
        return self.preprocess(np.zeros((size.height, size.width, 3), np.uint8))


_WORTH_WAITING = 0.1
"""Share of an image's cost that a batch of twice the size has to save."""


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


@contextlib.contextmanager
def _as_file(pieces: Sequence[bytes | memoryview]) -> Iterator[bytes | str]:
    """Put a file together in memory; give its path, or its bytes where there are no such files.

    Unlike joining them, and handing them to onnxruntime, writing and reading hold no lock of
    Python's, and calls are answered meanwhile.
    """
    if not hasattr(os, "memfd_create"):
        yield b"".join(pieces)
        return
    with open(os.memfd_create("inflora-model"), "wb", buffering=0) as file:
        for piece in pieces:
            left = memoryview(piece)
            while left:
                left = left[file.write(left) :]
        yield f"/proc/self/fd/{file.fileno()}"


def _shades(to: Preprocessing) -> Floats:
    """Return (3, 256) float32: what each grey level of a channel is, scaled and normalised.

    To the bit what the graph makes of it.
    """
    mean, std = (np.array(values, np.float32)[:, np.newaxis] for values in (to.mean, to.std))
    return (np.arange(256, dtype=np.float32) / np.float32(255) - mean) / std


def _open_alone(pieces: Sequence[bytes | memoryview], options: RuntimeOptions) -> Session:
    with _as_file(pieces) as file:
        return _open(file, session_options(options.all_threads, spin=True), [CPU])


def _open_cuda(model: bytes | str, card: ModelCard, options: RuntimeOptions) -> BoundSession | None:
    """Open the classifier on a GPU; None where there is none.

    Raises:
        UnavailableError: if CUDA was insisted on and is not what runs.
    """
    why = "this onnxruntime is not onnxruntime-gpu"
    if CUDA in ort.get_available_providers():
        _preload_cuda()
        half = options.precision == "float16"
        runs = halved(_content(model)) if half else model
        for record in (True, False) if options.record else (False,):
            try:
                session = _open(runs, session_options(options.all_threads), _cuda(record))
            except DamagedError as error:
                # So are models that cannot be recorded as a whole.
                why = error.message
                log.warning("a version does not run%s: %s", " recorded" if record else "", why)
                continue
            if session.get_providers()[0] != CUDA:
                why = f"onnxruntime fell back to {session.get_providers()[0]}"
                break
            bound = BoundSession(session, {CLASSES: len(card.classes)})
            if half and (cosine := _agreement(bound, model, card)) < _SAME:
                log.error("float16 is too coarse for this model: cosine %.5f", cosine)
                return _open_cuda(model, card, replace(options, precision="float32"))
            return bound
    if options.provider == "cuda":
        _open(model, session_options(1), [CPU])  # a damaged file is not the provider's fault
        # onnxruntime itself falls back without a word; a server that was promised a GPU would be
        # ready and far too slow.
        raise UnavailableError(
            f"provider cuda was asked for, but {why}: check the GPU and its driver, and that "
            "onnxruntime-gpu is installed and onnxruntime is not"
        )
    return None


_SAME = 0.999
"""Cosine of embeddings from which on a coarser arithmetic counts as the same model."""


def _agreement(bound: BoundSession, model: bytes | str, card: ModelCard) -> float:
    """Return the least cosine of what a session and the CPU make of noise; -1 for no number."""
    size = card.preprocessing
    noise = np.random.default_rng(0).normal(size=(2, 3, size.height, size.width))
    pixels = noise.astype(np.float32)
    exact = _open(model, session_options(0), [CPU])
    (ours,), (theirs,) = (each.run([EMBEDDING], {PIXELS: pixels}) for each in (bound, exact))
    lengths = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    return float(np.nan_to_num((ours * theirs).sum(axis=1) / lengths, nan=-1.0).min())


def _content(model: bytes | str) -> bytes:
    return model if isinstance(model, bytes) else Path(model).read_bytes()


def _cuda(record: bool) -> list[Any]:
    cuda = {
        # TF32 keeps 10 bits of every factor: logits would differ from the CPU's by 1e-3 and more,
        # and the exported file must give the server's answers.
        "use_tf32": "0",
        # Trying every algorithm takes seconds for each size of batch, in which nobody is answered.
        "cudnn_conv_algo_search": "HEURISTIC",
        # By what is needed: an arena that doubles each time takes what learning needs.
        "arena_extend_strategy": "kSameAsRequested",
        "enable_cuda_graph": str(int(record)),
    }
    return [(CUDA, cuda), CPU]


def _open(
    model: bytes | str, options: ort.SessionOptions, providers: list[Any]
) -> ort.InferenceSession:
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


@contextlib.contextmanager
def _telling_damage() -> Iterator[None]:
    """Turn what parts of a damaged file make of each other into an error that says so."""
    try:
        yield
    except (DamagedError, MemoryError):
        raise
    except Exception as error:
        # A flipped bit in a name leaves bytes where protobuf promises text.
        raise DamagedError(f"the ONNX file is damaged: {str(error)[:300]}") from error


NO_MEMORY = re.compile(
    r"bad_alloc|bad allocation|Failed to allocate memory|can't allocate memory|out of memory"
    r"|could not create a primitive|STATUS_ALLOC_FAILED|can't start new thread"
)
"""What Python, torch, onnxruntime, oneDNN, cuBLAS and cuDNN say in errors that are no
``MemoryError``."""


@contextlib.contextmanager
def _telling_memory() -> Iterator[None]:
    """Turn onnxruntime's errors for want of memory, which are like all others, into that."""
    try:
        yield
    except Exception as error:
        if NO_MEMORY.search(str(error)):
            raise MemoryError(str(error)) from error
        raise


def session_options(threads: int, *, spin: bool = False) -> ort.SessionOptions:
    """Return the settings that every session of ours shares.

    Args:
        threads: Of one run; 0 for one on each processor.
        spin: Whether threads that are out of work wait for more by trying again and again. Runs are
            done sooner, and what else could use the processors later.
    """
    session = ort.SessionOptions()
    # Not 0: onnxruntime would pin a thread to every core of the machine, also in a container that
    # may use two of them.
    session.intra_op_num_threads = threads or processors()
    session.inter_op_num_threads = 1
    session.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    session.log_severity_level = 3  # errors
    session.add_session_config_entry("session.intra_op.allow_spinning", str(int(spin)))
    # Between runs nobody spins on the cores that decoding and learning need.
    session.add_session_config_entry("session.force_spinning_stop", "1")
    return session


def each_alone(
    model: bytes,
    outputs: Sequence[str],
    images: Sequence[NDArray[Any]],
    threads: int,
    source: str = IMAGES,
) -> Iterator[list[Any]]:
    """Run a version's file as it is, one image at a time as devices do, and yield what it says.

    Runs of one thread each, side by side: no run waits for its slowest thread.

    Args:
        model: The file, a smaller form of it, or a part.
        outputs: Which of its outputs.
        images: Each (h, w, 3) uint8 of any size; looked at when its turn comes.
        threads: To use.
        source: What else each is, where it is another input's.

    Yields:
        Of each image the ``outputs``, in order.
    """
    session = ort.InferenceSession(model, session_options(1), providers=[CPU])

    def run(row: int) -> list[Any]:
        return list(session.run(outputs, {source: images[row][None]}))

    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(run, range(len(images)))


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
