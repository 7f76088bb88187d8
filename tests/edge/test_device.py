"""A device has a model that works at every moment, and comes to the current version."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from inflora_client import Client
from inflora_core import graph
from inflora_core.store import Store
from inflora_edge import Device, EdgeError, Model, ModelError, NoModelError, Server, ServerError
from inflora_edge.__main__ import main
from tests.core import tiny
from tests.edge.scripted_server import ScriptedServer
from tests.running_server import RunningServer

EXAMPLES = Path(__file__).parents[2] / "clients" / "examples"
COLOURS = ("red", "green", "blue", "white", "yellow", "cyan")


@pytest.fixture
def device(server: RunningServer, tmp_path: Path) -> Iterator[Device]:
    device = Device(Server(server.address), tmp_path / "device")
    yield device
    device.close()


def models_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.onnx"))


def test_it_follows_wherever_the_server_goes(
    client: Client, device: Device, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client.promote(1)
    with pytest.raises(NoModelError):
        _ = device.model
    assert device.update()
    assert not device.update()
    caplog.set_level(logging.INFO, "inflora_edge")
    caplog.clear()
    for number in (2, 3, 2, 4, 1, 3):  # on, back, to another branch, two back, two on
        client.promote(number)
        assert device.update()
        assert device.model.version == number
        assert len(models_in(tmp_path / "device")) == 2
        assert not device.update()
    assert "whole file" not in caplog.text, "each of them came as a delta"


def test_what_pages_read_of_its_folder(client: Client, device: Device, tmp_path: Path) -> None:
    """``state.json`` is an interface: clients/web/src/follower.ts reads it."""
    client.promote(3)
    device.update()
    active = json.loads((tmp_path / "device" / "state.json").read_bytes())["active"]
    content = (tmp_path / "device" / f"3-{active['sha256']}.onnx").read_bytes()
    assert active == {"version": 3, "sha256": hashlib.sha256(content).hexdigest()}


def test_it_answers_as_the_server_does(client: Client, device: Device) -> None:
    client.promote(4)
    device.update()
    images = [tiny.png(colour, number) for colour in COLOURS for number in range(20, 25)]
    answers = client.predict(images, top_k=4).predictions
    for image, answer in zip(images, answers, strict=True):
        found = device.model.predict(image)
        assert found.label == answer.scores[0].label
        assert found.probabilities[0] == pytest.approx(answer.scores[0].probability, abs=1e-3)
        assert found.novelty == pytest.approx(answer.novelty, abs=0.02)
        assert sum(found.probabilities) == pytest.approx(1, abs=1e-5)


def test_the_next_process_goes_on(server: RunningServer, client: Client, tmp_path: Path) -> None:
    client.promote(2)
    device = Device(Server(server.address), tmp_path)
    device.update()
    with pytest.raises(EdgeError, match="another process uses"):
        Device(Server(server.address), tmp_path)
    device.close()
    # Without the server.
    again = Device(Server("127.0.0.1:1", timeout=1), tmp_path)
    assert again.model.version == 2
    with pytest.raises(ServerError, match="UNAVAILABLE"):
        again.update()
    assert again.model.version == 2
    again.close()


def test_damage_on_the_disk_is_noticed_and_mended(
    server: RunningServer, client: Client, tmp_path: Path
) -> None:
    def reopened() -> Device:
        return Device(Server(server.address), tmp_path)

    for number in (1, 2):
        client.promote(number)
        device = reopened()
        device.update()
        device.close()
    (active,) = (path for path in tmp_path.glob("2-*.onnx"))
    flip(active)
    device = reopened()
    assert device.model.version == 1, "what answered before"
    assert device.update()
    assert device.model.version == 2
    device.close()
    flip(tmp_path / "state.json")
    device = reopened()
    assert device.model.version == 2
    assert not device.update()
    device.close()
    for path in tmp_path.glob("*.onnx"):
        flip(path)
    (tmp_path / f".2-{'0' * 64}.onnx.77").write_bytes(b"left by a kill")
    device = reopened()
    assert models_in(tmp_path) == []
    with pytest.raises(NoModelError):
        _ = device.model
    assert device.update()
    assert device.model.version == 2
    device.close()


def test_a_foreign_file_takes_the_whole_one(
    server: RunningServer, client: Client, tmp_path: Path, store: Store
) -> None:
    client.promote(2)
    content = store.onnx(1) + b"\x1a\x00"  # of another producer, but a model all the same
    with scripted({"model.onnx": content}, 1) as address:
        device = Device(Server(address), tmp_path)
        assert device.update()
        device.close()
    device = Device(Server(server.address), tmp_path)
    assert device.model.version == 1
    assert device.update()
    assert device.model.version == 2
    device.close()


def scripted(files: dict[str, bytes], version: int) -> Any:
    return ScriptedServer(files, version).running()


class TestOverABadLine:
    """With a server that follows a script."""

    @pytest.fixture
    def server(self, store: Store) -> ScriptedServer:  # type: ignore[override]
        return ScriptedServer({"model.onnx": store.onnx(1)}, 1)

    @pytest.fixture
    def device(self, server: ScriptedServer, tmp_path: Path) -> Iterator[Device]:
        with server.running() as address:
            device = Device(Server(address, timeout=5), tmp_path)
            yield device
            device.close()

    def test_it_goes_on_where_it_was_cut(self, server: ScriptedServer, device: Device) -> None:
        def cut(sent: int, message: Any) -> None:
            if sent >= 20_000:
                raise ConnectionError

        server.spoil = cut
        attempts, codes = 1, set()
        while True:
            try:
                assert device.update()
                break
            except ServerError as error:
                codes.add(error.code)
                attempts += 1
        assert codes == {"UNAVAILABLE"}
        offsets = [request.offset for request in server.requests]
        assert attempts > 2
        assert offsets == sorted(offsets)
        assert len(set(offsets)) == attempts, "each went on"
        assert server.requests[-1].name.endswith("versions/1"), "of the version that was begun with"
        assert device.model.version == 1

    def test_damage_on_the_way_is_noticed(self, server: ScriptedServer, device: Device) -> None:
        def spoil(sent: int, message: Any) -> None:
            if 8000 < sent < 13_000:
                message.data = bytes(len(message.data))

        server.spoil = spoil
        with pytest.raises(ServerError, match="DATA_LOSS"):
            device.update()
        server.spoil = lambda sent, message: None
        assert device.update()
        assert server.requests[-1].offset == 0

    def test_another_file_after_a_cut_begins_anew(
        self, server: ScriptedServer, device: Device, store: Store
    ) -> None:
        def cut(sent: int, message: Any) -> None:
            if sent >= 20_000:
                raise ConnectionError

        server.spoil = cut
        with pytest.raises(ServerError, match="UNAVAILABLE"):
            device.update()
        server.spoil = lambda sent, message: None
        server.files, server.version = {"model.onnx": store.onnx(2)}, 2
        assert device.update()
        assert device.model.version == 2

    def test_a_dead_line_is_given_up(self, server: ScriptedServer, tmp_path: Path) -> None:
        waiting, over = threading.Event(), threading.Event()

        def hang(sent: int, message: Any) -> None:
            if sent:
                waiting.set()
                over.wait(30)

        server.spoil = hang
        with server.running() as address:
            device = Device(Server(address, timeout=2), tmp_path / "other")
            with pytest.raises(ServerError, match="CANCELLED"):
                device.update()
            assert waiting.is_set()
            over.set()
            device.close()

    def test_what_makes_no_sense_is_refused_and_not_tried_again(
        self, server: ScriptedServer, device: Device, store: Store
    ) -> None:
        assert device.update()
        model = store.load_model(2)
        sick = dataclasses.replace(model, head_weight=np.full_like(model.head_weight, np.nan))
        template = store.backbone().template_path.read_bytes()
        server.files = {"model.onnx": graph.materialise(template, sick, 2)}
        server.version = 2
        for _ in range(3):
            with pytest.raises(ModelError, match="makes no sense"):
                device.update()
        sent = len(server.requests)
        assert not device.update(), "failed its test before"
        assert len(server.requests) == sent + 2
        assert device.model.version == 1
        server.files, server.version = {"model.onnx": store.onnx(2)}, 2
        assert device.update()
        assert device.model.version == 2

    def test_a_file_of_another_version_is_refused(
        self, server: ScriptedServer, device: Device
    ) -> None:
        server.version = 7
        with pytest.raises(ModelError, match="says that it is version 1"):
            device.update()

    def test_it_follows_until_told_to_stop(
        self, server: ScriptedServer, device: Device, store: Store
    ) -> None:
        stop, seen = threading.Event(), []

        def note(model: Model) -> None:
            seen.append(model.version)
            if len(seen) == 1:
                server.files, server.version = {"model.onnx": b"nonsense"}, 2
            else:
                stop.set()

        def mend(sent: int, message: Any) -> None:
            if server.version == 2:  # the nonsense was sent
                server.files, server.version = {"model.onnx": store.onnx(3)}, 3

        server.spoil = mend
        device.follow(0.01, note, stop)
        assert seen == [1, 3]


def take(client: Client, device: Device, *versions: int) -> None:
    for number in versions:
        client.promote(number)
        device.update()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_whole_file_survives_cuts_of_a_device_that_has_a_model(
    store: Store, tmp_path: Path
) -> None:
    server = ScriptedServer({"model.onnx": store.onnx(1)}, 1)
    with server.running() as address, Device(Server(address), tmp_path) as device:
        assert device.update()
        server.files, server.version = {"model.onnx": store.onnx(2)}, 2

        def cut(sent: int, message: Any) -> None:
            if sent >= 20_000:
                raise ConnectionError

        server.spoil = cut
        with pytest.raises(ServerError, match="UNAVAILABLE"):
            device.update()
        server.spoil = lambda sent, message: None
        assert device.update()
        assert server.requests[-1].artifact == "model.onnx"
        assert server.requests[-1].offset > 10_000


def test_nothing_is_let_go_before_the_next_one_works(
    server: RunningServer, client: Client, tmp_path: Path
) -> None:
    """What the next model is made from is damaged, and the line is dead then."""
    with Device(Server(server.address), tmp_path) as device:
        take(client, device, 1, 2)
        (active,) = tmp_path.glob("2-*.onnx")
        client.promote(3)
        flip(active)
        assert device.update(), "from the one before"
        assert device.model.version == 3
    with Device(Server("127.0.0.1:1"), tmp_path) as device:
        assert device.model.version == 3


def test_what_is_held_is_looked_at_before_it_answers_again(
    server: RunningServer, client: Client, tmp_path: Path
) -> None:
    with Device(Server(server.address), tmp_path) as device:
        take(client, device, 1, 2)
        (previous,) = tmp_path.glob("1-*.onnx")
        whole = previous.read_bytes()
        flip(previous)
        client.promote(1)
        assert device.update()
        assert device.model.version == 1
        assert previous.read_bytes() == whole


def test_files_of_others_are_left_alone(server: RunningServer, tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    for name in (".bashrc", "model.onnx", "1-abc.onnx", ".state.json.old"):
        (tmp_path / name).write_bytes(b"mine")
    with Device(Server(server.address), tmp_path) as device:
        device.update()
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {".git", ".bashrc", "model.onnx", "1-abc.onnx", ".state.json.old"}


@pytest.mark.parametrize("count", [1, 3])
def test_a_test_that_ended_the_process_counts(store: Store, tmp_path: Path, count: int) -> None:
    """As it is left by a kill in between: the file is there, and its test was begun."""
    content = store.onnx(1)
    sha256 = hashlib.sha256(content).hexdigest()
    (tmp_path / f"1-{sha256}.onnx").write_bytes(content)
    state = {"active": None, "previous": None, "tried": {sha256: count}}
    (tmp_path / "state.json").write_text(json.dumps(state))
    server = ScriptedServer({"model.onnx": content}, 1)
    with server.running() as address, Device(Server(address), tmp_path) as device:
        assert not device.has_model
        assert device.update() == (count < 3)
        assert device.has_model == (count < 3)


@pytest.mark.parametrize("version", ["current", "models/default/versions/0", "x/1e3", ""])
def test_a_server_that_announces_nonsense_is_refused(
    store: Store, tmp_path: Path, version: str
) -> None:
    server = ScriptedServer({"model.onnx": store.onnx(1)}, 1)

    def spoil(sent: int, message: Any) -> None:
        message.version = version

    server.spoil = spoil
    with (
        server.running() as address,
        Device(Server(address), tmp_path) as device,
        pytest.raises(ServerError, match="DATA_LOSS"),
    ):
        device.update()


def test_more_than_was_announced_is_refused(store: Store, tmp_path: Path) -> None:
    server = ScriptedServer({"model.onnx": store.onnx(1)}, 1)

    def spoil(sent: int, message: Any) -> None:
        if message.HasField("artifact"):
            message.artifact.size = 5000

    server.spoil = spoil
    with (
        server.running() as address,
        Device(Server(address), tmp_path) as device,
        pytest.raises(ServerError, match="more than it announced"),
    ):
        device.update()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 1000


def test_images_of_all_kinds(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(store.onnx(4))
    model = Model(path, threads=1)
    pixels = tiny.pattern("red", 3)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    (tmp_path / "x.png").write_bytes(file.getvalue())
    expected = model.predict(pixels)
    for same in (file.getvalue(), tmp_path / "x.png", Image.fromarray(pixels)):
        assert model.predict(same) == expected
    model.predict(Image.new("RGBA", (9, 7)))
    model.predict(Image.new("L", (9, 7)))
    for bad in (b"", b"nonsense", tmp_path / "none.png", pixels[0], pixels.astype(np.float32)):
        with pytest.raises(EdgeError, match=r"cannot be read|is no \(h, w, 3\) uint8"):
            model.predict(bad)
    with pytest.raises(ModelError, match="is no model"):
        Model(tmp_path / "x.png")


def test_the_command_line(
    server: RunningServer, client: Client, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client.promote(4)
    image, folder = tmp_path / "red.png", tmp_path / "device"
    image.write_bytes(tiny.png("red", 30))
    once = ["follow", server.address, "--folder", str(folder), "--once"]
    assert main(once) == 0
    assert capsys.readouterr().out == "version 4: 5 classes\n"
    assert main(once) == 2
    capsys.readouterr()
    assert main(["predict", str(folder), str(image), str(folder), "--json", "--top", "2"]) == 1
    out, err = capsys.readouterr()
    said = json.loads(out)
    assert (said["version"], said["scores"][0]["label"]) == (4, "red")
    assert len(said["scores"]) == 2
    assert f"{folder}: the image cannot be read" in err
    assert main(["predict", str(tmp_path), str(image)]) == 1
    assert "no model was fetched" in capsys.readouterr().err


def test_a_token_is_not_sent_in_the_clear(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="in the clear: give a ca"):
        Server("learner:1", token="secret").channel()
    Server("127.0.0.1:1", token="secret").channel().close()
    with pytest.raises(OSError, match=r"none\.pem"):
        Server("learner:1", token="secret", ca=tmp_path / "none.pem").channel()


def test_the_camera_example(server: RunningServer, client: Client, tmp_path: Path) -> None:
    client.promote(4)
    camera = tmp_path / "camera"
    camera.mkdir()
    (camera / "1.png").write_bytes(tiny.png("red", 50))
    (camera / "2.png").write_bytes(b"not an image")
    command = [sys.executable, str(EXAMPLES / "camera.py"), server.address]
    with subprocess.Popen(
        [*command, str(tmp_path / "device"), str(camera)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("1.png: red ")
            (camera / "draft").write_bytes(tiny.png("blue", 50))
            (camera / "draft").rename(camera / "3.png")
            lines = [process.stdout.readline()]
            while not lines[-1].startswith("3.png"):
                lines.append(process.stdout.readline())
            assert lines[-1].startswith("3.png: blue ")
        finally:
            process.kill()
        assert process.stderr is not None
        assert "2.png: the image cannot be read" in process.stderr.read()
