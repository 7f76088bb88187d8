"""What is forgotten is in no version any more; what is purged is not on the disk any more."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inflora_core import durable, edits
from inflora_core.edits import Edited
from inflora_core.errors import DamagedError, InvalidInputError, NotFoundError, StateError
from inflora_core.model import MARK, ClassUpdate, Forget, VersionState, position_of
from inflora_core.store import ONNX_FILE, Forgotten, Store
from tests.core.test_store import assert_same, open_with_backbone, publish

WHOLE, REDUCED, PURGED = VersionState.WHOLE, VersionState.REDUCED, VersionState.PURGED
FIRST, SECOND = "first – ß0", "second – ß0"
"""What ``test_store.publish`` calls the first class of a task."""


def edit(store: Store, parent: int, change: Forget | ClassUpdate) -> int:
    """Publish an edit and make it current, as worker and server do."""
    edited = edits.apply(store.load_model(parent), change, store.tables_for(change))
    version = store.publish_edit(edited, f"edit-{store.next_number()}", b"onnx of the edit")
    store.forget(version.forgets)
    store.set_current(version.number)
    return version.number


def states(store: Store) -> list[VersionState]:
    return [store.version(number).state for number in store.numbers()]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Versions 1 and 2, a branch 3 beside 2, and 4 after 2."""
    store = open_with_backbone(tmp_path / "store")
    for parent, task in ((None, "first"), (1, "second"), (1, "third"), (2, "fourth")):
        publish(store, parent, task)
    store.set_current(4)
    return store


def test_a_forgotten_class_is_in_no_version(store: Store) -> None:
    before = {number: store.load_model(number) for number in store.numbers()}
    number = edit(store, 4, Forget((SECOND,)))
    assert number == 5
    keys = {"second.0"}
    assert store.forgotten() == Forgotten(frozenset(keys))
    assert states(store) == [WHOLE, REDUCED, WHOLE, REDUCED, WHOLE]
    again = Store.open(store.root)
    for old, model in before.items():
        assert_same(again.load_model(old), edits.without(model, keys))
        assert SECOND not in [entry.label for entry in again.version(old).classes]
    assert again.load_model(5).classes == edits.without(before[4], keys).classes
    # What is learned on an older one does not bring it back.
    after = publish(again, 2, "fifth")
    assert SECOND not in [entry.label for entry in after.classes]
    assert again.version(6).state is WHOLE
    again.verify(6)


def test_an_edit_changes_nothing_else(store: Store) -> None:
    before = store.load_model(4)
    number = edit(store, 4, ClassUpdate(FIRST, "new", ("old",)))
    version, after = store.version(number), store.load_model(number)
    assert (version.parent, version.report, version.forgets) == (4, None, ())
    assert version.classes[0].names == ("new", "old")
    assert position_of(after.classes, "old") == position_of(after.classes, "new") == 0
    assert_same(replace(after, classes=before.classes, version=4), before)
    assert after.tasks == 3, "nothing was learned"
    assert store.version(4).classes[0].names == (FIRST,)
    assert states(store) == [WHOLE] * 5
    renamed = edit(store, number, Forget(("old",)))
    assert [store.version(n).classes[0].label for n in (1, 2, 3, 4, number)] == ["first – ß1"] * 5
    assert store.version(renamed).forgets == ("first.0",)


def test_files_that_hold_it_are_withheld(store: Store) -> None:
    edit(store, 4, Forget((SECOND,)))
    for name in (ONNX_FILE, "head.safetensors"):
        with pytest.raises(StateError, match=r"version 2 holds .* use version 5"):
            store.path(2, name)
        assert store.path(3, name).exists()
    for name in ("factors.safetensors", "memory.safetensors"):
        assert store.path(2, name).exists()
    with pytest.raises(NotFoundError):
        store.path(2, "unknown")
    shown = [[entry.name for entry in store.artifacts(store.version(n))] for n in (2, 3)]
    assert shown[0] == ["factors.safetensors", "memory.safetensors"]
    assert shown[1] == [*shown[0][:1], "head.safetensors", "memory.safetensors", ONNX_FILE]
    # It is not needed, so it is no damage.
    store._folder(2).joinpath(ONNX_FILE).unlink()
    store.verify(2)


def test_a_version_without_any_class_left_cannot_answer(store: Store) -> None:
    publish(store, None, "alone")
    edit(store, 4, Forget(("alone – ß0", "alone – ß1")))
    assert store.load_model(5).classes == store.version(5).classes == ()
    for call in (store.verify, store.make_onnx):
        with pytest.raises(StateError, match="all classes of version 5 are forgotten; use version"):
            call(5)


def test_the_same_label_can_be_taught_again(store: Store) -> None:
    edit(store, 4, Forget((SECOND,)))
    done = publish(store, 5, "sixth")
    taught = replace(done.classes[-1], label=SECOND)
    store.publish_edit(
        Edited(replace(done, classes=(*done.classes[:-1], taught))), "later", b"onnx"
    )
    store.set_current(7)
    assert SECOND in [entry.label for entry in store.version(7).classes]
    assert SECOND not in [entry.label for entry in store.version(2).classes]
    # The one that is known now, not the one that is forgotten already; a purge takes both.
    assert edits.keys_to_forget(
        store.version(7).classes, [SECOND], store.tables_for(Forget((SECOND,)))
    ) == {taught.key}
    assert edits.keys_to_forget(
        store.version(7).classes, [SECOND], store.tables_for(Forget((SECOND,), purge=True))
    ) == {taught.key, "second.0"}


@settings(max_examples=20, deadline=None)
@given(position=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_damaged_list_brings_nothing_back(forgetful: Store, position: int, bit: int) -> None:
    path = forgetful.root / "models/default/forgotten.json"
    content = path.read_bytes()
    changed = bytearray(content)
    changed[position % len(content)] ^= 1 << bit
    path.write_bytes(changed)
    try:
        assert forgetful.forgotten().keys == {"second.0"}  # a blank is as good as another
    except DamagedError:
        for call in (forgetful.version, forgetful.load_model, forgetful.verify):
            with pytest.raises(DamagedError, match=r"forgotten\.json"):
                call(2)
    finally:
        path.write_bytes(content)
    assert forgetful.forgotten().keys == {"second.0"}


@pytest.fixture(scope="module")
def forgetful(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store with a forgotten class, which tests leave as it is."""
    store = open_with_backbone(tmp_path_factory.mktemp("forgetful") / "store")
    publish(store, None, "first")
    publish(store, 1, "second")
    edit(store, 2, Forget((SECOND,)))
    return store


# -- purging ------------------------------------------------------------------------------------


def holding(root: Path, text: str) -> list[Path]:
    """Return the files under ``root`` with this text in them, as any of our files has it."""
    forms = {text.encode(), ascii(text)[1:-1].encode()}
    files = (path for path in root.rglob("*") if path.is_file())
    return [path for path in files if any(form in path.read_bytes() for form in forms)]


def purge(store: Store, number: int = 5) -> None:
    store.purge(store.version(number).forgets)


def test_a_purge_leaves_nothing_but_the_factors(store: Store) -> None:
    edit(store, 4, Forget((SECOND,), purge=True))
    kept = {number: store.load_model(number) for number in (1, 3, 5)}
    assert holding(store.root, SECOND)
    assert store.names_of({"second.0"}) == {SECOND}
    purge(store)
    assert not holding(store.root, SECOND)
    assert store.names_of({"second.0"}) == frozenset()
    again = Store.open(store.root)
    assert states(again) == [WHOLE, PURGED, WHOLE, PURGED, WHOLE]
    for number in (2, 4):
        folder = store._folder(number)
        assert sorted(path.name for path in folder.iterdir()) == [
            "factors.safetensors",
            "manifest.json",
            "manifest.sha256",
        ]
        for call in (again.load_model, again.verify, again.make_onnx, again.rebuild_onnx):
            with pytest.raises(StateError, match=rf"version {number} knew .* use version 5"):
                call(number)
        for name in (ONNX_FILE, "head.safetensors", "memory.safetensors"):
            with pytest.raises(StateError, match="use version 5"):
                again.path(number, name)
        assert again.path(number, "factors.safetensors").exists()
        assert MARK not in [entry.label for entry in again.version(number).classes]
    for number, model in kept.items():
        again.verify(number)
        assert_same(again.load_model(number), model)


def test_what_was_forgotten_before_can_be_purged(store: Store) -> None:
    edit(store, 4, Forget((SECOND,)))
    with pytest.raises(NotFoundError):
        edit(store, 5, Forget((SECOND,)))
    number = edit(store, 5, Forget((SECOND,), purge=True))
    assert number == 6
    assert store.version(6).forgets == ("second.0",)
    assert store.load_model(6).classes == store.load_model(5).classes
    store.purge(store.version(6).forgets)
    assert not holding(store.root, SECOND)
    with pytest.raises(NotFoundError):  # nobody knows any more what it was called
        edit(store, 6, Forget((SECOND,), purge=True))
    with pytest.raises(InvalidInputError):
        edit(store, 6, Forget((MARK,), purge=True))


def test_names_that_another_class_bears_are_not_taken_from_it(store: Store) -> None:
    edit(store, 4, ClassUpdate(SECOND, "spare"))
    edit(store, 5, ClassUpdate(FIRST, SECOND))
    edit(store, 6, Forget(("spare",), purge=True))
    assert store.names_of({"second.0"}) == {"spare"}
    store.purge(["second.0"])
    assert store.version(7).classes[0].label == SECOND
    assert not holding(store.root, "spare")


class PowerCutError(OSError):
    pass


def cut_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Have every change of the disk after the first ``steps`` fail; return how many there were."""
    made = 0

    def counted(function: Callable[..., None]) -> Callable[..., None]:
        def call(*args: object, **options: object) -> None:
            nonlocal made
            if made == steps:
                raise PowerCutError
            made += 1
            function(*args, **options)

        return call

    monkeypatch.setattr(durable, "replace", counted(durable.replace))
    monkeypatch.setattr(Path, "unlink", counted(Path.unlink))
    return lambda: made


def test_an_interrupted_purge_can_always_be_finished(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(store, 4, Forget((SECOND,), purge=True))
    kept = {number: store.load_model(number) for number in (1, 3, 5)}
    steps, finished = 0, False
    while not finished:
        copy = tmp_path / f"copy-{steps}"
        shutil.copytree(store.root, copy)
        cut = Store.open(copy)
        with monkeypatch.context() as broken:
            count = cut_after(steps, broken)
            try:
                purge(cut)
                finished = True
            except PowerCutError:
                assert count() == steps
        again = Store.open(copy)
        assert states(again) == [
            WHOLE,
            *([PURGED, WHOLE, PURGED] if steps else [REDUCED, WHOLE, REDUCED]),
            WHOLE,
        ]
        for number, model in kept.items():  # factors of the purged ones are part of them
            assert_same(again.load_model(number), model)
        purge(again)
        assert not holding(copy, SECOND)
        assert states(again) == [WHOLE, PURGED, WHOLE, PURGED, WHOLE]
        shutil.rmtree(copy)
        steps += 1
    assert steps > 12, "a list, and for each of two versions three replacements and three files"


def test_a_damaged_version_does_not_stop_a_purge(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    edit(store, 4, Forget((SECOND,), purge=True))
    manifest = store._folder(3) / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-1])
    purge(store)
    assert "passing over version 3" in caplog.text
    assert [store.version(n).state for n in (1, 2, 4, 5)] == [WHOLE, PURGED, PURGED, WHOLE]


def test_a_purge_is_not_finished_while_a_version_cannot_be_read(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too many open files say nothing about a version: passing over it would leave it whole."""
    edit(store, 4, Forget((SECOND,), purge=True))
    read = Path.read_bytes

    def starved(path: Path) -> bytes:
        if path == store._folder(4) / "manifest.json":
            raise OSError(errno.EMFILE, "too many open files")
        return read(path)

    with monkeypatch.context() as broken:
        broken.setattr(Path, "read_bytes", starved)
        with pytest.raises(OSError, match="too many"):
            purge(store)
    purge(store)
    assert not holding(store.root, SECOND)


def test_a_version_that_was_passed_over_is_purged_later(store: Store) -> None:
    edit(store, 4, Forget((SECOND,), purge=True))
    manifest = store._folder(4) / "manifest.json"
    content = manifest.read_bytes()
    manifest.write_bytes(content[:-1])
    purge(store)
    manifest.write_bytes(content)
    assert holding(store.root, SECOND)
    store.purge(())
    assert not holding(store.root, SECOND)


def test_the_list_of_forgotten_classes_is_made_again_from_the_versions(store: Store) -> None:
    edit(store, 4, Forget((SECOND,)))
    edit(store, 5, Forget((FIRST,), purge=True))
    purge(store, 6)
    before, found = store.forgotten(), states(store)
    (store._model / "forgotten.json").unlink()
    with pytest.raises(DamagedError, match=r"forgotten\.json"):
        store.load_model(1)
    again = Store.open(store.root)
    assert again.forgotten() == before
    assert states(again) == found


def test_forgetting_again_changes_nothing(store: Store) -> None:
    edit(store, 4, Forget((SECOND,), purge=True))
    content: list[dict[Path, bytes]] = []
    for _ in range(2):
        purge(store)
        store.forget(["second.0"])
        assert store.forgotten() == Forgotten(frozenset({"second.0"}), frozenset({"second.0"}))
        files = (path for path in store.root.rglob("*") if path.is_file())
        content.append({path: path.read_bytes() for path in files})
    assert content[0] == content[1]
