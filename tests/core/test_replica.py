"""What a learner publishes to a shared store, and what a copy of that knows and answers."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inflora_core.errors import (
    DamagedError,
    FencedError,
    InvalidInputError,
    StateError,
    UnavailableError,
)
from inflora_core.mirror import Mirror, claim, learner_id
from inflora_core.model import VersionState
from inflora_core.predictor import Predictor, RuntimeOptions
from inflora_core.replica import Replica, is_replica
from inflora_core.shared import SharedStore
from inflora_core.store import ONNX_FILE, Store
from tests.core.object_store import s3, url
from tests.service.mean_colour import make_backbone, publish_colours, publish_task

__all__ = ["s3", "url"]

COLOURS = {
    "red": (1.0, 0.0, 0.0),
    "green": (0.0, 1.0, 0.0),
    "blue": (0.0, 0.0, 1.0),
    "white": (1.0, 1.0, 1.0),
}


def teach(store: Store, *labels: str, parent: int | None = None) -> int:
    """Publish a version that knows some colours, too, and make it current."""
    colours: dict[str, Any] = {label: np.array(COLOURS[label]) for label in labels}
    number = publish_colours(store, f"task{store.next_number()}", colours, parent)
    store.set_current(number)
    return number


def forget(store: Store, label: str, *, purge: bool = False) -> int:
    """Publish a version without a colour, make it current, and let the colour be forgotten."""
    command = {
        "command": "edit",
        "edit": {"labels": [label], "purge": purge},
        "parent": store.current(),
        "task": f"task{store.next_number()}",
    }
    number = publish_task(store, command)
    gone = store.version(number).forgets
    store.forget(gone)
    store.set_current(number)
    if purge:
        store.purge(gone)
    return number


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store.open(tmp_path / "learner")
    make_backbone(store)
    return store


@pytest.fixture
def shared(url: str) -> SharedStore:
    return SharedStore.open(url)


def follow(shared: SharedStore, folder: Path, cache_bytes: int = 0) -> Replica:
    """Return a copy of what is published now."""
    replica = Replica.of(shared, folder, cache_bytes)
    seen = shared.root()
    assert seen is not None
    replica.take(shared.index(seen.root))
    if seen.root.current is not None:
        replica.set_current(seen.root.current)
    return replica


def answers(store: Store, number: int) -> dict[str, float]:
    """Return what a version says of a reddish image, by class."""
    whole = store.version(number).state is VersionState.WHOLE
    model = store.onnx(number) if whole else store.make_onnx(number)
    predictor = Predictor.load(model, RuntimeOptions(1, "cpu"))
    image = np.full((8, 8, 3), (200, 40, 30), np.uint8)
    found = predictor.predict([image]).probabilities[0]
    return dict(zip(predictor.card.classes, found.tolist(), strict=True))


def files(replica: Replica) -> set[str]:
    """Return which files of versions and of the backbone a copy has, without manifests."""
    return {
        str(path.relative_to(replica.root))
        for path in replica.root.rglob("*")
        if path.suffix in (".onnx", ".safetensors")
    }


def test_a_copy_answers_as_the_learner_does(shared: SharedStore, store: Store, tmp_path: Path):
    mirror = claim(store, shared)
    teach(store, "red", "green")
    teach(store, "blue", parent=1)
    store.pin(1)
    assert mirror.publish()
    assert not mirror.publish()
    replica = follow(shared, tmp_path / "copy")
    assert files(replica) == set()
    assert replica.numbers() == store.numbers() == [1, 2]
    assert replica.current() == store.current() == 2
    for number in (1, 2):
        assert replica.version(number) == store.version(number)
        assert answers(replica, number) == answers(store, number)
    # What nobody needed was not fetched.
    assert files(replica) == {
        f"models/default/versions/{number:08d}/model.onnx" for number in (1, 2)
    }


def test_what_is_forgotten_pinned_and_retired_is_so_in_copies(
    shared: SharedStore, store: Store, tmp_path: Path
):
    mirror = claim(store, shared)
    teach(store, "red", "green")
    teach(store, "blue", parent=1)
    store.pin(1)
    mirror.publish()
    replica = follow(shared, tmp_path / "copy")
    for number in (1, 2):
        answers(replica, number)
    number = forget(store, "green")
    store.unpin(1)
    mirror.publish()
    again = follow(shared, tmp_path / "copy")
    assert again.version(2).state is VersionState.REDUCED
    assert not again.version(1).pinned
    for each in (1, 2, number):
        assert again.version(each) == store.version(each)
        assert answers(again, each) == answers(store, each)
        assert "green" not in answers(again, each)
    store.retire(1)
    mirror.publish()
    last = follow(shared, tmp_path / "copy")
    assert last.version(1) == store.version(1)
    with pytest.raises(StateError, match="retired"):
        last.onnx(1)
    assert not any("00000001" in name for name in files(last) if "factors" not in name)


def test_what_is_purged_is_gone_everywhere(shared: SharedStore, store: Store, tmp_path: Path):
    mirror = claim(store, shared)
    teach(store, "red", "green")
    mirror.publish()
    replica = follow(shared, tmp_path / "copy")
    answers(replica, 1)
    old = {entry.sha256 for entry in store.version(1).files if "factors" not in entry.name}
    assert old < set(shared.sizes())
    forget(store, "green", purge=True)
    mirror.publish()
    old -= {entry.sha256 for entry in store.version(2).files}  # the same bytes by chance
    assert len(old) == 2
    assert not old & set(shared.sizes())
    again = follow(shared, tmp_path / "copy")
    assert again.version(1) == store.version(1)
    assert again.version(1).state is VersionState.PURGED
    assert not any("00000001" in name for name in files(again) if "factors" not in name)
    everything = b"".join(shared.get(name) for name in set(shared.sizes()))
    kept = b"".join(path.read_bytes() for path in again.root.rglob("*") if path.is_file())
    assert b"green" not in everything
    assert b"green" not in kept
    assert answers(again, 2) == answers(store, 2)


def test_a_file_that_is_damaged_or_let_go_is_had_again(
    shared: SharedStore, store: Store, tmp_path: Path
):
    mirror = claim(store, shared)
    teach(store, "red", "green")
    mirror.publish()
    replica = follow(shared, tmp_path / "copy")
    expected = answers(replica, 1)
    path = replica.path(1, ONNX_FILE)
    path.write_bytes(path.read_bytes()[::-1])
    assert answers(replica, 1) == expected
    store.drop_onnx(1)
    mirror.publish()
    fresh = follow(shared, tmp_path / "another")
    assert answers(fresh, 1) == expected
    assert fresh.rebuild_onnx(1) == store.make_onnx(1)


def test_a_copy_keeps_what_was_used_last(shared: SharedStore, store: Store, tmp_path: Path):
    mirror = claim(store, shared)
    parent = None
    for label in COLOURS:
        parent = teach(store, label, parent=parent)
    mirror.publish()
    sizes = {number: store.path(number, ONNX_FILE).stat().st_size for number in store.numbers()}
    replica = follow(shared, tmp_path / "copy", cache_bytes=sizes[2] + sizes[4])
    for number in (1, 2, 3, 2):
        answers(replica, number)
        replica.trim({4})
    assert [number for number in replica.numbers() if replica.has_onnx(number)] in ([2], [2, 3])
    answers(replica, 4)
    replica.trim({4})
    assert replica.has_onnx(4)
    assert sum(sizes[number] for number in sizes if replica.has_onnx(number)) <= sizes[2] + sizes[4]


def test_a_copy_goes_on_where_it_was(
    shared: SharedStore, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Also without the shared store, with what it has."""
    claim(store, shared).publish()
    mirror = claim(store, shared)
    teach(store, "red", "green")
    mirror.publish()
    expected = answers(follow(shared, tmp_path / "copy"), 1)

    def away(*_: Any, **__: Any) -> Any:
        raise UnavailableError("away")

    for name in ("root", "get", "fetch"):
        monkeypatch.setattr(SharedStore, name, away)
    replica = Replica.of(shared, tmp_path / "copy")
    assert replica.current() == 1
    assert answers(replica, 1) == expected
    replica.path(1, ONNX_FILE)
    with pytest.raises(UnavailableError):
        replica.path(1, "head.safetensors")


def test_folders_are_what_they_are(shared: SharedStore, store: Store, tmp_path: Path):
    claim(store, shared).publish()
    with pytest.raises(InvalidInputError, match="a store of its own"):
        Replica.of(shared, store.root)
    replica = follow(shared, tmp_path / "copy")
    assert is_replica(replica.root)
    assert not is_replica(store.root)
    with pytest.raises(InvalidInputError, match="is a copy of"):
        Replica.of(SharedStore.open((tmp_path / "other").as_uri()), replica.root)


# --- One learner publishes ----------------------------------------------------------------------


def test_a_learner_keeps_its_id(store: Store):
    first = learner_id(store.root)
    assert len(first) == 32
    assert learner_id(Store.open(store.root).root) == first


def test_a_second_learner_is_refused(shared: SharedStore, store: Store, tmp_path: Path):
    mirror = claim(store, shared)
    other = Store.open(tmp_path / "other")
    make_backbone(other)
    with pytest.raises(FencedError, match=f"learner {learner_id(store.root)} on"):
        claim(other, shared)
    teach(store, "red")
    assert mirror.publish()


def test_a_start_of_the_same_learner_fences_an_older_one(shared: SharedStore, store: Store):
    """The same folder, on two machines that do not see each other's locks."""
    older = claim(store, shared)
    newer = claim(store, shared)
    assert newer.seen.root.epoch == older.seen.root.epoch + 1
    teach(store, "red")
    assert newer.publish()
    with pytest.raises(FencedError):
        older.publish()


def test_who_takes_over_has_all_that_was_published(
    shared: SharedStore, store: Store, tmp_path: Path
):
    mirror = claim(store, shared)
    teach(store, "red", "green")
    teach(store, "blue", parent=1)
    forget(store, "green")
    store.pin(2)
    mirror.publish()
    other = Store.open(tmp_path / "other")
    heir = claim(other, shared, take_over=True)
    assert other.current() == 3
    assert not is_replica(other.root)
    for number in store.numbers():
        assert other.verify(number) == store.verify(number)
        assert other.make_onnx(number) == store.make_onnx(number)
    teach(other, "white", parent=3)
    assert heir.publish()
    teach(store, "white", parent=3)
    with pytest.raises(FencedError, match=learner_id(other.root)):
        mirror.publish()
    seen = shared.root()
    assert seen is not None
    assert seen.root.writer == learner_id(other.root)


def test_taking_over_can_be_interrupted(
    shared: SharedStore, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    mirror = claim(store, shared)
    teach(store, "red", "green")
    teach(store, "blue", parent=1)
    mirror.publish()
    fetch, left = SharedStore.fetch, 4

    def cut(self: SharedStore, sha256: str, to: Path) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise UnavailableError("the line is cut")
        fetch(self, sha256, to)

    other = Store.open(tmp_path / "other")
    with monkeypatch.context() as patch:
        patch.setattr(SharedStore, "fetch", cut)
        with pytest.raises(UnavailableError):
            claim(other, shared, take_over=True)
    with pytest.raises(FencedError):
        claim(other, shared)
    claim(Store.open(tmp_path / "other"), shared, take_over=True)
    assert [other.verify(number) for number in (1, 2)] == [store.version(n) for n in (1, 2)]


def test_an_older_backup_overwrites_nothing(shared: SharedStore, store: Store, tmp_path: Path):
    mirror = claim(store, shared)
    teach(store, "red")
    shutil.copytree(store.root, tmp_path / "backup")
    teach(store, "green", parent=1)
    mirror.publish()
    before = shared.root()
    for take_over in (False, True):
        with pytest.raises(StateError, match="has version 2"):
            claim(Store.open(tmp_path / "backup"), shared, take_over=take_over)
    assert shared.root() == before


def test_a_move_whose_answer_is_lost_is_known_by_the_next_attempt(
    shared: SharedStore, store: Store, monkeypatch: pytest.MonkeyPatch
):
    mirror = claim(store, shared)
    teach(store, "red")
    move = SharedStore.move

    def unanswered(self: SharedStore, *args: Any) -> Any:
        move(self, *args)
        raise UnavailableError("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(SharedStore, "move", unanswered)
        with pytest.raises(UnavailableError):
            mirror.publish()
    assert not mirror.publish()
    teach(store, "green", parent=1)
    assert mirror.publish()


def test_a_damaged_file_is_not_published(shared: SharedStore, store: Store, tmp_path: Path):
    mirror = claim(store, shared)
    teach(store, "red")
    path = store.path(1, ONNX_FILE)
    path.write_bytes(b"spoilt")
    mirror.publish()
    assert ONNX_FILE not in mirror.index.versions[1].files
    replica = follow(shared, tmp_path / "copy")
    assert replica.rebuild_onnx(1) == store.rebuild_onnx(1)
    mirror.publish()
    assert ONNX_FILE in mirror.index.versions[1].files


def test_what_nothing_names_is_swept(shared: SharedStore, store: Store):
    mirror = claim(store, shared)
    teach(store, "red")
    mirror.publish()
    before = set(shared.sizes())
    shared.put(b"of a learner that was ended while it published")
    mirror.sweep()
    assert set(shared.sizes()) == before


def names_of(mirror: Mirror) -> Iterable[str]:
    """Return what a root leads to."""
    return mirror.index.objects() | {mirror.seen.root.index}


def test_nothing_is_left_over(shared: SharedStore, store: Store):
    mirror = claim(store, shared)
    teach(store, "red", "green")
    mirror.publish()
    forget(store, "green", purge=True)
    mirror.publish()
    assert set(shared.sizes()) == names_of(mirror)


def test_a_current_version_that_cannot_be_read_is_not_published(shared: SharedStore, store: Store):
    mirror = claim(store, shared)
    teach(store, "red")
    mirror.publish()
    teach(store, "green", parent=1)
    (store.root / "models/default/versions/00000002/manifest.json").write_bytes(b"{}")
    before = shared.root()
    with pytest.raises(DamagedError, match="version 2 is current"):
        mirror.publish()
    assert shared.root() == before


# --- When something is lost, late or interrupted --------------------------------------------------


def heir_of(shared: SharedStore, folder: Path) -> Mirror:
    """Take a learner's place."""
    return claim(Store.open(folder), shared, take_over=True)


def test_who_was_replaced_deletes_nothing(shared: SharedStore, store: Store, tmp_path: Path):
    older = claim(store, shared)
    teach(store, "red")
    older.publish()
    heir = heir_of(shared, tmp_path / "heir")
    teach(heir.store, "green", parent=1)
    heir.publish()
    before = set(shared.sizes())
    assert not older.publish()  # nothing has changed, so it does not know yet
    with pytest.raises(FencedError):
        older.sweep()
    assert set(shared.sizes()) == before


@pytest.mark.parametrize("name", ["manifest.json", "head.safetensors", "factors.safetensors"])
@pytest.mark.parametrize("content", [b"spoilt", None])
def test_what_the_learner_lost_is_not_taken_from_others(
    shared: SharedStore, store: Store, tmp_path: Path, name: str, content: bytes | None
):
    mirror = claim(store, shared)
    teach(store, "red")
    teach(store, "green", parent=1)
    mirror.publish()
    path = store.root / "models/default/versions/00000001" / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    for restarted in (False, True):
        mirrored = claim(store, shared) if restarted else mirror
        store.pin(2)
        mirrored.publish()
        mirrored.sweep()
        store.unpin(2)
        mirrored.publish()
    heir = heir_of(shared, tmp_path / "heir")
    assert heir.store.verify(1).classes == heir.store.version(1).classes
    assert heir.store.make_onnx(2) == store.onnx(2)


@pytest.mark.parametrize("lost", ["index", "object", "torn object"])
def test_what_the_shared_store_lost_is_put_again(store: Store, tmp_path: Path, lost: str):
    shared = SharedStore.open((tmp_path / "shared").as_uri())
    mirror = claim(store, shared)
    teach(store, "red")
    mirror.publish()
    head = store.version(1).file("head.safetensors")
    assert head is not None
    name = mirror.seen.root.index if lost == "index" else head.sha256
    path = tmp_path / "shared" / "objects" / name
    if lost == "torn object":
        path.write_bytes(b"")
    else:
        path.unlink()
    again = claim(store, shared)
    again.publish()
    assert shared.get(head.sha256) == store.path(1, "head.safetensors").read_bytes()
    assert shared.index(again.seen.root) == again.index


def test_a_folder_that_is_not_mounted_is_not_begun_anew(store: Store, tmp_path: Path):
    shared = SharedStore.open((tmp_path / "shared").as_uri())
    claim(store, shared)
    shutil.move(tmp_path / "shared", tmp_path / "unmounted")
    (tmp_path / "shared").mkdir()
    with pytest.raises(UnavailableError, match="mounted"):
        claim(store, shared)
    assert not (tmp_path / "shared" / "CURRENT").exists()


def fail_once(monkeypatch: pytest.MonkeyPatch, kind: type, name: str) -> None:
    """Have a method raise once, as if the network did."""
    method, failed = getattr(kind, name), []

    def once(*args: Any, **more: Any) -> Any:
        if not failed:
            failed.append(True)
            raise UnavailableError("the line is cut")
        return method(*args, **more)

    monkeypatch.setattr(kind, name, once)


def test_a_purge_whose_deletion_failed_is_swept(
    shared: SharedStore, store: Store, monkeypatch: pytest.MonkeyPatch
):
    mirror = claim(store, shared)
    teach(store, "red", "green")
    mirror.publish()
    forget(store, "green", purge=True)
    fail_once(monkeypatch, SharedStore, "delete")
    with pytest.raises(UnavailableError):
        mirror.publish()
    assert not mirror.publish()
    mirror.sweep()
    assert set(shared.sizes()) == names_of(mirror)


def test_an_attempt_that_comes_late_is_adopted(
    shared: SharedStore, store: Store, monkeypatch: pytest.MonkeyPatch
):
    """No answer came; by the time that the next attempt is made, it has happened after all."""
    mirror = claim(store, shared)
    teach(store, "red")
    move, late = SharedStore.move, []

    def delayed(self: SharedStore, *args: Any) -> Any:
        if not late:
            late.append(args)
            raise UnavailableError("no answer")
        move(self, *late[0])
        return move(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(SharedStore, "move", delayed)
        for _ in range(2):
            with pytest.raises(UnavailableError):
                mirror.publish()
    mirror.publish()
    seen = shared.root()
    assert seen == mirror.seen
    assert seen.root.current == 1


def test_an_interrupted_look_is_not_forgotten(
    shared: SharedStore, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    mirror = claim(store, shared)
    teach(store, "red", "green")
    mirror.publish()
    replica = follow(shared, tmp_path / "copy")
    replica.outdated = False
    forget(store, "green", purge=True)
    mirror.publish()
    with monkeypatch.context() as patch:
        fail_once(patch, Replica, "_take_version")
        with pytest.raises(UnavailableError):
            replica.take(mirror.index)
    replica.take(mirror.index)
    assert replica.outdated


@pytest.mark.parametrize("name", ["head.safetensors", "memory.safetensors", ONNX_FILE])
def test_what_is_purged_under_way_does_not_come_back(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    shared = SharedStore.open((tmp_path / "shared").as_uri())
    mirror = claim(store, shared)
    teach(store, "red", "green")
    mirror.publish()
    replica = follow(shared, tmp_path / "copy")
    fetch, path = SharedStore.fetch, replica.root / "models/default/versions/00000001" / name
    taking: list[threading.Thread] = []

    def purged_meanwhile(self: SharedStore, sha256: str, to: Path) -> None:
        fetch(self, sha256, to)
        if to == path:
            forget(store, "green", purge=True)
            mirror.publish()
            taking.append(threading.Thread(target=replica.take, args=(mirror.index,)))
            taking[0].start()
            # It waits for the lock of this file, once the manifest is another.
            while b"green" in (path.parent / "manifest.json").read_bytes():
                pass

    monkeypatch.setattr(SharedStore, "fetch", purged_meanwhile)
    with pytest.raises(StateError):
        replica.path(1, name)
    taking[0].join(60)
    assert not path.exists()


def test_versions_that_are_not_published_any_more_go(
    shared: SharedStore, store: Store, tmp_path: Path
):
    mirror = claim(store, shared)
    teach(store, "red")
    mirror.publish()
    before = mirror.index
    teach(store, "green", parent=1)
    mirror.publish()
    replica = follow(shared, tmp_path / "copy")
    answers(replica, 2)
    replica.take(before)
    assert replica.numbers() == [1]
    assert replica.outdated


def test_a_copy_that_was_hardly_begun_is_begun_again(shared: SharedStore, tmp_path: Path):
    (tmp_path / "copy" / "lost+found").mkdir(parents=True)
    replica = Replica.of(shared, tmp_path / "copy")
    for path in (replica.root / "FORMAT", replica.root / "models" / "default" / "forgotten.json"):
        path.unlink()
        shutil.rmtree(replica.root / "drafts", ignore_errors=True)
    shutil.rmtree(replica.root / "models")
    shutil.rmtree(replica.root / "backbones")
    assert Replica.of(shared, tmp_path / "copy").numbers() == []


def test_who_was_too_late_to_take_over_fetches_again(
    shared: SharedStore, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    mirror = claim(store, shared)
    teach(store, "red")
    mirror.publish()
    take_all = Replica.take_all

    def published_meanwhile(self: Replica, index: Any) -> None:
        take_all(self, index)
        teach(store, "green", parent=1)
        mirror.publish()

    with monkeypatch.context() as patch:
        patch.setattr(Replica, "take_all", published_meanwhile)
        with pytest.raises(FencedError):
            heir_of(shared, tmp_path / "heir")
    heir = heir_of(shared, tmp_path / "heir")
    assert heir.store.current() == 2
    assert not (heir.store.root / "FETCHING").exists()
