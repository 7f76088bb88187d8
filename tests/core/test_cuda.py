"""``cuda.BoundSession`` answers as onnxruntime's own session does; here on a CPU, bound alike."""

from __future__ import annotations

import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import numpy_helper

from inflora_core import cuda
from inflora_core.cuda import BoundSession
from inflora_core.graph import (
    CLASSES,
    EMBEDDING,
    HEAD_BIAS,
    HEAD_WEIGHT,
    LOGITS,
    OUTPUTS,
    PIXELS,
    split,
)
from inflora_core.passes import halved
from inflora_core.predictor import CPU, session_options
from tests.core.test_predictor import CLASSES as ENTRIES
from tests.core.test_predictor import SIZE, version

MOST = 4


def opened(model: bytes) -> ort.InferenceSession:
    return ort.InferenceSession(model, session_options(1), providers=[CPU])


@pytest.fixture(scope="module")
def plain() -> ort.InferenceSession:
    return opened(split(version(3, ENTRIES))[1])


@pytest.fixture(scope="module")
def bound() -> BoundSession:
    session = opened(split(version(3, ENTRIES))[1])
    return BoundSession(session, {CLASSES: len(ENTRIES)}, device="cpu", most=MOST)


def noise(count: int, seed: int = 0) -> NDArray[np.float32]:
    generator = np.random.default_rng(seed)
    return generator.normal(size=(count, 3, SIZE.height, SIZE.width)).astype(np.float32)


@settings(deadline=None)
@given(counts=st.lists(st.integers(1, 3 * MOST), min_size=1, max_size=5), seed=st.integers(0, 9))
def test_batches_of_any_size_one_after_the_other(
    plain: ort.InferenceSession, bound: BoundSession, counts: list[int], seed: int
):
    for number, count in enumerate(counts):
        pixels = noise(count, seed + number)
        for ours, theirs in zip(
            bound.run(OUTPUTS, {PIXELS: pixels}),
            plain.run(OUTPUTS, {PIXELS: pixels}),
            strict=True,
        ):
            assert ours.dtype == theirs.dtype
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_outputs_come_as_they_are_named(plain: ort.InferenceSession, bound: BoundSession):
    feeds = {PIXELS: noise(2)}
    names = [EMBEDDING, LOGITS]
    for ours, theirs in zip(bound.run(names, feeds), plain.run(names, feeds), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert bound.get_providers() == plain.get_providers()
    assert [node.name for node in bound.get_outputs()] == list(OUTPUTS)


def test_strided_pixels(plain: ort.InferenceSession, bound: BoundSession):
    pixels = noise(8)[::2]
    (ours,), (theirs,) = (each.run([LOGITS], {PIXELS: pixels}) for each in (bound, plain))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_threads_never_see_each_others_answers(plain: ort.InferenceSession, bound: BoundSession):
    batches = [noise(1 + seed % MOST, seed) for seed in range(60)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda pixels: bound.run([LOGITS], {PIXELS: pixels})[0], batches))
    for pixels, logits in zip(batches, answers, strict=True):
        np.testing.assert_allclose(
            logits, plain.run([LOGITS], {PIXELS: pixels})[0], rtol=1e-5, atol=1e-6
        )


def test_what_is_let_go_goes_where_it_ran_before_the_next_run(bound: BoundSession):
    session = opened(split(version(3, ENTRIES))[1])
    other = BoundSession(session, {CLASSES: len(ENTRIES)}, device="cpu")
    other.run([LOGITS], {PIXELS: noise(1)})
    gone: list[str] = []
    weakref.finalize(session, lambda: gone.append(threading.current_thread().name))
    del session, other
    assert not gone
    bound.run([LOGITS], {PIXELS: noise(1)})
    assert gone == ["cuda_0"]


def test_what_is_let_go_within_the_pools_lock_holds_nothing_up(bound: BoundSession):
    """A collection can begin anywhere: so it did while a run was handed over, which hung."""
    session = opened(split(version(3, ENTRIES))[1])
    other = BoundSession(session, {CLASSES: len(ENTRIES)}, device="cpu")
    del session
    with cuda._thread()._shutdown_lock:
        del other
    assert len(bound.run([LOGITS], {PIXELS: noise(1)})[0]) == 1


def test_half_the_precision_is_nearly_the_same(plain: ort.InferenceSession):
    model = halved(split(version(3, ENTRIES))[1])
    half = opened(model)
    assert [node.type for node in half.get_inputs()] == ["tensor(float)"]
    assert [node.type for node in half.get_outputs()] == ["tensor(float)"] * len(OUTPUTS)
    feeds = {PIXELS: noise(3)}
    answers = dict(zip(OUTPUTS, half.run(OUTPUTS, feeds), strict=True))
    for name, exact in zip(OUTPUTS, plain.run(OUTPUTS, feeds), strict=True):
        np.testing.assert_allclose(answers[name], exact, atol=0.05)
    # The backbone is rounded, and only it: the head makes of its embedding what it always makes.
    weights = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in onnx.load_from_string(model).graph.initializer
    }
    assert {array.dtype for name, array in weights.items() if name == "mix"} == {np.dtype("f2")}
    logits = answers[EMBEDDING] @ weights[HEAD_WEIGHT] + weights[HEAD_BIAS]
    np.testing.assert_allclose(answers[LOGITS], logits, rtol=1e-5, atol=1e-6)
