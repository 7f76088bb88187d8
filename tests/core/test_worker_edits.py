"""What the learning worker does with an edit, on a tiny ViT and a real store."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from inflora_core import edits
from inflora_core.compute import Compute
from inflora_core.config import LearnConfig
from inflora_core.errors import CancelledError, NotFoundError
from inflora_core.graph import read_metadata
from inflora_core.model import ClassUpdate, Forget, Progress, Stage
from inflora_core.progress import Tracker
from inflora_core.store import ONNX_FILE, Store
from inflora_core.worker import Worker
from tests.core import tiny
from tests.core.test_store import assert_same

CONFIG = LearnConfig(epochs=1, batch_size=8, rank=2, held_out_share=0.0)
Notify = Callable[[Progress], None]


def worker_of(store: Store) -> Worker:
    return Worker(store, Compute(), 1)


def learn(worker: Worker, folder: Path, task: str, parent: int | None, *labels: str) -> int:
    spool = tiny.write_spool(folder / task, labels, 4)
    return worker.learn(task, spool, CONFIG, parent, Tracker())


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with versions 1 (red, green) and 2 (blue, too)."""
    folder = tmp_path_factory.mktemp("taught")
    store = Store.open(folder / "store")
    worker = worker_of(store)
    worker.prepare(str(tiny.write_backbone(folder)), None)
    assert learn(worker, folder, "first", None, "red", "green") == 1
    assert learn(worker, folder, "second", 1, "blue") == 2
    return store.root


@pytest.fixture
def store(taught: Path, tmp_path: Path) -> Store:
    shutil.copytree(taught, tmp_path / "store")
    return Store.open(tmp_path / "store")


def test_an_edit_is_a_version_of_its_own(store: Store, tmp_path: Path) -> None:
    worker, stages = worker_of(store), list[Stage]()
    before = store.load_model(2)
    tracker = Tracker(lambda progress: stages.append(progress.stage))
    assert worker.edit("edit", Forget(("green",)), 2, tracker) == 3
    assert stages == [Stage.EXPORTING, Stage.CHECKING, Stage.PUBLISHING]
    version = store.verify(3)
    assert (version.parent, version.task, version.forgets) == (2, "edit", ("first.1",))
    expected = edits.without(before, {"first.1"})
    after = store.load_model(3)
    assert after.version == 3
    for name, layer in after.layers.items():
        assert layer.key_value.tobytes() == before.layers[name].key_value.tobytes()
    assert after.classes == expected.classes
    assert after.head_weight.tobytes() == expected.head_weight.tobytes()
    content = store.path(3, ONNX_FILE).read_bytes()
    assert read_metadata(content).classes == ("red", "blue")
    store.path(3, ONNX_FILE).unlink()
    store.rebuild_onnx(3)
    assert store.path(3, ONNX_FILE).read_bytes() == content
    # A task makes one version, however often it is sent.
    assert worker_of(store).edit("edit", Forget(("green",)), 2, Tracker()) == 3
    # It goes on from there.
    store.forget(version.forgets)
    assert learn(worker, tmp_path, "third", 3, "white") == 4
    assert [entry.label for entry in store.version(4).classes] == ["red", "blue", "white"]


def test_what_an_older_version_knew_is_not_learned_from_memory(
    store: Store, tmp_path: Path
) -> None:
    """The worker keeps the newest state; it must not be one with a class forgotten since."""
    worker = worker_of(store)
    worker.edit("rename", ClassUpdate("red", "rouge"), 2, Tracker())
    worker.edit("forget", Forget(("green",)), 3, Tracker())
    store.forget(store.version(4).forgets)
    for parent, labels in ((3, ["rouge", "blue", "white"]), (1, ["red", "white"])):
        number = learn(worker, tmp_path, f"on-{parent}", parent, "white")
        assert [entry.label for entry in store.load_model(number).classes] == labels
        assert "green" not in read_metadata(store.path(number, ONNX_FILE).read_bytes()).classes


def test_an_alias_means_its_class(store: Store, tmp_path: Path) -> None:
    worker = worker_of(store)
    worker.edit("alias", ClassUpdate("blue", None, ("cyan",)), 2, Tracker())
    spool = tiny.write_spool(tmp_path / "mixed", ("white", "cyan", "blue"), 2)
    examples = worker._decode(spool, worker._load(), worker._state(3), Tracker())
    assert examples.data.names == ("white", "blue")
    assert examples.meant == {"white": "white", "cyan": "blue", "blue": "blue"}
    assert examples.data.labels.tolist() == [0, 0, 1, 1, 1, 1]


def test_held_out_images_are_counted_under_the_name_they_came_with(
    store: Store, tmp_path: Path
) -> None:
    worker = worker_of(store)
    worker.edit("alias", ClassUpdate("blue", None, ("cyan",)), 2, Tracker())
    spool = tiny.write_spool(tmp_path / "mixed", ("white", "cyan"), 8)
    config = CONFIG.updated(held_out_share=0.25)
    report = store.version(worker.learn("mixed", spool, config, 3, Tracker())).report
    assert report is not None
    assert report.held_out_counts == {"white": 2, "cyan": 2}


def test_what_is_refused_or_given_up_leaves_nothing(store: Store) -> None:
    worker = worker_of(store)
    with pytest.raises(NotFoundError, match="'pink'"):
        worker.edit("edit", Forget(("pink",)), 2, Tracker())

    def give_up(progress: Progress) -> None:
        if progress.stage is Stage.CHECKING:
            raise CancelledError("cancelled on request")

    with pytest.raises(CancelledError):
        worker.edit("edit", Forget(("red",)), 2, Tracker(give_up))
    assert store.numbers() == [1, 2]
    assert_same(worker._state(2), store.load_model(2))
