"""Every family of ViT goes through learning, merging, export and prediction, or is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from inflora_core import forms
from inflora_core.backbone import build_backbone, state_of
from inflora_core.compute import Compute, halves
from inflora_core.config import LearnConfig, Limits
from inflora_core.errors import DamagedError, StateError, UnsupportedBackboneError
from inflora_core.images import decode
from inflora_core.model import Progress, Stage, Version
from inflora_core.predictor import Predictor, RuntimeOptions
from inflora_core.progress import Tracker
from inflora_core.spool import read_spool
from inflora_core.store import ONNX_FILE, Store
from inflora_core.worker import PARITY_IMAGES, Worker, make_deterministic
from tests.core import tiny
from tests.core.test_backbone import FAMILIES, write

SIDE = 40
"""Not the size of any family: preprocessing is part of what is compared."""
EACH = 8
VARIETY = 0.6
"""Enough for logits of the usual size: parity is absolute."""
CONFIG = LearnConfig(epochs=2, batch_size=8, rank=4, threshold_first=0.6, threshold_last=0.8)
TASKS = (("red", "green"), ("blue", "yellow", "white"))


def learn(worker: Worker, folder: Path, number: int, labels: tuple[str, ...]) -> int:
    spool = tiny.write_spool(folder / f"spool-{number}", labels, EACH, SIDE, VARIETY)
    parent = number or None
    return worker.learn(f"task-{number}", spool, CONFIG, parent, Tracker())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_taught_and_answers(family: str, tmp_path: Path) -> None:
    path = write(tmp_path / "weights.safetensors", FAMILIES[family])
    store = Store.open(tmp_path / "store")
    worker = Worker(store, Compute(), 1)
    worker.prepare(str(path), None)
    path.unlink()  # the store needs it no more
    for number, labels in enumerate(TASKS):
        assert learn(worker, tmp_path, number, labels) == number + 1
        version = store.verify(number + 1)
        assert_learned(version, number)
        assert_answers_as_torch(store, version, tmp_path)


def assert_learned(version: Version, number: int) -> None:
    report = version.report
    assert report.parity is not None
    images = EACH * len(TASKS[number])
    for most in (max(forms.IMAGES.values()), PARITY_IMAGES):
        images = len(range(0, images, math.ceil(images / most)))
    assert report.parity.images == images
    assert report.parity.max_abs_diff <= 1e-4
    assert report.parity.top1_agreement >= 0.995
    assert report.parity.preprocessing_grey_levels <= 1
    assert report.leak < 1e-5
    assert [entry.label for entry in version.classes] == [
        label for labels in TASKS[: number + 1] for label in labels
    ]
    for layer in report.layers:
        assert 1 <= layer.rank <= CONFIG.rank
        assert 0 < layer.free_after < layer.free_before


def assert_answers_as_torch(store: Store, version: Version, folder: Path) -> None:
    """On images that no task has seen, from the encoded file to the best class."""
    stored = store.backbone()
    model = store.load_model(version.number)
    weights = store.load_weights(stored)
    for name, layer in model.layers.items():
        weights[f"{name}.qkv.weight"][-len(layer.key_value) :] = layer.key_value
    backbone = build_backbone(stored.config, weights)
    labels = [entry.label for entry in version.classes]
    files = [tiny.png(label, 900 + i, SIDE, VARIETY) for label in labels for i in range(3)]
    new = [decode(file, Limits()) for file in files]
    pixels = torch.from_numpy(np.stack([backbone.resize(image) for image in new]))
    with torch.inference_mode():
        features = backbone.module(backbone.normalise(pixels))
        expected = model.logits(features.numpy())
    predictor = Predictor.load(
        store.path(version.number, ONNX_FILE), RuntimeOptions(threads=1, provider="cpu")
    )
    assert predictor.card.classes == tuple(labels)
    assert np.array_equal(predictor.predict(new).logits.argmax(1), expected.argmax(1))
    answers = predictor.classify(backbone.normalise(pixels).numpy())
    np.testing.assert_allclose(answers.logits, expected, atol=1e-4, rtol=0)
    np.testing.assert_allclose(answers.embedding, features.numpy(), atol=1e-4)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "swin": (
        "swin_tiny_patch4_window7_224",
        {
            "img_size": 32,
            "patch_size": 4,
            "window_size": 4,
            "embed_dim": 8,
            "depths": [1, 1],
            "num_heads": [1, 2],
        },
        "SwinTransformer is not a plain vision transformer .* windows",
    ),
    "parallel": (
        "vit_small_patch16_18x2_224",
        {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2},
        "parallel",
    ),
}


def write_module(path: Path, name: str, args: dict[str, Any], data: dict[str, Any]) -> Path:
    """Write any timm model with random weights as a backbone file."""
    module = timm.create_model(name, num_classes=0, **args)
    config = {"architecture": name, "model_args": args, "pretrained_cfg": data}
    state = {key: value.contiguous() for key, value in module.state_dict().items()}
    save_file(state, path, metadata={"timm_config": json.dumps(config)})
    return path


@pytest.mark.parametrize("kind", REFUSED)
def test_another_kind_is_refused_with_the_reason(kind: str, tmp_path: Path) -> None:
    name, args, reason = REFUSED[kind]
    path = write_module(tmp_path / "weights.safetensors", name, args, {"mean": [0.5] * 3})
    store = Store.open(tmp_path / "store")
    worker = Worker(store, Compute(), 1)
    with pytest.raises(UnsupportedBackboneError, match=reason) as caught:
        worker.prepare(str(path), None)
    assert caught.value.field == "backbone"
    assert not store.has_backbone()
    assert not list((tmp_path / "store" / "backbones").iterdir())
    with pytest.raises(StateError, match="no backbone"):
        learn(worker, tmp_path, 0, ("red", "green"))


@pytest.mark.parametrize("data", [{}, {"input_size": [3, 32, 32]}], ids=["bare", "as published"])
def test_a_convnet_is_refused_with_the_reason(data: dict[str, Any], tmp_path: Path) -> None:
    args = {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]}
    path = write_module(tmp_path / "weights.safetensors", "convnext_atto", args, data)
    with pytest.raises(UnsupportedBackboneError, match=r"ConvNeXt is not .* no attention"):
        Worker(Store.open(tmp_path / "store"), Compute(), 1).prepare(str(path), None)


def test_the_same_worker_prepares_after_a_refusal(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store")
    worker = Worker(store, Compute(), 1)
    (tmp_path / "empty.safetensors").write_bytes(b"")
    with pytest.raises(Exception, match=r"empty\.safetensors"):
        worker.prepare(str(tmp_path / "empty.safetensors"), None)
    worker.prepare(str(tiny.write_backbone(tmp_path)), None)
    assert learn(worker, tmp_path, 0, TASKS[0]) == 1
    backbone = store.backbone()
    frozen = state_of(build_backbone(backbone.config, store.load_weights(backbone)))
    weights = store.load_weights(backbone)
    for name, array in frozen.items():
        assert np.array_equal(array, weights[name]), "learning never writes into the store's"


def test_a_task_that_was_learned_is_not_learned_again(tmp_path: Path) -> None:
    """As after a crash between the version and the record of it; the spool may be gone by then."""
    store = Store.open(tmp_path / "store")
    Worker(store, Compute(), 1).prepare(str(tiny.write_backbone(tmp_path)), None)
    seen: list[Progress] = []
    tracker = Tracker(seen.append)
    spool = tiny.write_spool(tmp_path / "spool", TASKS[0], 4)
    assert Worker(store, Compute(), 1).learn("task", spool, CONFIG, None, tracker) == 1
    stages = list(dict.fromkeys(progress.stage for progress in seen))
    assert stages == list(Stage)
    fractions = [progress.fraction for progress in seen]
    assert fractions == sorted(fractions)
    assert fractions[-1] < 1
    assert list(store.version(1).report.stage_seconds) == list(Stage)[:-1]

    manifest = store.version(1)
    nowhere = tmp_path / "nowhere"
    assert Worker(store, Compute(), 1).learn("task", nowhere, CONFIG, None, Tracker()) == 1
    assert store.numbers() == [1]
    assert store.version(1) == manifest
    assert len(list(read_spool(spool))) == 8


def test_a_file_is_rebuilt_byte_for_byte(tmp_path: Path) -> None:
    """``model.onnx`` is derived: lost or damaged, it is made again from what is kept."""
    store = Store.open(tmp_path / "store")
    worker = Worker(store, Compute(), 1)
    worker.prepare(str(tiny.write_backbone(tmp_path)), None)
    for number, labels in enumerate(TASKS):
        learn(worker, tmp_path, number, labels)
    store = Store.open(tmp_path / "store")
    for number in (1, 2):
        path = store.path(number, ONNX_FILE)
        content = path.read_bytes()
        path.unlink()
        store.rebuild_onnx(number)
        assert path.read_bytes() == content
        path.write_bytes(content[:-1])
        with pytest.raises(DamagedError):
            store.verify(number)
        store.rebuild_onnx(number)
        store.verify(number)
    factors = store.path(1, "factors.safetensors")
    factors.write_bytes(factors.read_bytes()[:-1] + b"?")
    with pytest.raises(DamagedError, match="factors"):
        store.rebuild_onnx(2)
    store.verify(2)


def test_a_worker_learns_on_any_version(tmp_path: Path) -> None:
    """After a rollback the next task's parent is not the newest; a fresh worker does the same."""
    store = Store.open(tmp_path / "store")
    warm = Worker(store, Compute(), 1)
    warm.prepare(str(tiny.write_backbone(tmp_path)), None)
    spools = [
        tiny.write_spool(tmp_path / str(i), labels, 5)
        for i, labels in enumerate([*TASKS, ("cyan", "magenta")])
    ]

    def teach(worker: Worker, task: str, spool: int, parent: int | None) -> int:
        return worker.learn(task, spools[spool], CONFIG, parent, Tracker())

    assert teach(warm, "first", 0, None) == 1
    assert teach(warm, "second", 1, 1) == 2
    assert teach(warm, "branch", 2, 1) == 3
    assert teach(Worker(store, Compute(), 1), "branch again", 2, 1) == 4
    assert [store.version(n).parent for n in (1, 2, 3, 4)] == [None, 1, 1, 1]
    for name in ("factors.safetensors", "head.safetensors", "memory.safetensors"):
        entries = [store.version(n).file(name) for n in (3, 4)]
        assert entries[0] == entries[1], "being warm makes no difference"


@pytest.fixture(params=["cpu", "cuda"])
def compute(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Compute]:
    """As a server has it that was started with ``--learn-deterministic``."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU here")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # put back afterwards
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    make_deterministic()
    device = torch.device(request.param)
    yield Compute(device, halves("auto", device))
    torch.use_deterministic_algorithms(False)


def test_a_seed_decides_every_byte_of_a_version(tmp_path: Path, compute: Compute) -> None:
    """In two stores, by two workers; only what is told of the time it took may differ."""
    kept = []
    for side in ("left", "right"):
        store = Store.open(tmp_path / side / "store")
        worker = Worker(store, compute, 1)
        (tmp_path / side).mkdir(exist_ok=True)
        worker.prepare(str(tiny.write_backbone(tmp_path / side)), None)
        for number, labels in enumerate(TASKS):
            assert learn(worker, tmp_path / side, number, labels) == number + 1
        versions = store.path(1, ONNX_FILE).parents[1]
        files = [path for path in sorted(versions.rglob("*")) if path.is_file()]
        kept.append(
            {
                path.relative_to(versions): path.read_bytes()
                for path in files
                if not path.name.startswith("manifest.")
            }
        )
        manifests = [store.version(number) for number in (1, 2)]
        kept[-1] |= {Path(f"manifest-{i}"): timeless(x) for i, x in enumerate(manifests)}
    left, right = kept
    assert len(left) >= 2 * 5
    assert left == right


def timeless(version: Version) -> bytes:
    """Return a version's manifest without times."""
    assert version.report is not None
    report = replace(version.report, stage_seconds={})
    epoch = datetime.fromtimestamp(0, UTC)
    return repr(replace(version, report=report, create_time=epoch)).encode()
