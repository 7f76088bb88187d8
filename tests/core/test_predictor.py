"""``predictor``: answers of a composed ONNX file, made by hand so that nothing needs torch."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from inflora_core import graph
from inflora_core import predictor as predictor_module
from inflora_core.errors import DamagedError, InvalidInputError, StateError, UnavailableError
from inflora_core.graph import ModelCard
from inflora_core.heads import novelty_shares
from inflora_core.model import SCORE_BINS, ClassEntry, ContinualModel, Preprocessing
from inflora_core.predictor import (
    CPU,
    CUDA,
    Answers,
    Predictor,
    RuntimeOptions,
    processors,
    softmax,
    top_classes,
)
from tests.core import tiny

SIZE = Preprocessing(
    height=16,
    width=16,
    resize_height=18,
    resize_width=18,
    interpolation="bicubic",
    crop_mode="center",
    mean=(0.4, 0.5, 0.6),
    std=(0.2, 0.25, 0.3),
)
EMBEDDING = 6
CLASSES = (
    ClassEntry("ant", "t1", "t1.0"),
    ClassEntry("bee", "t1", "t1.1"),
    ClassEntry("caf\u00e9", "t2", "t2.0"),
    ClassEntry("dog", "t3", "t3.0"),
    ClassEntry("eel", "t2", "t2.1"),
)

ONE_THREAD = RuntimeOptions(threads=1, provider="cpu")


def template() -> bytes:
    """A backbone that averages quarters of the image and mixes them, composed as ours are."""
    rng = np.random.default_rng(5)
    mix = rng.normal(size=(12, EMBEDDING)).astype(np.float32)
    nodes = [
        helper.make_node("AveragePool", ["pixels"], ["pool"], kernel_shape=[8, 8], strides=[8, 8]),
        helper.make_node("Flatten", ["pool"], ["flat"]),
        helper.make_node("MatMul", ["flat", "mix"], ["mixed"]),
        helper.make_node("Tanh", ["mixed"], ["embedding"]),
    ]
    backbone = helper.make_model(
        helper.make_graph(
            nodes,
            "backbone",
            [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 3, 16, 16])],
            [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", EMBEDDING])],
            [numpy_helper.from_array(mix, "mix")],
        ),
        opset_imports=[helper.make_opsetid("", graph.OPSET)],
    )
    return graph.compose(backbone, (), EMBEDDING, SIZE).SerializeToString()


def version(number: int = 3, classes: tuple[ClassEntry, ...] = CLASSES) -> bytes:
    rng = np.random.default_rng(number)
    model = replace(
        ContinualModel.untaught({}, EMBEDDING),
        head_weight=rng.normal(size=(len(classes), EMBEDDING)).astype(np.float32),
        head_bias=rng.normal(size=len(classes)).astype(np.float32),
        novelty=tiny.novelty(len(classes), EMBEDDING),
        classes=classes,
    )
    return graph.materialise(template(), model, number)


@pytest.fixture(scope="module")
def file() -> bytes:
    return version()


@pytest.fixture(scope="module")
def predictor(file: bytes) -> Predictor:
    return Predictor.load(file, ONE_THREAD)


def image(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def outputs(answers: Answers) -> list[NDArray[np.float32]]:
    return [answers.logits, answers.probabilities, answers.embedding, answers.novelty]


# --- Running ------------------------------------------------------------------------------------


def test_the_card_is_the_files(predictor: Predictor):
    assert predictor.card.classes == tuple(entry.label for entry in CLASSES)
    assert predictor.card.tasks == ("t1", "t1", "t2", "t3", "t2")
    assert predictor.card.version == 3
    assert predictor.card.preprocessing == SIZE
    assert predictor.provider == CPU


@settings(max_examples=30)
@given(st.integers(2, 70), st.integers(2, 70), st.integers(0, 9))
def test_a_server_answers_as_the_whole_file_does(height: int, width: int, seed: int):
    """A server resizes in Pillow, with the same sizes: noise is rounded differently in between."""
    one = image(height, width, seed)
    pixels = WHOLE.preprocess(one)
    assert pixels.shape == (1, 3, 16, 16)
    assert pixels.dtype == np.float32
    on_device, *expected = DEVICE.run(["pixels", *graph.OUTPUTS], {"images": one[np.newaxis]})
    levels = np.abs(pixels - on_device) * 255 * np.reshape(SIZE.std, (3, 1, 1))
    assert levels.mean() <= 1
    for ours, theirs in zip(outputs(WHOLE.classify(on_device)), expected, strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_a_grey_image_becomes_its_normalised_value(predictor: Predictor):
    pixels = predictor.preprocess(np.full((40, 25, 3), 100, np.uint8))
    expected = (100 / 255 - np.array(SIZE.mean)) / np.array(SIZE.std)
    np.testing.assert_allclose(
        pixels, np.broadcast_to(expected[:, None, None], (1, 3, 16, 16)), atol=1e-5
    )


@pytest.mark.parametrize("count", [1, 2, 7])
def test_images_of_mixed_sizes_are_answered_in_their_order(predictor: Predictor, count: int):
    images = [image(9 + 13 * i, 50 - 5 * i, i) for i in range(count)]
    together = predictor.predict(images)
    assert len(together) == count
    assert together.logits.shape == together.probabilities.shape == (count, len(CLASSES))
    assert together.embedding.shape == (count, EMBEDDING)
    assert together.novelty.shape == (count,)
    for row, one in enumerate(images):
        for all_rows, alone in zip(
            outputs(together), outputs(predictor.predict([one])), strict=True
        ):
            np.testing.assert_allclose(all_rows[row], alone[0], atol=1e-6)


def test_arrays_that_are_not_contiguous_are_read_right(predictor: Predictor):
    turned = image(30, 20)[::-1, :, ::-1]
    np.testing.assert_array_equal(
        predictor.preprocess(turned), predictor.preprocess(np.ascontiguousarray(turned))
    )


def test_no_image(predictor: Predictor):
    with pytest.raises(InvalidInputError, match="no images") as caught:
        predictor.predict([])
    assert caught.value.field == "images"


def test_a_path_is_as_good_as_bytes(tmp_path: Path, file: bytes, predictor: Predictor):
    path = tmp_path / "model.onnx"
    path.write_bytes(file)
    read = Predictor.load(path, ONE_THREAD)
    one = image(20, 20)
    np.testing.assert_array_equal(read.predict([one]).logits, predictor.predict([one]).logits)


def test_defaults_load_and_warm_up(file: bytes):
    ready = Predictor.load(file)
    ready.warm_up()
    assert ready.provider in {CPU, CUDA}


def test_threads_get_their_own_answers(predictor: Predictor):
    images = [image(8 + i, 40 - i, i) for i in range(24)]
    alone = [predictor.predict([one]).logits for one in images]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda one: predictor.predict([one]).logits, images * 5))
    for i, logits in enumerate(together):
        np.testing.assert_array_equal(logits, alone[i % len(images)])


def test_versions_answer_side_by_side(predictor: Predictor):
    other = Predictor.load(version(4, CLASSES[:2]), ONE_THREAD)
    assert other.card.version == 4
    assert other.predict([image(16, 16)]).logits.shape == (1, 2)
    assert predictor.predict([image(16, 16)]).logits.shape == (1, 5)


@pytest.mark.parametrize(("threads", "runs"), [(0, 1), (1, 0), (3, 1), (4, 2), (2, 8)])
def test_sessions_leave_the_cores_to_others(file: bytes, threads: int, runs: int):
    loaded = Predictor.load(file, RuntimeOptions(threads, "cpu", runs))
    all_threads = threads or processors()
    at_a_time = min(runs or all_threads, all_threads)
    loaded.open_alone()
    assert (loaded._alone is loaded._beside) == (at_a_time == 1)
    expected = {
        loaded._alone: (all_threads, at_a_time > 1),
        loaded._beside: (all_threads // at_a_time, False),
    }
    for session, (each, spins) in expected.items():
        options = session.get_session_options()
        assert options.intra_op_num_threads == each
        spinning = options.get_session_config_entry("session.intra_op.allow_spinning")
        assert spinning == str(int(spins))
        assert options.get_session_config_entry("session.force_spinning_stop") == "1"
        assert options.execution_mode == ort.ExecutionMode.ORT_SEQUENTIAL


def test_alone_or_beside_others_the_answers_are_the_same(file: bytes):
    loaded = Predictor.load(file, RuntimeOptions(4, "cpu", 4))
    loaded.open_alone()
    images = [image(20 + i, 30) for i in range(5)]
    pixels = np.concatenate([loaded.preprocess(each) for each in images])
    alone, beside = loaded.classify(pixels, alone=True), loaded.classify(pixels)
    for one, other in zip(outputs(alone), outputs(beside), strict=True):
        np.testing.assert_array_equal(one, other)


def once_opened() -> None:
    """Wait for what is opened beside the calls."""
    for thread in threading.enumerate():
        if thread.name == "version-alone":
            thread.join()


def test_what_a_lone_run_takes_is_opened_once_there_is_one(file: bytes):
    loaded = Predictor.load(file, RuntimeOptions(2, "cpu", 2))
    loaded.warm_up()
    pixels = loaded.preprocess(image(20, 30))
    first = loaded.classify(pixels)
    assert loaded._alone is None
    second = loaded.classify(pixels, alone=True)  # does not wait for it
    once_opened()
    alone = loaded._alone
    assert alone is not None
    assert alone is not loaded._beside
    third = loaded.classify(pixels, alone=True)
    assert loaded._alone is alone
    for answers in (second, third):
        np.testing.assert_array_equal(answers.logits, first.logits)


def test_without_memory_for_a_lone_run_it_is_like_any(
    file: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def no_memory(*_: Any) -> Any:
        raise MemoryError("no memory for another copy")

    monkeypatch.setattr(predictor_module, "_open_alone", no_memory)
    loaded = Predictor.load(file, RuntimeOptions(2, "cpu", 2))
    pixels = loaded.preprocess(image(20, 30))
    loaded.classify(pixels, alone=True)
    once_opened()
    assert loaded._alone is loaded._beside
    assert "no memory for another copy" in caplog.text
    assert len(loaded.classify(pixels, alone=True)) == 1


def test_answers_are_taken_apart_and_joined(predictor: Predictor):
    whole = predictor.predict([image(20 + i, 30) for i in range(4)])
    parts = [whole[:1], whole[1:3], whole[3:]]
    assert [len(part) for part in parts] == [1, 2, 1]
    for one, other in zip(outputs(Answers.joined(parts)), outputs(whole), strict=True):
        np.testing.assert_array_equal(one, other)


def test_batches_grow_while_they_make_images_cheaper(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
):
    """A run of 1 to 8 images takes as long as any; from there on, each image has its price."""
    now = 0.0

    def classify(self: Predictor, pixels: NDArray[np.float32]) -> None:
        nonlocal now
        now += max(8, len(pixels))

    monkeypatch.setattr(Predictor, "classify", classify)
    monkeypatch.setattr(predictor_module.time, "perf_counter", lambda: now)
    assert predictor.best_batch() == 8
    assert predictor.best_batch(most=4) == 4


# --- Providers ----------------------------------------------------------------------------------

without_cuda = pytest.mark.skipif(
    CUDA in ort.get_available_providers(), reason="this onnxruntime may really have CUDA"
)


@without_cuda
def test_cuda_that_is_not_there_is_an_error(file: bytes):
    with pytest.raises(UnavailableError, match="is not onnxruntime-gpu"):
        Predictor.load(file, RuntimeOptions(provider="cuda"))


@without_cuda
def test_cuda_that_does_not_start(file: bytes, monkeypatch: pytest.MonkeyPatch):
    """onnxruntime-gpu without a working driver: offered, then not there."""
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA, CPU])
    with pytest.raises(UnavailableError, match="cuda was asked for, but onnxruntime does not"):
        Predictor.load(file, RuntimeOptions(provider="cuda"))
    for provider in ("auto", "cpu"):
        loaded = Predictor.load(file, RuntimeOptions(provider=provider))
        assert loaded.provider == CPU


@pytest.mark.gpu
@pytest.mark.skipif(CUDA not in ort.get_available_providers(), reason="needs onnxruntime-gpu")
@pytest.mark.parametrize("record", [True, False])
@pytest.mark.parametrize(("precision", "atol"), [("float32", 1e-4), ("float16", 0.05)])
def test_cuda_answers_as_the_cpu_does(
    file: bytes,
    predictor: Predictor,
    record: bool,
    precision: Literal["float32", "float16"],
    atol: float,
):
    options = RuntimeOptions(provider="cuda", precision=precision, record=record)
    loaded = Predictor.load(file, options)
    assert loaded.provider == CUDA
    images = [image(33 + i, 44) for i in range(5)]
    for theirs, ours in zip(
        outputs(loaded.predict(images)), outputs(predictor.predict(images)), strict=True
    ):
        np.testing.assert_allclose(theirs, ours, atol=atol)


class Elsewhere(ort.InferenceSession):
    """A session on the CPU that says it is on a GPU, as far as tests without one get."""

    def get_providers(self) -> list[str]:
        return [CUDA, CPU]


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have what is opened for a GPU opened on the CPU, and bound there."""
    usual = predictor_module._open

    def opened(model: bytes | str, options: ort.SessionOptions, providers: list[Any]) -> Any:
        if providers == [CPU]:
            return usual(model, options, providers)
        return Elsewhere(model, options, providers=[CPU])

    monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(predictor_module, "_open", opened)
    monkeypatch.setattr(
        predictor_module, "BoundSession", partial(predictor_module.BoundSession, device="cpu")
    )


@without_cuda
def test_float16_is_the_backbone_that_answers(file: bytes, predictor: Predictor, pretended: None):
    loaded = Predictor.load(file, RuntimeOptions(provider="cuda", precision="float16"))
    assert loaded.provider == CUDA
    loaded.warm_up(4)
    half, exact = (each.predict([image(33, 44)]).embedding for each in (loaded, predictor))
    assert (half != exact).any()
    np.testing.assert_allclose(half, exact, atol=0.01)


@without_cuda
def test_a_model_for_which_float16_is_too_coarse_runs_as_it_is(
    file: bytes,
    predictor: Predictor,
    pretended: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    monkeypatch.setattr(predictor_module, "_SAME", 1.1)
    loaded = Predictor.load(file, RuntimeOptions(provider="cuda", precision="float16"))
    assert "float16 is too coarse" in caplog.text
    exact, same = (each.predict([image(33, 44)]).embedding for each in (loaded, predictor))
    np.testing.assert_allclose(exact, same, rtol=1e-6)


def test_a_damaged_file_is_not_blamed_on_the_provider(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA, CPU])
    model = onnx.load_model_from_string(version())
    model.graph.node[-1].op_type = "NoSuchOperator"
    with pytest.raises(DamagedError):
        Predictor.load(model.SerializeToString(), RuntimeOptions(provider="cuda"))


# --- Damaged files ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "what", ["std::bad_alloc", "Failed to allocate memory for requested buffer"]
)
def test_a_lack_of_memory_is_no_damage(file: bytes, monkeypatch: pytest.MonkeyPatch, what: str):
    """Whoever took it for damage would give the version up."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(f"[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : {what}")

    predictor = Predictor.load(file, RuntimeOptions(1, "cpu"))
    image = np.zeros((8, 8, 3), np.uint8)
    with monkeypatch.context() as patch:
        patch.setattr(ort.InferenceSession, "__init__", fail)
        with pytest.raises(MemoryError, match=what):
            Predictor.load(file, RuntimeOptions(1, "cpu"))
    with monkeypatch.context() as patch:
        patch.setattr(ort.InferenceSession, "run", fail)
        with pytest.raises(MemoryError, match=what):
            predictor.predict([image])
    assert len(predictor.predict([image])) == 1


def test_a_file_cut_anywhere_is_damaged(file: bytes):
    cuts = {*range(0, len(file), max(len(file) // 60, 1)), *range(len(file) - 60, len(file))}
    for cut in sorted(cuts):
        with pytest.raises(DamagedError):
            Predictor.load(file[:cut], ONE_THREAD)


@pytest.mark.parametrize("name", [b"inflora", b"preprocess.half"])
def test_names_that_are_no_text_are_damaged(file: bytes, name: bytes):
    """protobuf itself then raises, or hands out bytes for text."""
    assert name in file
    with pytest.raises(DamagedError):
        Predictor.load(file.replace(name, name[:-1] + b"\xc8"), ONE_THREAD)


@given(st.binary(max_size=100))
@settings(max_examples=50)
def test_random_bytes_are_damaged(content: bytes):
    with pytest.raises(DamagedError):
        Predictor.load(content, ONE_THREAD)


def test_a_template_is_not_a_version():
    with pytest.raises(DamagedError, match="class table"):
        Predictor.load(template(), ONE_THREAD)


@pytest.mark.parametrize("key", ["classes", "tasks", "version", "preprocessing"])
def test_metadata_must_be_there_and_readable(file: bytes, key: str):
    for value in (None, "not json", "[]"):
        model = onnx.load_model_from_string(file)
        kept = [p for p in model.metadata_props if p.key != key]
        del model.metadata_props[:]
        model.metadata_props.extend(kept)
        if value is not None:
            model.metadata_props.add(key=key, value=value)
        with pytest.raises(DamagedError):
            Predictor.load(model.SerializeToString(), ONE_THREAD)


def test_another_onnx_file_is_refused():
    identity = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "other",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )
    with pytest.raises(DamagedError):
        Predictor.load(helper.make_model(identity).SerializeToString(), ONE_THREAD)


def test_a_missing_file(tmp_path: Path):
    with pytest.raises(DamagedError, match="cannot be read"):
        Predictor.load(tmp_path / "model.onnx", ONE_THREAD)


# --- The best classes ---------------------------------------------------------------------------

CARD = ModelCard(
    classes=tuple(entry.label for entry in CLASSES),
    tasks=tuple(entry.task for entry in CLASSES),
    version=3,
    preprocessing=SIZE,
    layers=(),
    other={},
)


def answers_of(logits: NDArray[np.float32]) -> Answers:
    count = len(logits)
    return Answers(
        logits, softmax(logits), np.zeros((count, 1), np.float32), np.zeros(count, np.float32)
    )


def test_best_first():
    logits = np.log(np.array([[1, 5, 2, 8, 4], [9, 1, 1, 1, 8]], np.float32))
    best = top_classes(answers_of(logits), CARD, 2)
    assert [[label for label, _ in row] for row in best] == [["dog", "bee"], ["ant", "eel"]]
    assert best[0][0][1] == pytest.approx(0.4)
    assert best[1][1][1] == pytest.approx(0.4)
    assert all(type(probability) is float for row in best for _, probability in row)


def test_only_the_named_tasks_classes_compete():
    logits = np.log(np.array([[1, 5, 2, 8, 6]], np.float32))
    assert top_classes(answers_of(logits), CARD, 5, "t2") == [
        [("eel", pytest.approx(0.75)), ("caf\u00e9", pytest.approx(0.25))]
    ]
    assert top_classes(answers_of(logits), CARD, 5, "t3") == [[("dog", 1.0)]]


def test_competing_alone_they_are_told_apart_however_unlikely_they_are():
    """All of t2's probabilities over all classes round to 0; its logits still differ."""
    logits = np.array([[0, 0, -200, 0, -201]], np.float32)
    ((first, second),) = top_classes(answers_of(logits), CARD, 5, "t2")
    assert first == ("caf\u00e9", pytest.approx(1 / (1 + np.exp(-1))))
    assert second[0] == "eel"
    ranked = top_classes(answers_of(np.array([[0, 0, -201, 0, -200]], np.float32)), CARD, 5)
    assert [label for label, _ in ranked[0]] == ["ant", "bee", "dog", "eel", "caf\u00e9"]


def test_equals_come_by_position():
    best = top_classes(answers_of(np.zeros((1, 5), np.float32)), CARD, 4)
    assert [label for label, _ in best[0]] == ["ant", "bee", "caf\u00e9", "dog"]


@given(
    arrays.arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.just(5)),
        elements=st.sampled_from([-1e4, -3.0, 0.0, 0.5, 2.0, 1e4]),
    ),
    st.integers(1, 8),
    st.sampled_from([None, "t1", "t2", "t3"]),
)
def test_ranking_is_that_of_a_plain_sort(logits: NDArray[np.float32], top_k: int, task: str | None):
    columns = [i for i, entry in enumerate(CLASSES) if task in (None, entry.task)]
    best = top_classes(answers_of(logits), CARD, top_k, task)
    for row, found in zip(logits, best, strict=True):
        expected = sorted(columns, key=lambda i: (-row[i], i))[:top_k]
        assert [label for label, _ in found] == [CLASSES[i].label for i in expected]
        total = sum(probability for _, probability in found)
        assert total <= 1 + 1e-5
        if top_k >= len(columns):
            assert total == pytest.approx(1, abs=1e-5)


def test_a_task_that_this_version_does_not_know():
    with pytest.raises(StateError, match="'t9'") as caught:
        top_classes(answers_of(np.zeros((1, 5), np.float32)), CARD, 1, "t9")
    assert caught.value.field == "task"
    assert "version 3" in caught.value.message


@pytest.mark.parametrize("top_k", [0, -1])
def test_top_k_must_be_positive(top_k: int):
    with pytest.raises(InvalidInputError) as caught:
        top_classes(answers_of(np.zeros((1, 5), np.float32)), CARD, top_k)
    assert caught.value.field == "top_k"


def test_novelty_is_a_share_of_known_images():
    """Every knot of its scale, and what lies below, between and above them."""
    classes = CLASSES[:2]
    blank = ContinualModel.untaught({}, EMBEDDING)
    counts = np.random.default_rng(0).integers(0, 3, SCORE_BINS)
    counts[100:200] = 0  # no image had such a score
    counts[50] = 500  # many had this one
    model = replace(
        blank,
        head_weight=np.zeros((2, EMBEDDING), np.float32),
        head_bias=np.zeros(2, np.float32),
        novelty=tiny.novelty(2, EMBEDDING),
        calibration=replace(blank.calibration, scores=counts),
        classes=classes,
    )
    predictor = Predictor.load(graph.materialise(template(), model, 1), ONE_THREAD)
    answers = predictor.predict([image(20 + i, 30, i) for i in range(12)])
    np.testing.assert_allclose(answers.novelty, novelty_shares(model, answers.embedding), atol=2e-4)
    assert len(replace(answers, logits=answers.logits[:1])) == 1


# --- Without torch ------------------------------------------------------------------------------


def test_nothing_here_imports_torch():
    code = (
        "import sys, inflora_core.predictor, inflora_core.images, inflora_core.labels; "
        "sys.exit(', '.join({'torch', 'timm', 'torchvision'} & set(sys.modules)) or 0)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


WHOLE = Predictor.load(version(), ONE_THREAD)


def _telling_pixels(file: bytes) -> bytes:
    """Return a file that has what it makes of an image among its outputs."""
    proto = onnx.load_from_string(file)
    proto.graph.output.extend(each for each in proto.graph.value_info if each.name == "pixels")
    return proto.SerializeToString()


DEVICE = ort.InferenceSession(_telling_pixels(version()), providers=[CPU])
