"""The doctor names what is damaged, repairs what can be, and leaves all else alone."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from inflora.v1 import learner_service_pb2 as learner_pb
from inflora.v1 import model_service_pb2 as model_pb
from inflora_core import audit, canary
from inflora_core.config import Retention
from inflora_core.errors import InfloraError, NotFoundError, StoreFormatError, UnavailableError
from inflora_core.model import ContinualModel, TaskState
from inflora_core.spool import ORIGIN, SpoolWriter, check_spool
from inflora_core.store import ONNX_FILE, Store
from inflora_service import store_lock
from inflora_service.doctor import Diagnosis, Severity, examine
from inflora_service.records import TaskRecords
from inflora_service.server import Server, Settings
from inflora_service.store_lock import StoreLock
from tests.core.test_store import assert_same
from tests.service.conftest import BLUE, GREEN, RED, ROOT, WHITE, WORKER, Running, Script, png
from tests.service.mean_colour import make_backbone

VERSIONS = "models/default/versions"
FORGOTTEN = "models/default/forgotten.json"
CURRENT = "models/default/CURRENT"


async def lead_a_life(folder: Path) -> Path:
    """Make a store with a branch, and a task that waits.

    Version 1 is retired, 2 pinned, 3 purged; 4 knows a forgotten class.
    """
    script = Script(folder / "script")
    chosen = Settings(
        store=folder / "store",
        port=0,
        predict_threads=1,
        worker=(sys.executable, str(WORKER), "--script", str(script.path)),
        retention=Retention(versions=4, onnx_files=3),
    )
    make_backbone(Store.open(chosen.store))
    async with await script.serve():
        server = Server(chosen)
        await server.start()
        async with grpc.aio.insecure_channel(server.address) as channel:
            running = Running(server, channel, chosen)
            for label, colour in (("red", RED), ("green", GREEN), ("secret", BLUE)):
                await running.ended((await running.learn({label: [png(colour)]})).name)
            second = "models/default/versions/2"
            await running.model.PromoteVersion(model_pb.PromoteVersionRequest(name=second))
            await running.model.PinVersion(model_pb.PinVersionRequest(name=second))
            await running.ended((await running.learn({"white": [png(WHITE)]})).name)
            for label, purge in (("secret", True), ("red", False)):
                request = learner_pb.ForgetClassesRequest(labels=[label], purge=purge)
                task = (await running.learner.ForgetClasses(request)).task
                await running.ended(task.name)
            script.hold("DECODING")
            await running.learn({"waits": [png()] * 2})
            await script.reached("DECODING")
        await server.stop()
    return chosen.store


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound store, which tests copy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *sys.path]))
        return asyncio.run(lead_a_life(tmp_path_factory.mktemp("doctor")))


@pytest.fixture
def store(template: Path, tmp_path: Path) -> Path:
    return shutil.copytree(template, tmp_path / "store")


def content(root: Path) -> dict[str, bytes]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def models(root: Path) -> dict[int, ContinualModel | None]:
    """Return what every version is, None where it cannot be loaded."""
    store = Store(root)
    found: dict[int, ContinualModel | None] = {}
    for number in store.numbers():
        try:
            found[number] = store.load_model(number)
        except InfloraError:
            found[number] = None
    return found


def is_named(diagnosis: Diagnosis, name: str) -> bool:
    """Whether a file, or the folder of a task's examples, is said to be at fault."""
    return any(
        name == each.path or name in each.problem or str(Path(name).parent) == each.path
        for each in diagnosis.found
        if each.severity is not Severity.NOTE
    )


def test_a_sound_store(store: Path) -> None:
    before = content(store)
    assert examine(store) == Diagnosis(())
    assert examine(store, repair=True) == examine(store, read_only=True) == Diagnosis(())
    assert content(store) == before


# -- the law ------------------------------------------------------------------------------------

KINDS = ("delete", "flip", "truncate")


def damage(path: Path, kind: str, position: int, mask: int) -> None:
    data = bytearray(path.read_bytes())
    if kind == "delete" or not data:
        path.unlink()
    elif kind == "truncate":
        path.write_bytes(data[: position % len(data)])
    else:
        data[position % len(data)] ^= mask
        path.write_bytes(data)


def is_harmless(root: Path, name: str, before: bytes) -> bool:
    """Whether a changed file says what it said: a blank is as good as another."""
    path = root / name
    if path.name == audit.FILE and path.exists():
        # What is cut off between lines does not show, unless a record says that it was there.
        kept = path.read_bytes()
        return before.startswith(kept) and kept.endswith(b"\n")
    if path.name == ONNX_FILE:
        # It is not kept of every version, and not needed of every one.
        return not path.exists() or Store(root).version(int(path.parent.name)).state != "WHOLE"
    if not path.exists():
        return False
    if path.name in ("FORMAT", "forgotten.json"):
        try:
            return bool(json.loads(path.read_bytes()) == json.loads(before))
        except ValueError:
            return False
    if path.name in ("CURRENT", "backbone"):
        return path.read_bytes().split() == before.split()
    if path.parts[-3] == "spool":
        try:
            return check_spool(path.parent).counts == (2,)
        except InfloraError:
            return False
    return False


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_random_damage(template: Path, data: st.DataObject) -> None:
    before, sound = content(template), models(template)
    # SQLite has no checksums: what is flipped in a record may well be another record.
    names = sorted(before.keys() - {"LOCK"})
    hits = data.draw(
        st.lists(
            st.tuples(
                st.sampled_from(names),
                st.sampled_from(KINDS),
                st.integers(0, 10**6),
                st.integers(1, 255),
            ).filter(lambda hit: (hit[0], hit[1]) != ("tasks.sqlite", "flip")),
            min_size=1,
            max_size=2,
            unique_by=lambda hit: hit[0],
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        root = Path(shutil.copytree(template, Path(folder) / "store"))
        for name, kind, position, mask in hits:
            damage(root / name, kind, position, mask)
        damaged = {hit[0] for hit in hits}
        try:
            found = examine(root)
        except StoreFormatError:
            assert "FORMAT" in damaged
            return
        for name in sorted(name for name in damaged if not is_named(found, name)):
            # Of a version whose manifest is damaged, nothing says what its files should be.
            behind = any(
                other != name and "manifest" in other and Path(other).parent == Path(name).parent
                for other in damaged
            )
            lost_list = FORGOTTEN in damaged  # which says what a version needs
            # Which versions are pinned or retired, only the log says besides the mark itself. Of a
            # retired one, the files that it lacks are named then.
            mark = audit.FILE in damaged and Path(name).name in ("PINNED", "RETIRED")
            if not behind and not mark and not (lost_list and name.endswith(ONNX_FILE)):
                assert is_harmless(root, name, before[name]), (name, found)

        repaired = examine(root, repair=True)
        after = content(root)
        again = examine(root, repair=True)
        assert (again.repaired, again.found) == ((), repaired.found)
        assert content(root) == after
        event("sound" if repaired.sound else "something is lost")
        changed = {name for name in before if after.get(name) != before[name]}
        assert changed <= damaged | {"audit.jsonl", FORGOTTEN, CURRENT}
        for number, model in models(root).items():
            if model is not None:
                expected = sound[number]
                assert expected is not None
                assert_same(model, expected)
        if repaired.sound:
            assert models(root).keys() == sound.keys()


# -- case by case -------------------------------------------------------------------------------


def spoil(path: Path) -> None:
    """Flip a bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


REPAIRED: dict[str, Callable[[Path], None]] = {
    "an onnx file is damaged": lambda root: spoil(root / VERSIONS / "00000006" / ONNX_FILE),
    "forgotten.json is lost": lambda root: (root / FORGOTTEN).unlink(),
    "forgotten.json is damaged": lambda root: spoil(root / FORGOTTEN),
    "CURRENT is lost": lambda root: (root / CURRENT).unlink(),
    "CURRENT is damaged": lambda root: void((root / CURRENT).write_text("six")),
    "CURRENT names no version": lambda root: void((root / CURRENT).write_text("7\n")),
    "the backbone's name is lost": lambda root: (root / "models/default/backbone").unlink(),
    "a draft": lambda root: (root / "drafts" / "0123").mkdir(),
    "a file in the drafts": lambda root: void((root / "drafts" / "x").write_bytes(b"half")),
    "half a file": lambda root: void((root / f".FORMAT.{'0' * 32}").write_bytes(b"{")),
    "a dangling spool": lambda root: (root / "spool" / "20260101-000000-00000000").mkdir(),
    "a pin is lost": lambda root: (root / VERSIONS / "00000002" / "PINNED").unlink(),
    "a retirement is lost": lambda root: (root / VERSIONS / "00000001" / "RETIRED").unlink(),
    "a retired version's file": lambda root: void(
        (root / VERSIONS / "00000001" / "head.safetensors").write_bytes(b"")
    ),
    "a torn log": lambda root: tear(root / audit.FILE),
    "forgotten.json and an onnx file": lambda root: (
        (root / FORGOTTEN).unlink(),
        spoil(root / VERSIONS / "00000006" / ONNX_FILE),
    )[0],
}


def test_what_a_store_has_of_retention(store: Path) -> None:
    states = [Store(store).version(number).state for number in range(1, 7)]
    assert states == ["RETIRED", "REDUCED", "PURGED", "REDUCED", "REDUCED", "WHOLE"]
    assert Store(store).marked() == ({2}, {1})


def test_an_onnx_file_that_is_not_there_is_no_fault(store: Path) -> None:
    """It is not kept of every version."""
    (store / VERSIONS / "00000006" / ONNX_FILE).unlink()
    assert examine(store) == Diagnosis(())


def test_an_upload_that_broke_off_is_no_fault(store: Path) -> None:
    """It can be continued, and the server knows for how long."""
    folder = store / "spool" / "20260101-000000-00000000"
    folder.mkdir()
    (folder / ORIGIN).write_text("{}")
    for repair in (False, True):
        (finding,) = (
            each for each in examine(store, repair=repair).found if "broke" in each.problem
        )
        assert (finding.severity, finding.path) == (Severity.NOTE, f"spool/{folder.name}")
    assert folder.exists()


def tear(path: Path) -> None:
    """Add the beginning of a line."""
    path.write_bytes(path.read_bytes() + b'{"seq": 9')


def void(_: object) -> None:
    pass


@pytest.mark.parametrize("harm", REPAIRED.values(), ids=REPAIRED)
def test_what_can_be_repaired(store: Path, harm: Callable[[Path], None]) -> None:
    before = content(store)
    harm(store)
    assert content(store) != before or examine(store).found
    found = examine(store)
    assert found.found
    repaired = examine(store, repair=True)
    assert repaired == Diagnosis(repaired.found, found.found)
    assert repaired.sound
    assert {each.severity for each in repaired.found} <= {Severity.NOTE}
    after = content(store)
    for name in ("audit.jsonl", "audit.torn-1"):
        before.pop(name, None)
        after.pop(name, None)
    assert after == before
    last = audit.verify(store).lines[-1]
    assert (last.event, last.who) == (audit.Event.REPAIRED, "doctor")


LEFT: dict[str, tuple[str, Callable[[Path], None]]] = {
    "a head": (
        f"{VERSIONS}/00000006/head.safetensors",
        lambda root: spoil(root / VERSIONS / "00000006" / "head.safetensors"),
    ),
    "a version": (f"{VERSIONS}/00000003", lambda root: shutil.rmtree(root / VERSIONS / "00000003")),
    "records": ("tasks.sqlite", lambda root: void((root / "tasks.sqlite").write_bytes(b""))),
    "no records": ("tasks.sqlite", lambda root: (root / "tasks.sqlite").unlink()),
    "the log": (
        "audit.jsonl",
        lambda root: void(
            (root / audit.FILE).write_bytes(
                (root / audit.FILE).read_bytes().replace(b"ipv4:127", b"ipv4:128", 1)
            )
        ),
    ),
    "no log and no records": (
        "audit.jsonl",
        lambda root: ((root / audit.FILE).unlink(), (root / "tasks.sqlite").unlink())[0],
    ),
    "the format": ("FORMAT", lambda root: (root / "FORMAT").unlink()),
    "the backbone": ("template.onnx", lambda root: spoil(next(root.glob("backbones/*/*.onnx")))),
}


@pytest.mark.parametrize(("path", "harm"), LEFT.values(), ids=LEFT)
def test_what_is_left(store: Path, path: str, harm: Callable[[Path], None]) -> None:
    harm(store)
    before = content(store)
    diagnosis = examine(store, repair=True)
    assert not diagnosis.sound
    damage = [each for each in diagnosis.found if each.severity is Severity.DAMAGE]
    assert any(each.path.endswith(path) for each in damage)
    assert all(each.problem and each.remedy for each in damage)
    assert content(store) == before


def test_examples_are_no_orphans_where_records_are_lost(store: Path) -> None:
    (spool,) = (store / "spool").iterdir()
    for harm in (
        lambda: (store / "tasks.sqlite").write_bytes(b""),
        (store / "tasks.sqlite").unlink,
    ):
        harm()
        assert not examine(store, repair=True).sound
        assert check_spool(spool).counts == (2,)


def test_examples_that_are_damaged_are_named_where_records_are_lost(store: Path) -> None:
    (spool,) = (store / "spool").iterdir()
    (store / "tasks.sqlite").unlink()
    assert not is_named(examine(store), f"spool/{spool.name}/examples.jsonl")
    (spool / "examples.jsonl").unlink()
    assert is_named(examine(store), f"spool/{spool.name}/examples.jsonl")
    assert spool.is_dir()


def test_damaged_examples_are_named(store: Path) -> None:
    (spool,) = (store / "spool").iterdir()
    spoil(spool / "images.bin")
    (found,) = examine(store, repair=True).found
    assert (found.severity, found.path) == (Severity.DAMAGE, f"spool/{spool.name}")


def test_other_examples_than_the_task_s(store: Path, tmp_path: Path) -> None:
    (spool,) = (store / "spool").iterdir()
    with SpoolWriter(tmp_path / "other") as writer:
        writer.add(png(), "another label")
        writer.finish()
    shutil.rmtree(spool)
    shutil.copytree(tmp_path / "other", spool)
    (found,) = examine(store).found
    assert "not those of its task" in found.problem


def test_two_versions_of_one_task(store: Path) -> None:
    shutil.copytree(store / VERSIONS / "00000004", store / VERSIONS / "00000007")
    manifest = store / VERSIONS / "00000007" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"number": 4', b'"number": 7', 1))
    digest = hashlib.sha256(manifest.read_bytes()).hexdigest()
    (manifest.with_name("manifest.sha256")).write_text(f"{digest}  manifest.json\n")
    damage = [each for each in examine(store).found if each.severity is Severity.DAMAGE]
    assert any("versions 4, 7 are all of task" in each.problem for each in damage)


def test_a_version_of_a_task_that_failed(store: Path) -> None:
    records = TaskRecords(store)
    (name,) = (v.task for v in Store(store).manifests() if v.number == 4)
    snapshot = records.get(name)
    failed = replace(snapshot.task, state=TaskState.FAILED, version=None)
    records.update(replace(snapshot, task=failed))
    records.close()
    (finding,) = (each for each in examine(store).found if "is FAILED" in each.problem)
    assert (finding.severity, finding.path) == (Severity.WARNING, f"{VERSIONS}/00000004")


def test_canary_images(store: Path) -> None:
    version = Store(store).version(6)
    known, forgotten = version.classes[0].key, next(iter(Store(store).forgotten().keys))
    for key in (known, forgotten, ".draft.x"):
        canary.keep(store, key, [png()])
    found = {each.path: each for each in examine(store).found}
    assert found.keys() == {f"canary/{forgotten}", "canary/.draft.x"}
    assert not examine(store, repair=True).found
    assert canary.keys(store) == {known}
    spoil(store / "canary" / known / "0000")
    (finding,) = examine(store, repair=True).found
    assert (finding.severity, finding.path) == (Severity.WARNING, f"canary/{known}")


def test_kept_examples(store: Path) -> None:
    """Those of a task are no fault, nobody's are, and so are damaged ones."""
    (name,) = (v.task for v in Store(store).manifests() if v.number == 4)
    for folder in (name, "20260101-000000-00000000"):
        with SpoolWriter(store / "examples" / folder) as writer:
            writer.add(png(), "white")
            writer.finish()
    (finding,) = examine(store, repair=True).found
    assert finding.path == "examples/20260101-000000-00000000"
    shutil.rmtree(store / finding.path)
    assert examine(store) == Diagnosis(())
    spoil(store / "examples" / name / "images.bin")
    (finding,) = examine(store, repair=True).found
    assert (finding.severity, finding.path) == (Severity.WARNING, f"examples/{name}")


def test_a_list_is_made_again_where_a_manifest_is_damaged_too(store: Path) -> None:
    """The log still knows what the version with the damaged manifest forgot."""
    before = Store(store).forgotten()
    (store / FORGOTTEN).unlink()
    for number in (5, 6):
        spoil(store / VERSIONS / f"{number:08d}" / "manifest.json")
    diagnosis = examine(store, repair=True)
    assert FORGOTTEN not in {each.path for each in diagnosis.found}
    assert Store(store).forgotten() == before


def test_current_goes_to_the_newest_version_that_was_current_and_is_sound(store: Path) -> None:
    (store / CURRENT).unlink()
    for number in (5, 6):
        spoil(store / VERSIONS / f"{number:08d}" / "head.safetensors")
    examine(store, repair=True)
    assert Store(store).current() == 4
    line = audit.verify(store).lines[-2]
    assert (line.event, line.version_to, line.who) == (audit.Event.PROMOTED, 4, "doctor")


def test_a_damaged_current_version_stays_current(store: Path) -> None:
    spoil(store / VERSIONS / "00000006" / "head.safetensors")
    assert not examine(store, repair=True).sound
    assert Store(store).current() == 6


def test_an_unfinished_purge_is_finished(store: Path) -> None:
    leftover = store / VERSIONS / "00000003" / "head.safetensors"
    assert not leftover.exists(), "version 3 is purged"
    leftover.write_bytes(b"what a purge was about to delete")
    assert [each.severity for each in examine(store).found] == [Severity.WARNING]
    assert examine(store, repair=True).found == ()
    assert not leftover.exists()


# -- the command --------------------------------------------------------------------------------


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "inflora_client", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_command(store: Path, tmp_path: Path) -> None:
    ended = run("doctor", store)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, f"{store} is sound\n", "")
    (store / CURRENT).unlink()
    spoil(store / VERSIONS / "00000002" / "head.safetensors")
    for arguments in (("doctor", store, "--json"), ("--json", "doctor", store)):
        ended = run(*arguments)
        told = json.loads(ended.stdout)
        assert (ended.returncode, told["sound"], told["repaired"]) == (1, False, [])
        assert {each["path"] for each in told["found"]} == {
            *(CURRENT, f"{VERSIONS}/00000002/head.safetensors"),
        }
    ended = run("doctor", store, "--repair")
    assert ended.returncode == 1
    assert f"repaired: {CURRENT}" in ended.stdout
    assert "damage: models/default/versions/00000002/head.safetensors" in ended.stdout
    for wrong in (("doctor", tmp_path), ("doctor", store, "--repair", "--read-only")):
        ended = run(*wrong)
        assert (ended.returncode, ended.stdout) == (2, "")
        assert ended.stderr


def test_what_cannot_be_looked_at(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NotFoundError):
        examine(tmp_path)
    (store / "FORMAT").write_text('{"format": 99}')
    with pytest.raises(StoreFormatError):
        examine(store)


async def test_a_store_in_use_is_only_looked_at(
    running: Running, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_lock, "PATIENCE_SECONDS", 0.0)
    await running.ended((await running.learn({"a": [png()]})).name)
    script.hold("DECODING")
    await running.learn({"b": [png()]})
    await script.reached("DECODING")
    store = running.settings.store
    with pytest.raises(UnavailableError, match="another server"):
        await asyncio.to_thread(examine, store)
    before = content(store)
    assert (await asyncio.to_thread(lambda: examine(store, read_only=True))).sound
    after = content(store)
    for name in ("tasks.sqlite-shm",):  # which readers share with the writer
        before.pop(name), after.pop(name)
    assert after == before


def test_a_lock_that_is_held_is_let_go(store: Path) -> None:
    examine(store)
    StoreLock(store).release()


@pytest.mark.parametrize("name", ["../../..", "/etc", "a\0b", ""])
def test_a_backbone_s_name_leads_nowhere_else(store: Path, name: str) -> None:
    pointer = store / "models/default/backbone"
    before = pointer.read_bytes()
    pointer.write_text(name)
    for path in (store / VERSIONS).glob("*/manifest.json"):
        path.unlink()  # which say the right name
    assert not examine(store).sound
    pointer.write_bytes(before)


def test_a_lock_that_is_no_file(store: Path) -> None:
    (store / "LOCK").unlink()
    (store / "LOCK").mkdir()
    with pytest.raises(UnavailableError, match="LOCK"):
        examine(store)
    assert examine(store, read_only=True).sound


def test_a_name_that_is_no_text(store: Path) -> None:
    os.mkdir(os.fsencode(store / "drafts") + b"/\xff")
    command = [sys.executable, "-m", "inflora_service.doctor", str(store), "--repair"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "drafts/\\udcff" in ended.stdout


def test_a_draft_that_leads_elsewhere(store: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (store / "drafts" / "link").symlink_to(tmp_path / "elsewhere")
    assert examine(store, repair=True).found == ()
    assert (tmp_path / "elsewhere").is_dir()
