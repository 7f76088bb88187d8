"""Immutable versions: what comes back, what is noticed, and what an interruption leaves."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inflora_core import store as store_module
from inflora_core.errors import (
    DamagedError,
    InvalidInputError,
    NotFoundError,
    StateError,
    StoreFormatError,
)
from inflora_core.merge import merge
from inflora_core.model import (
    SCORE_BINS,
    BackboneConfig,
    Calibration,
    ContinualModel,
    Factors,
    HeldOut,
    LayerReport,
    LayerState,
    Learned,
    Novelty,
    ParityReport,
    Stage,
    TaskReport,
    new_classes,
)
from inflora_core.store import ONNX_FILE, Store, StoredBackbone

LAYERS = ("blocks.0.attn", "blocks.1.attn")
D, A, E = 8, 8, 6

REPORT = TaskReport(
    layers=(LayerReport(LAYERS[0], D, 2, D, D - 2, 1e-7, 0.25),),
    threshold=0.95,
    training_accuracy=0.75,
    held_out_accuracy_task_known=None,
    held_out_accuracy=0.5,
    held_out_counts={"Käfer 🪲": 3},
    held_out_method=HeldOut.HELD_OUT,
    temperature=4.5,
    tasks_left=7.25,
    class_bytes=100,
    shared_bytes=1000,
    epoch_losses=(0.7, 0.1 + 0.2),
    stage_seconds={Stage.TRAINING: 1.5},
    settings={"epochs": 2, "expected_tasks": None},
    device="cpu",
    warnings=("one",),
    parity=ParityReport(3, 1e-6, 0.5, 1.0),
)


def set_backbone(store: Store, width: int = D, depth: int = 2) -> StoredBackbone:
    """Give ``store`` random weights of ``depth`` blocks, as wide as a ViT's are."""
    rng = np.random.default_rng(0)
    names = tuple(f"blocks.{i}.attn" for i in range(depth))
    weights = {}
    for name in names:
        block = name.removesuffix("attn")
        for part, rows in (("attn.qkv", 3), ("attn.proj", 1), ("mlp.fc1", 4), ("mlp.fc2", 4)):
            array = rng.normal(size=(rows * width, width)).astype(np.float32)
            weights[f"{block}{part}.weight"] = array
    config = BackboneConfig("any_vit", {"img_size": [8, 8]}, {"mean": [0.5] * 3}, names, E)
    return store.set_backbone(config, weights, b"a template")


def open_with_backbone(path: Path) -> Store:
    store = Store.open(path)
    set_backbone(store)
    return store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_with_backbone(tmp_path / "store")


def learned(
    before: ContinualModel, task: str, seed: int, without: tuple[str, ...] = (), rank: int = 3
) -> Learned:
    """What a learner could return: two more classes, and factors of every layer but some."""
    rng = np.random.default_rng(seed)

    def array(*shape: int) -> Any:
        return rng.normal(size=shape).astype(np.float32)

    factors, layers = {}, {}
    for number, (name, layer) in enumerate(before.layers.items()):
        rows, d = layer.key_value.shape
        key_value = layer.key_value
        if name not in without:
            factors[name] = Factors(array(rows, rank), array(rank, d))
            key_value = merge(layer.key_value, factors[name])
        tokens = layer.tokens + 2**40 + number
        layers[name] = LayerState(key_value, array(d, d), layer.protected + 1, array(d, d), tokens)
    known = before.classes + new_classes([f"{task} – ß{i}" for i in range(2)], task)
    e = before.head_weight.shape[1]
    after = replace(
        before,
        layers=layers,
        head_weight=array(len(known), e),
        head_bias=array(len(known)),
        class_means=array(len(known), e),
        class_counts=rng.integers(1, 99, len(known)),
        class_scatter=np.cov(array(e, 3 * e)).astype(np.float32),
        novelty=Novelty(array(len(known), e), array(len(known)), array(e, e), array(e)),
        class_freedom=17 + seed % 5,
        calibration=Calibration(12, rng.random(93), rng.integers(0, 9, SCORE_BINS)),
        capacity=np.append(before.capacity, 0.5),
        classes=known,
        tasks=before.tasks + 1,
    )
    return Learned(after, factors, REPORT)


def publish(store: Store, parent: int | None, task: str, **changes: Any) -> ContinualModel:
    """Publish a task after ``parent``; return the state as the learner has it."""
    seed = changes.pop("seed", hash(len(store.numbers())))
    done = learned(store.load_model(parent), task, seed, **changes)
    number = store.publish(done, task, f"onnx of {task}".encode()).number
    return replace(done.model, version=number)


def assert_same(left: ContinualModel, right: ContinualModel) -> None:
    """Assert that both states are the same to the bit."""
    assert list(left.layers) == list(right.layers)
    for name, layer in left.layers.items():
        other = right.layers[name]
        assert (layer.protected, layer.tokens) == (other.protected, other.tokens)
        for field in ("key_value", "basis", "moment"):
            assert_same_array(getattr(layer, field), getattr(other, field))
    for field in ("head_weight", "head_bias", "class_means", "class_counts", "class_scatter"):
        assert_same_array(getattr(left, field), getattr(right, field))
    for field in ("weight", "bias", "whitening", "offset"):
        assert_same_array(getattr(left.novelty, field), getattr(right.novelty, field))
    assert_same_array(left.calibration.losses, right.calibration.losses)
    assert_same_array(left.calibration.scores, right.calibration.scores)
    assert left.class_freedom == right.class_freedom
    assert_same_array(left.capacity, right.capacity)
    assert left.calibration.images == right.calibration.images
    for field in ("classes", "tasks", "version"):
        assert getattr(left, field) == getattr(right, field)


def assert_same_array(left: Any, right: Any) -> None:
    assert (left.dtype, left.shape) == (right.dtype, right.shape)
    assert left.tobytes() == right.tobytes()


# -- what comes back ----------------------------------------------------------------------------


def test_a_version_comes_back_as_it_was_published(store: Store) -> None:
    before = store.load_model(None)
    done = learned(before, "first", 1)
    version = store.publish(done, "first", b"onnx")
    assert (version.number, version.parent, version.task) == (1, None, "first")
    again = Store.open(store.root)
    assert again.numbers() == [1]
    assert again.version(1) == version == again.verify(1)
    assert again.version(1).report == REPORT
    assert again.version_of_task("first") == 1
    assert again.version_of_task("second") is None
    assert again.path(1, ONNX_FILE).read_bytes() == b"onnx"
    assert_same(again.load_model(1), replace(done.model, version=1))


def test_the_first_state_is_the_frozen_backbone(store: Store) -> None:
    backbone = store.backbone()
    weights = store.load_weights(backbone)
    model = store.load_model(None)
    assert list(model.layers) == list(LAYERS)
    for name, layer in model.layers.items():
        assert_same_array(layer.key_value, weights[f"{name}.qkv.weight"][D:])
        assert np.array_equal(layer.basis, np.eye(D))
        assert (layer.protected, layer.tokens, float(layer.moment.sum())) == (0, 0, 0.0)
    assert (model.classes, model.tasks, model.version) == ((), 0, None)
    assert model.head_weight.shape == (0, E)


def test_arrays_that_are_not_contiguous_are_not_scrambled(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store")
    weight = np.arange(3 * D * D, dtype=np.float32).reshape(D, 3 * D).T
    assert not weight.flags.c_contiguous
    config = BackboneConfig("any_vit", {}, {}, ("blocks.0.attn",), E)
    backbone = store.set_backbone(config, {"blocks.0.attn.qkv.weight": weight}, b"")
    assert np.array_equal(store.load_weights(backbone)["blocks.0.attn.qkv.weight"], weight)
    done = learned(store.load_model(None), "first", 1)
    fortran = replace(done.model, head_weight=np.asfortranarray(done.model.head_weight))
    store.publish(replace(done, model=fortran), "first", b"")
    assert_same(store.load_model(1), replace(done.model, version=1))


@settings(max_examples=12)
@given(
    chain=st.lists(
        st.tuples(
            st.integers(0, 2**31), st.sampled_from([(), LAYERS[:1], LAYERS]), st.integers(1, 12)
        ),
        min_size=1,
        max_size=5,
    )
)
def test_factors_replay_to_the_bits_of_the_merges_in_memory(
    chain: list[tuple[int, tuple[str, ...], int]],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = open_with_backbone(Path(folder))
        model = store.load_model(None)
        for task, (seed, without, rank) in enumerate(chain):
            done = learned(model, f"task-{task}", seed, without, rank)
            number = store.publish(done, f"task-{task}", b"").number
            model = replace(done.model, version=number)
            assert_same(Store.open(folder).load_model(number), model)


def test_a_lineage_can_branch(store: Store) -> None:
    first = publish(store, None, "first")
    second = publish(store, 1, "second")
    branch = publish(store, 1, "branch", seed=77)
    leaf = publish(store, 3, "leaf")
    fresh = publish(store, None, "fresh")
    assert [store.version(n).parent for n in store.numbers()] == [None, 1, 1, 3, None]
    for model in (first, second, branch, leaf, fresh):
        assert_same(store.load_model(model.version), model)
    tasks = {entry.task for entry in store.version(4).classes}
    assert tasks == {"first", "branch", "leaf"}
    assert store.load_model(4).tasks == 3
    assert store.version_of_task("branch") == 3


def test_current_is_what_it_was_set_to(store: Store) -> None:
    assert store.current() is None
    publish(store, None, "first")
    assert store.current() is None, "publishing does not promote"
    publish(store, 1, "second")
    for number in (2, 1, 2):
        store.set_current(number)
        assert Store.open(store.root).current() == number
    with pytest.raises(NotFoundError, match="no version 3"):
        store.set_current(3)
    assert store.current() == 2
    (store.root / "models/default/CURRENT").write_text("two")
    with pytest.raises(DamagedError, match="CURRENT"):
        store.current()


def test_what_is_not_there_is_not_found(store: Store) -> None:
    publish(store, None, "first")
    for number in (0, 2, -1, 10**9):
        for call in (store.version, store.verify, store.load_model):
            with pytest.raises(NotFoundError, match=str(number)):
                call(number)
        with pytest.raises(NotFoundError):
            store.path(number, ONNX_FILE)


@given(
    name=st.one_of(
        st.text(max_size=20),
        st.sampled_from(
            [
                "../00000001/model.onnx",
                "./model.onnx",
                "/etc/passwd",
                "../../../FORMAT",
                "..",
                "manifest.json",
                "model.onnx\0",
            ]
        ),
    )
)
def test_a_name_never_leads_out_of_the_version(shared_store: Store, name: str) -> None:
    listed = {"factors.safetensors", "head.safetensors", "memory.safetensors", ONNX_FILE}
    if name in listed:
        assert shared_store.path(1, name).parent == shared_store.path(1, ONNX_FILE).parent
    else:
        with pytest.raises(NotFoundError) as caught:
            shared_store.path(1, name)
        assert caught.value.field == "artifact"


def test_a_store_has_one_backbone_for_life(store: Store) -> None:
    with pytest.raises(StateError, match="already"):
        set_backbone(store, width=16)
    assert len(list((store.root / "backbones").iterdir())) == 1


def test_without_a_backbone_nothing_can_be_loaded(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    assert not store.has_backbone()
    for call in (store.backbone, lambda: store.load_model(None)):
        with pytest.raises(StateError, match="no backbone"):
            call()


def test_a_version_does_not_cost_a_backbone(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store")
    backbone = set_backbone(store, width=96, depth=6)
    for task in range(3):
        publish(store, task or None, f"task-{task}", rank=10)
    frozen = backbone.weights_path.stat().st_size
    for number in store.numbers():
        version = store.version(number)
        own = sum(entry.size for entry in version.files if entry.name != ONNX_FILE)
        # Q and C_old, 2 d^2 a layer, of its 12 d^2 weights; and the factors.
        assert own < 0.25 * frozen
    assert len(list((store.root / "backbones").iterdir())) == 1


# -- damage -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store with versions 1, 2 and 3, each the parent of the next; tests restore it."""
    store = open_with_backbone(tmp_path_factory.mktemp("shared") / "store")
    for task in range(3):
        publish(store, task or None, f"task-{task}")
    return store


@contextmanager
def damaged(path: Path, change: Callable[[bytearray], None]) -> Iterator[None]:
    content = path.read_bytes()
    changed = bytearray(content)
    change(changed)
    assert changed != content
    path.write_bytes(changed)
    try:
        yield
    finally:
        path.write_bytes(content)


def flip(position: int, mask: int) -> Callable[[bytearray], None]:
    """A change of one byte, anywhere in the file."""

    def change(content: bytearray) -> None:
        content[position % len(content)] ^= mask

    return change


POSITIONS = st.integers(0, 2**20)
MASKS = st.integers(1, 255)


@settings(max_examples=200)
@given(
    name=st.sampled_from(
        ["factors.safetensors", "head.safetensors", "memory.safetensors", ONNX_FILE]
    ),
    position=POSITIONS,
    mask=MASKS,
)
def test_a_flipped_byte_in_any_file_is_found(
    shared_store: Store, name: str, position: int, mask: int
) -> None:
    path = shared_store.path(2, name)
    with damaged(path, flip(position, mask)):
        with pytest.raises(DamagedError, match=name):
            shared_store.verify(2)
        if name != ONNX_FILE:
            with pytest.raises(DamagedError, match=name):
                shared_store.load_model(2)
        shared_store.verify(3)
    shared_store.verify(2)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (name, change)
        for name in ("factors.safetensors", "memory.safetensors", ONNX_FILE)
        for change in ("truncated", "grown", "missing")
        if (name, change) != (ONNX_FILE, "missing")  # it is not kept of every version
    ],
)
def test_a_file_of_another_size_is_found(shared_store: Store, name: str, change: str) -> None:
    path = shared_store.path(1, name)

    def resize(content: bytearray) -> None:
        if change == "truncated":
            del content[-1:]
        else:
            content.append(0)

    if change == "missing":
        kept = path.rename(path.with_name("elsewhere"))
        with pytest.raises(DamagedError, match=name):
            shared_store.verify(1)
        kept.rename(path)
    else:
        with damaged(path, resize), pytest.raises(DamagedError, match=name):
            shared_store.verify(1)
    shared_store.verify(1)


def test_damaged_factors_of_an_ancestor_are_found(shared_store: Store) -> None:
    path = shared_store.path(1, "factors.safetensors")
    with damaged(path, flip(-1, 1)):
        shared_store.verify(3)
        with pytest.raises(DamagedError, match=r"00000001.*factors"):
            shared_store.load_model(3)


@settings(max_examples=100)
@given(position=POSITIONS, mask=MASKS)
def test_a_flipped_byte_in_a_manifest_is_found(
    shared_store: Store, position: int, mask: int
) -> None:
    path = shared_store.path(2, ONNX_FILE).with_name("manifest.json")
    with damaged(path, flip(position, mask)):
        for call in (shared_store.verify, shared_store.version, shared_store.load_model):
            with pytest.raises(DamagedError, match="manifest"):
                call(2)
    assert shared_store.version(2).number == 2


def test_one_damaged_manifest_does_not_hide_the_others(shared_store: Store) -> None:
    path = shared_store.path(2, ONNX_FILE).with_name("manifest.json")
    with damaged(path, flip(0, 1)):
        assert shared_store.version_of_task("task-0") == 1
        assert shared_store.version_of_task("task-1") is None
        assert shared_store.version_of_task("task-2") == 3
    assert shared_store.version_of_task("task-1") == 2


def test_a_version_is_asked_once_which_task_made_it(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    """A learner asks before every task: what it reads must not grow with their number."""
    model = publish(store, None, "first")
    publish(store, model.version, "second")
    assert store.version_of_task("none") is None
    for number in (1, 2):
        (store.root / f"models/default/versions/{number:08d}/manifest.json").write_bytes(b"")
    assert store.version_of_task("first") == 1
    assert not caplog.records
    assert Store.open(store.root).version_of_task("first") is None
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2


def test_strangers_among_the_versions_are_passed_over(store: Store) -> None:
    publish(store, None, "first")
    (store.root / "models/default/versions/.DS_Store").write_bytes(b"")
    for name in (
        "lost+found",
        "\N{SUPERSCRIPT TWO}",
        "\N{ARABIC-INDIC DIGIT THREE}",
        "2",
        "00000000",
    ):
        (store.root / "models/default/versions" / name).mkdir()
    assert store.numbers() == [1]
    assert store.next_number() == 2
    assert store.version_of_task("none") is None


def forge(store: Store, version: int, changes: dict[str, Any]) -> None:
    """Have a manifest say something else, with a checksum that is right."""
    folder = store.root / f"models/default/versions/{version:08d}"
    content = json.dumps(json.loads((folder / "manifest.json").read_bytes()) | changes).encode()
    (folder / "manifest.json").write_bytes(content)
    checksum = hashlib.sha256(content).hexdigest()
    (folder / "manifest.sha256").write_text(f"{checksum}  manifest.json\n")


def listed(name: str, size: int = 1) -> list[dict[str, object]]:
    return [{"name": name, "size": size, "sha256": "0" * 64}]


FORGED: dict[str, dict[str, Any]] = {
    "its own parent": {"parent": 2},
    "a parent of later": {"parent": 3},
    "another's number": {"number": 1},
    "a file elsewhere": {"files": listed("../../../../secret")},
    "a file at the root": {"files": listed("/etc/passwd")},
    "a file of no name": {"files": listed("")},
    "a size that no message holds": {"files": listed("model.onnx", 2**63)},
    "a backbone elsewhere": {"backbone": "../.."},
    "a class elsewhere": {"forgets": ["../spool"]},
    "fewer classes than rows": {"classes": []},
}


@pytest.mark.parametrize("changes", FORGED.values(), ids=FORGED)
def test_a_manifest_that_no_store_wrote_is_damaged(store: Store, changes: dict[str, Any]) -> None:
    for parent in (None, 1, 2):
        publish(store, parent, f"after-{parent}")
    forge(store, 2, changes)
    with pytest.raises(DamagedError):
        store.load_model(2)
    if "classes" not in changes:
        for call in (store.version, store.verify, store.load_model):
            with pytest.raises(DamagedError):
                call(2)
    store.verify(1)


@pytest.mark.parametrize("name", ["../..", "/etc", "a\0b", ""])
def test_a_backbone_s_name_leads_nowhere_else(store: Store, name: str) -> None:
    (store.root / "models/default/backbone").write_text(name)
    with pytest.raises(DamagedError, match="no backbone's name"):
        store.backbone()


def test_a_flipped_bit_in_the_number_of_the_current_version_is_found(store: Store) -> None:
    for number in (1, 2, 3):
        publish(store, None, f"task-{number}")
    store.set_current(2)
    path = store.root / "models/default/CURRENT"
    for position in range(len(path.read_bytes())):
        for bit in range(8):
            with damaged(path, flip(position, 1 << bit)), pytest.raises(DamagedError):
                store.current()
    path.write_text("3\n")  # as an operator may write it
    assert store.current() == 3


@settings(max_examples=200)
@given(
    name=st.sampled_from(["weights.safetensors", "template.onnx", "manifest.json"]),
    position=POSITIONS,
    mask=MASKS,
)
def test_a_flipped_byte_in_the_backbone_is_found(
    shared_store: Store, name: str, position: int, mask: int
) -> None:
    path = shared_store.backbone().weights_path.with_name(name)
    with damaged(path, flip(position, mask)):
        for call in (shared_store.backbone, lambda: shared_store.load_model(3)):
            with pytest.raises(DamagedError, match="backbone"):
                call()
    shared_store.backbone()


@settings(max_examples=100)
@given(position=POSITIONS, mask=MASKS)
def test_a_flipped_byte_in_the_backbone_s_name_is_found(
    shared_store: Store, position: int, mask: int
) -> None:
    path = shared_store.root / "models/default/backbone"
    end = len(path.read_bytes()) - 1  # the newline does not matter
    with damaged(path, flip(position % end, mask)), pytest.raises(DamagedError, match="backbone"):
        shared_store.backbone()


# -- opening ------------------------------------------------------------------------------------


def test_a_store_of_a_newer_release_is_refused(store: Store) -> None:
    marker = store.root / "FORMAT"
    assert json.loads(marker.read_text()) == {"format": store_module.FORMAT}
    marker.write_text(json.dumps({"format": store_module.FORMAT + 1}))
    before = sorted(store.root.rglob("*"))
    with pytest.raises(StoreFormatError, match=f"reads up to {store_module.FORMAT}"):
        Store.open(store.root)
    assert sorted(store.root.rglob("*")) == before


@pytest.mark.parametrize(
    "content",
    [
        "",
        "1",
        "{}",
        '{"format": null}',
        '{"format": "x"}',
        "\0",
        '{"format": 1e999}',
        "[" * 100_000,
    ],
    ids=range(8),
)
def test_a_damaged_format_file_is_said_to_be(tmp_path: Path, content: str) -> None:
    (tmp_path / "FORMAT").write_text(content)
    with pytest.raises(DamagedError, match="FORMAT"):
        Store.open(tmp_path)


def test_what_is_not_a_store_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"")
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "cat.jpg").write_bytes(b"")
    for path, reason in ((file, "not a folder"), (folder, "no FORMAT")):
        with pytest.raises(InvalidInputError, match=reason) as caught:
            Store.open(path)
        assert caught.value.field == "store"
    assert [path.name for path in folder.iterdir()] == ["cat.jpg"]


def test_an_empty_folder_or_none_becomes_a_store(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir()  # of a freshly made file system
    for path in (tmp_path, tmp_path / "a" / "b"):
        assert Store.open(path).numbers() == []
        assert Store.open(str(path)).numbers() == []


# -- interruptions ------------------------------------------------------------------------------


class PowerCutError(BaseException):
    """Nothing after it runs, as nothing does after a power cut."""


class Disk:
    """The operating system, which can fail at any of the calls that change a disk for good."""

    CALLS = ("fsync", "rename", "replace")

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        self.ends_at: int | None = None
        self.error: BaseException = PowerCutError()
        for name in self.CALLS:
            monkeypatch.setattr(os, name, self._counting(getattr(os, name)))

    def _counting(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.calls == self.ends_at:
                raise self.error
            self.calls += 1
            return real(*args, **kwargs)

        return call


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def test_an_interrupted_publication_is_whole_or_nothing(
    store: Store, disk: Disk, tmp_path: Path
) -> None:
    """Cut at every call in turn: what was there stays, and the next publication succeeds."""
    first = publish(store, None, "first")
    store.set_current(1)
    done = learned(store.load_model(1), "second", 5)
    disk.calls = 0
    Store.open(shutil.copytree(store.root, tmp_path / "whole")).publish(done, "second", b"onnx")
    calls, seen = disk.calls, set()
    assert calls >= 7, "five files, their folder, and the folder they are moved to"
    for number in range(calls):
        root = shutil.copytree(store.root, tmp_path / str(number))
        disk.calls, disk.ends_at = 0, number
        with pytest.raises(PowerCutError):
            Store.open(root).publish(done, "second", b"onnx")
        disk.ends_at = None

        again = Store.open(root)
        again.clear_drafts()
        assert not list((root / "drafts").iterdir())
        found = tuple(again.numbers())
        seen.add(found)
        for version in found:
            again.verify(version)
        assert again.current() == 1
        assert_same(again.load_model(1), first)
        retried = again.publish(done, "second", b"onnx").number
        assert retried == len(found) + 1
        assert_same(again.load_model(retried), replace(done.model, version=retried))
    assert seen == {(1,), (1, 2)}


def test_an_interrupted_promotion_leaves_one_or_the_other(store: Store, disk: Disk) -> None:
    publish(store, None, "first")
    publish(store, 1, "second")
    store.set_current(1)
    disk.calls = 0
    store.set_current(1)
    for number in range(disk.calls):
        store.set_current(1)
        disk.calls, disk.ends_at = 0, number
        with pytest.raises(PowerCutError):
            store.set_current(2)
        disk.ends_at = None
        assert Store.open(store.root).current() in (1, 2)
    assert Store.open(store.root).current() == 2, "the last call only makes it durable"


def test_an_interrupted_making_of_a_store_can_be_repeated(tmp_path: Path, disk: Disk) -> None:
    open_with_backbone(tmp_path / "whole")
    for number in range(disk.calls):
        root = tmp_path / str(number)
        disk.calls, disk.ends_at = 0, number
        with pytest.raises(PowerCutError):
            open_with_backbone(root)
        disk.ends_at = None
        store = Store.open(root)
        store.clear_drafts()
        if not store.has_backbone():
            set_backbone(store)
        assert store.backbone().sha256 == Store.open(tmp_path / "whole").backbone().sha256


def test_a_full_disk_is_not_kept_full(store: Store, disk: Disk) -> None:
    publish(store, None, "first")
    store.set_current(1)
    done = learned(store.load_model(1), "second", 5)
    disk.error = OSError(errno.ENOSPC, "No space left on device")

    def publish_and_promote() -> None:
        store.set_current(store.publish(done, "second", b"onnx").number)

    before = sorted(store.root.rglob("*"))
    for number in itertools.count():
        disk.calls, disk.ends_at = 0, number
        with pytest.raises(OSError, match="No space"):
            publish_and_promote()
        if store.numbers() != [1]:
            break
        assert sorted(store.root.rglob("*")) == before
    assert number >= 7
    disk.ends_at = None
    assert store.current() == 1
    store.verify(2)
    assert not list((store.root / "drafts").iterdir())


def test_drafts_are_invisible_until_they_are_cleared(store: Store) -> None:
    publish(store, None, "first")
    draft = store.root / "drafts" / "00000002"
    shutil.copytree(store.path(1, ONNX_FILE).parent, draft)
    (store.root / "drafts" / "stray file").write_bytes(b"half")
    again = Store.open(store.root)
    assert draft.exists(), "a reader clears nothing: the writer may be at work"
    assert again.numbers() == [1]
    assert again.next_number() == 2
    again.clear_drafts()
    assert not list((store.root / "drafts").iterdir())
    again.verify(1)
