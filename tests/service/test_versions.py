"""Listing, promoting and downloading versions."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from inflora.v1 import model_service_pb2 as pb
from inflora.v1 import predictor_service_pb2 as predictor_pb
from inflora.v1 import task_pb2
from inflora_core.errors import DamagedError
from inflora_core.model import FileEntry
from inflora_core.store import Store
from inflora_edge.delta import Delta
from inflora_service import artifacts
from inflora_service.server import Settings
from tests.service.conftest import BLUE, GREEN, RED, Running, fails, png
from tests.service.test_bad_input import download, publish


def name_of(number: int | str) -> str:
    return f"models/default/versions/{number}"


@pytest.fixture
async def running(start: Callable[..., Any], settings: Settings) -> Running:
    """A server with three versions."""
    for classes in ({"red": RED}, {"green": GREEN}, {"blue": BLUE}):
        publish(settings.store, **classes)
    running: Running = await start()
    return running


async def get(running: Running, number: int | str) -> pb.Version:
    request = pb.GetVersionRequest(name=name_of(number))
    return (await running.model.GetVersion(request)).version


async def test_a_version_says_what_it_is(running: Running) -> None:
    version = await get(running, 2)
    assert version.name == name_of(2)
    assert version.parent == name_of(1)
    assert version.task == "models/default/tasks/task-2"
    assert version.create_time.ToSeconds()
    assert [(c.label, c.task) for c in version.classes] == [
        ("red", "models/default/tasks/task-1"),
        ("green", "models/default/tasks/task-2"),
    ]
    assert not version.current
    assert not version.provider
    assert "model.onnx" in {artifact.name for artifact in version.artifacts}
    current = await get(running, "current")
    assert current == await get(running, 3)
    assert current.current
    assert current.provider == "CPUExecutionProvider"
    assert not (await get(running, 1)).parent


async def test_pages_of_versions(running: Running) -> None:
    first = await running.model.ListVersions(pb.ListVersionsRequest(page_size=2))
    assert [version.name for version in first.versions] == [name_of(3), name_of(2)]
    publish(running.settings.store, white=(255, 255, 255))  # a page goes on where it was
    second = await running.model.ListVersions(
        pb.ListVersionsRequest(page_size=2, page_token=first.next_page_token)
    )
    assert [version.name for version in second.versions] == [name_of(1)]
    assert not second.next_page_token
    everything = await running.model.ListVersions(pb.ListVersionsRequest())
    assert len(everything.versions) == 4


async def test_rolling_back_and_learning_on(running: Running) -> None:
    request = predictor_pb.PredictRequest(images=[png(BLUE)])
    assert (await running.predictor.Predict(request)).predictions[0].scores[0].label == "blue"

    promote = pb.PromoteVersionRequest(name=name_of(1))
    for _ in range(2):  # once more is no error
        version = (await running.model.PromoteVersion(promote)).version
        assert version.current
        assert version.provider
        assert running.store.current() == 1
    assert not (await get(running, 3)).current
    answer = await running.predictor.Predict(request)
    assert (answer.version, answer.predictions[0].scores[0].label) == (name_of(1), "red")

    task = await running.ended((await running.learn({"blue": [png(BLUE)]})).name)
    assert task.state == task_pb2.TASK_STATE_PUBLISHED
    assert (await get(running, 4)).parent == name_of(1)
    assert [c.label for c in (await get(running, 4)).classes] == ["red", "blue"]


async def test_what_is_promoted_is_current_after_a_restart(
    running: Running, start: Callable[..., Any]
) -> None:
    await running.model.PromoteVersion(pb.PromoteVersionRequest(name=name_of(2)))
    await running.server.stop()
    again = await start()
    assert (await get(again, "current")).name == name_of(2)


@pytest.mark.parametrize("artifact", ["", "model.onnx", "head.safetensors"])
async def test_a_download(running: Running, artifact: str) -> None:
    messages = await download(running, name=name_of("current"), artifact=artifact)
    content = b"".join(message.data for message in messages)
    info = messages[0].artifact
    assert info.name == (artifact or "model.onnx")
    assert info.size == len(content)
    assert info.sha256 == hashlib.sha256(content).hexdigest()
    assert messages[0].version == name_of(3)
    assert info in (await get(running, 3)).artifacts


def sha256_of(messages: list[pb.DownloadArtifactResponse]) -> str:
    return hashlib.sha256(b"".join(message.data for message in messages)).hexdigest()


async def test_a_delta(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "CHUNK_BYTES", 100)
    whole = {n: await download(running, name=name_of(n)) for n in (1, 3)}
    asked = {"name": name_of("current"), "artifact": "model.delta", "held": [sha256_of(whole[1])]}
    messages = await download(running, **asked)
    content = b"".join(message.data for message in messages)
    info = messages[0].artifact
    assert (info.name, info.size) == ("model.delta", len(content))
    assert info.sha256 == hashlib.sha256(content).hexdigest()
    assert messages[0].version == name_of(3)
    base = b"".join(message.data for message in whole[1])
    made = b"".join(Delta.read(content).applied(base))
    assert hashlib.sha256(made).hexdigest() == sha256_of(whole[3])
    for offset in (1, len(content) - 1, len(content)):
        rest = await download(running, **asked, offset=offset)
        assert rest[0].artifact == info
        assert b"".join(message.data for message in rest) == content[offset:]
    with fails("OUT_OF_RANGE", "OUT_OF_RANGE", field="offset"):
        await download(running, **asked, offset=len(content) + 1)


async def test_a_download_that_broke_off_goes_on(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifacts, "CHUNK_BYTES", 100)
    whole = await download(running, name=name_of(3))
    content = b"".join(message.data for message in whole)
    assert len(whole) == -(-len(content) // 100)
    assert not any(message.HasField("artifact") or message.version for message in whole[1:])
    assert [message.offset for message in whole] == list(range(0, len(content), 100))

    call = running.model.DownloadArtifact(pb.DownloadArtifactRequest(name=name_of(3)))
    half = (await call.read()).data + (await call.read()).data
    call.cancel()
    for offset in (len(half), 0, 1, len(content) - 1, len(content)):
        rest = await download(running, name=name_of(3), offset=offset)
        assert rest[0].offset == offset
        assert rest[0].artifact == whole[0].artifact
        assert b"".join(message.data for message in rest) == content[offset:]


async def test_a_damaged_manifest_hides_no_other_version(running: Running) -> None:
    manifest = running.settings.store / "models/default/versions/00000002/manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-1])
    listed, token = [], ""
    for _ in range(2):
        page = await running.model.ListVersions(
            pb.ListVersionsRequest(page_size=1, page_token=token)
        )
        listed += [version.name for version in page.versions]
        token = page.next_page_token
    assert (listed, token) == ([name_of(3), name_of(1)], "")
    with fails("DATA_LOSS", "DAMAGED"):
        await get(running, 2)


@pytest.mark.parametrize("offset", [0, 7])
async def test_a_damaged_onnx_file_is_made_again_to_be_handed_out(
    running: Running, offset: int
) -> None:
    path = Store.open(running.settings.store).path(2, "model.onnx")
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"x")
    messages = await download(running, name=name_of(2), offset=offset)
    assert b"".join(message.data for message in messages) == content[offset:]
    assert path.read_bytes() == content


@pytest.mark.parametrize(("offset", "sent"), [(0, b"01234567"), (5, b"5678")])
async def test_a_file_that_is_damaged_while_it_is_read_is_not_sent_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offset: int, sent: bytes
) -> None:
    monkeypatch.setattr(artifacts, "CHUNK_BYTES", 4)
    content, path, received = b"0123456789", tmp_path / "file", b""
    path.write_bytes(content)
    entry = FileEntry("file", len(content), hashlib.sha256(content).hexdigest())
    chunks = artifacts.read_artifact(path, entry, offset)
    while len(received) < len(sent):
        received += await anext(chunks)
        path.write_bytes(content[:-1] + b"x")
    with pytest.raises(DamagedError):
        await anext(chunks)
    assert received == sent


async def test_a_damaged_file_is_not_handed_out(running: Running) -> None:
    path = Store.open(running.settings.store).path(2, "head.safetensors")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with fails("DATA_LOSS", "DAMAGED"):
        await download(running, name=name_of(2), artifact=path.name)
    with fails("DATA_LOSS", "DAMAGED"):
        await running.model.PromoteVersion(pb.PromoteVersionRequest(name=name_of(2)))
    path.unlink()
    with fails("DATA_LOSS", "DAMAGED"):
        await download(running, name=name_of(2), artifact=path.name)
    assert (await get(running, "current")).name == name_of(3)
    assert await download(running, name=name_of(1))
