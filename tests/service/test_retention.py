"""What is kept of old versions, what is not, and that pinned ones are."""

from __future__ import annotations

import asyncio
import errno
import shutil
import threading
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from inflora.v1 import model_service_pb2 as pb
from inflora.v1 import predictor_service_pb2 as predictor_pb
from inflora.v1 import task_pb2
from inflora_core import audit
from inflora_core.audit import Event
from inflora_core.config import Retention
from inflora_core.errors import UnavailableError
from inflora_core.store import ONNX_FILE, Store
from inflora_service import artifacts
from inflora_service.doctor import Diagnosis, Severity, examine
from tests.service.conftest import BLUE, GREEN, RED, WHITE, Running, fails, png
from tests.service.test_versions import download, get, name_of

COLOURS = {"red": RED, "green": GREEN, "blue": BLUE, "white": WHITE, "brown": (120, 60, 20)}


async def teach(running: Running, *labels: str) -> None:
    for label in labels:
        task = await running.ended((await running.learn({label: [png(COLOURS[label])]})).name)
        assert task.state == task_pb2.TASK_STATE_PUBLISHED, task


async def pin(running: Running, number: int) -> pb.Version:
    return (await running.model.PinVersion(pb.PinVersionRequest(name=name_of(number)))).version


async def unpin(running: Running, number: int) -> pb.Version:
    request = pb.UnpinVersionRequest(name=name_of(number))
    return (await running.model.UnpinVersion(request)).version


async def promote(running: Running, number: int) -> None:
    await running.model.PromoteVersion(pb.PromoteVersionRequest(name=name_of(number)))


async def label_by(running: Running, number: int, colour: tuple[int, int, int]) -> str:
    request = predictor_pb.PredictRequest(images=[png(colour)], version=name_of(number))
    return (await running.predictor.Predict(request)).predictions[0].scores[0].label


async def retired(running: Running) -> list[int]:
    versions = (await running.model.ListVersions(pb.ListVersionsRequest())).versions
    return sorted(int(v.name.rpartition("/")[2]) for v in versions if v.retired)


def onnx_files(store: Store) -> list[int]:
    return [number for number in store.numbers() if store.has_onnx(number)]


async def test_old_versions_are_retired(start: Callable[..., Any]) -> None:
    running = await start(retention=Retention(versions=2))
    await teach(running, "red", "green")
    assert await label_by(running, 1, RED) == "red"  # loaded, it goes all the same
    await teach(running, "blue", "white")
    assert await retired(running) == [1, 2]

    first = await get(running, 1)
    assert [c.label for c in first.classes] == ["red"]
    assert [a.name for a in first.artifacts] == ["factors.safetensors"]
    folder = running.settings.store / "models/default/versions/00000001"
    assert {path.name for path in folder.iterdir()} == {
        *("RETIRED", "factors.safetensors", "manifest.json", "manifest.sha256")
    }
    with fails("FAILED_PRECONDITION", "WRONG_STATE", "version"):
        await label_by(running, 1, RED)
    for call in (promote, pin):
        with fails("FAILED_PRECONDITION", "WRONG_STATE", "name"):
            await call(running, 1)
    with fails("FAILED_PRECONDITION", "WRONG_STATE", "name"):
        await download(running, name=name_of(1))

    # What was made from it is sound, and can be built upon.
    assert running.store.load_model(4).version == 4
    lines = audit.verify(running.settings.store).lines
    assert [(line.who, line.version_to) for line in lines if line.event == Event.RETIRED] == [
        (audit.SERVER, 1),
        (audit.SERVER, 2),
    ]
    await running.server.stop()
    assert examine(running.settings.store) == Diagnosis(())


async def test_current_and_pinned_versions_stay(start: Callable[..., Any]) -> None:
    running = await start(retention=Retention(versions=1))
    await teach(running, "red")
    for _ in range(2):  # once more is no error
        assert (await pin(running, 1)).pinned
    await teach(running, "green")
    await promote(running, 1)
    await teach(running, "blue")
    assert await retired(running) == [2]
    assert await label_by(running, 1, RED) == "red"

    again = await restarted(running, start, retention=Retention(versions=1))
    assert (await get(again, 1)).pinned
    for _ in range(2):
        assert not (await unpin(again, 1)).pinned
    await teach(again, "white")
    assert await retired(again) == [1, 2]  # 3 was current before, and stands in for 4
    events = [line.event for line in audit.verify(again.settings.store).lines]
    assert events.count(Event.PINNED) == events.count(Event.UNPINNED) == 1
    for call in (pin, unpin):
        with fails("NOT_FOUND", "NOT_FOUND", "name"):
            await call(again, 9)


async def restarted(running: Running, start: Callable[..., Any], **changes: Any) -> Running:
    await running.server.stop()
    again: Running = await start(**changes)
    return again


async def test_a_retirement_that_broke_off_is_finished(start: Callable[..., Any]) -> None:
    running = await start()
    await teach(running, "red", "green")
    folder = running.settings.store / "models/default/versions/00000001"
    await pin(running, 2)
    await running.server.stop()
    (folder / "RETIRED").touch()
    (folder.with_name("00000002") / "PINNED").unlink()
    again = await start()
    assert not (folder / "head.safetensors").exists()
    assert (await get(again, 2)).pinned
    history = audit.verify(again.settings.store).history
    assert (history.retired, history.pinned) == ({1}, {2})


async def test_onnx_files_are_made_again(
    start: Callable[..., Any],
) -> None:
    running = await start(retention=Retention(onnx_files=2))
    await teach(running, "red")
    first = (await get(running, 1)).artifacts
    await teach(running, "green", "blue", "white")
    assert onnx_files(running.store) == [3, 4]
    assert await retired(running) == []
    assert (await get(running, 1)).artifacts == first

    messages = await download(running, name=name_of(1))
    assert messages[0].artifact in first
    assert await label_by(running, 2, GREEN) == "green"
    assert onnx_files(running.store) == [1, 3, 4]  # predicting brings none back

    await teach(running, "brown")
    assert onnx_files(running.store) == [4, 5]
    await promote(running, 2)
    assert await label_by(running, 2, GREEN) == "green"
    assert running.store.path(2, ONNX_FILE).exists()


async def test_a_file_that_is_let_go_while_it_is_sent(
    start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients ask again where they were, and it is made again."""
    running = await start()
    await teach(running, "red")
    path = running.store.path(1, ONNX_FILE)
    entry = running.store.version(1).file(ONNX_FILE)
    assert entry is not None
    monkeypatch.setattr(artifacts, "CHUNK_BYTES", 100)
    async with aclosing(artifacts.read_artifact(path, entry, 0)) as chunks:
        begun = await anext(chunks)
        running.store.drop_onnx(1)
        with pytest.raises(UnavailableError):
            await anext(chunks)
    rest = await download(running, name=name_of(1), offset=len(begun))
    assert begun + b"".join(message.data for message in rest) == path.read_bytes()


async def test_a_version_that_is_retired_while_it_is_loaded(
    start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = await start()
    await teach(running, "red", "green", "blue")
    host = running.server.host
    load, read, go_on = host._load, asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def slow_load(number: int) -> Any:
        loaded = load(number)
        if number == 1:
            loop.call_soon_threadsafe(read.set)
            assert go_on.wait(60)
        return loaded

    monkeypatch.setattr(host, "_load", slow_load)
    asking = asyncio.create_task(label_by(running, 1, RED))
    await read.wait()
    await host.retain(Retention(versions=1))
    assert await retired(running) == [1]
    go_on.set()
    with fails("FAILED_PRECONDITION", "WRONG_STATE", "version"):
        await asking
    with fails("FAILED_PRECONDITION", "WRONG_STATE", "name"):
        await promote(running, 1)
    assert running.store.current() == 3


async def test_what_was_restored_from_a_backup_stays(start: Callable[..., Any]) -> None:
    running = await start(retention=Retention(versions=1))
    await teach(running, "red")
    folder = running.settings.store / "models/default/versions/00000001"
    backup = shutil.copytree(folder, running.settings.store.parent / "backup")
    await teach(running, "green", "blue")
    assert await retired(running) == [1]
    await running.server.stop()
    shutil.rmtree(folder)
    shutil.copytree(backup, folder)
    (finding,) = examine(running.settings.store).found
    assert (finding.severity, finding.path) == (Severity.NOTE, "models/default/versions/00000001")
    again = await start()
    assert await label_by(again, 1, RED) == "red"


async def test_a_file_that_could_not_be_made_again_is_not_let_go(
    start: Callable[..., Any],
) -> None:
    running = await start(retention=Retention(onnx_files=0))
    await teach(running, "red", "green", "blue", "white")
    factors = running.store.path(1, "factors.safetensors")
    content = bytearray(factors.read_bytes())
    content[-1] ^= 1
    factors.write_bytes(content)
    again = await restarted(running, start, retention=Retention(onnx_files=1))
    assert onnx_files(again.store) == [1, 2, 3, 4]
    assert await label_by(again, 2, GREEN) == "green"


async def test_what_cannot_be_retired_now_is_later(
    start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = await start(retention=Retention(versions=1))
    await teach(running, "red", "green")
    folder = running.settings.store / "models/default/versions/00000001"
    unlink = Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path.name == "memory.safetensors":
            raise OSError(errno.EIO, "Input/output error")
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        await teach(running, "blue")
        assert (folder / "memory.safetensors").exists()
    await teach(running, "white")
    assert not (folder / "memory.safetensors").exists()
    assert audit.verify(running.settings.store).history.retired == {1, 2}


async def test_a_pinned_version_is_whole(start: Callable[..., Any]) -> None:
    running = await start(retention=Retention(onnx_files=1))
    await teach(running, "red", "green", "blue")
    assert 1 not in onnx_files(running.store)
    await pin(running, 1)
    await teach(running, "white")
    assert 1 in onnx_files(running.store)


async def test_whatever_goes_wrong_with_old_versions_tasks_go_on(
    start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = await start()

    async def fail(retention: Retention) -> None:
        raise MemoryError

    monkeypatch.setattr(running.server.host, "retain", fail)
    await teach(running, "red", "green")
    assert (await get(running, 2)).current


async def test_a_version_that_cannot_be_retired_yet_still_answers(
    start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even its mark can be written: it is as it was."""
    running = await start(retention=Retention(versions=1))
    await teach(running, "red", "green")

    def refuse(number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(running.server.host._store, "retire", refuse)
    await teach(running, "blue")
    assert await retired(running) == []
    assert await label_by(running, 1, RED) == "red"
