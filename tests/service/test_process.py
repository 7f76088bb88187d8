"""``python -m inflora_service`` as a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from inflora.v1 import predictor_service_pb2 as predictor_pb
from inflora.v1 import predictor_service_pb2_grpc
from inflora_service import __main__
from inflora_service.server import Settings
from tests.service.conftest import RED, png
from tests.service.test_bad_input import publish

# The worker that the command line starts is the real one. It is not needed here, and where torch
# is not installed it does not come up: the server then tries again and again, and serves.


@contextlib.asynccontextmanager
async def process(*arguments: object, **options: Any) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run the server's program; kill it at the end if it still runs."""
    running = await asyncio.create_subprocess_exec(
        sys.executable,
        *options.pop("python", ()),
        *("-m", "inflora_service"),
        *map(str, arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        **options,
    )
    try:
        yield running
    finally:
        if running.returncode is None:
            running.kill()
        await running.communicate()


async def line_with(stream: asyncio.StreamReader | None, text: str) -> str:
    """Read lines until one has ``text``."""
    assert stream is not None
    seen = []
    while line := (await stream.readline()).decode():
        if text in line:
            return line
        seen.append(line)
    raise AssertionError(f"no {text!r} in:\n{''.join(seen)}")


def loaded_libraries(pid: int) -> set[str]:
    """Return the last two parts of the path of every library in a process's memory."""
    maps = Path(f"/proc/{pid}/maps").read_text()
    paths = (line.split(maxsplit=5)[5] for line in maps.splitlines() if ".so" in line)
    return {"/".join(path.split("/")[-2:]) for path in paths}


@pytest.fixture
def store(settings: Settings) -> Path:
    """A store with one version."""
    publish(settings.store, red=RED)
    return settings.store


async def test_it_serves_without_torch_and_drains(store: Path, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    ready.write_text("stale")
    async with process("--store", store, "--port", 0, "--ready-file", ready) as server:
        line = await line_with(server.stderr, "ready; try: inflora learn")
        address = ready.read_text().strip()
        assert re.fullmatch(r"127\.0\.0\.1:\d+", address)
        assert address in line
        async with grpc.aio.insecure_channel(address) as channel:
            stub = predictor_service_pb2_grpc.PredictorServiceStub(channel)
            answer = await stub.Predict(predictor_pb.PredictRequest(images=[png()]))
            assert answer.predictions[0].scores[0].label == "red"

            libraries = loaded_libraries(server.pid)
            assert any(
                "onnxruntime" in name for name in libraries
            )  # the look is in the right place
            assert not any("torch" in name for name in libraries)

            reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
            request = reflection_pb2.ServerReflectionRequest(list_services="")
            (response,) = [r async for r in reflection.ServerReflectionInfo(iter([request]))]
            names = {service.name for service in response.list_services_response.service}
            assert {"inflora.v1.PredictorService", "grpc.health.v1.Health"} <= names

            server.send_signal(signal.SIGTERM)
            await line_with(server.stderr, "stopped")
            assert await server.wait() == 0


async def test_nothing_it_imports_imports_torch() -> None:
    async with process("--help", python=("-X", "importtime")) as server:
        out, imports = await server.communicate()
    assert server.returncode == 0
    assert b"--ready-file" in out
    names = {line.rpartition(b"|")[2].strip().split(b".")[0] for line in imports.splitlines()}
    assert b"onnxruntime" in names
    assert not names & {b"torch", b"timm", b"torchvision"}


async def test_a_signal_during_the_start_ends_it(tmp_path: Path) -> None:
    async with process("--store", tmp_path / "new", "--port", 0) as server:
        await line_with(server.stderr, "learning worker started")
        server.send_signal(signal.SIGINT)
        await line_with(server.stderr, "stopped")
        assert await server.wait() == 0


async def test_its_log_is_json_if_that_is_asked_for(store: Path) -> None:
    options = ("--store", store, "--port", 0, "--http-port", 0, "--log-format", "json")
    async with process(*options) as server:
        assert server.stderr is not None
        messages: list[str] = []
        while not messages or "ready; try" not in messages[-1]:
            line = json.loads(await server.stderr.readline())
            assert line["process"] == "server"
            messages.append(line["message"])
        assert any("metrics on http://127.0.0.1:" in message for message in messages)
        server.send_signal(signal.SIGTERM)
        rest, _ = await asyncio.gather(server.stderr.read(), server.wait())
        assert {json.loads(line)["process"] for line in rest.splitlines()} >= {"server"}


@pytest.mark.parametrize("port", ["-1", "65536", "metrics"])
def test_a_port_that_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, port: str
) -> None:
    arguments = ["inflora_service", "--store", str(tmp_path / "new"), "--http-port", port]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    assert ended.value.code == 2
    assert "--http-port" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "new").exists()


@contextlib.contextmanager
def _taken_port() -> Any:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def _spoil_format(store: Path) -> None:
    (store / "FORMAT").write_text(json.dumps({"format": 99}))


def _spoil_backbone(store: Path) -> None:
    (weights,) = store.glob("backbones/*/weights.safetensors")
    weights.write_bytes(weights.read_bytes() + b"!")


async def test_a_refusal_is_one_line_and_status_1(store: Path) -> None:
    with _taken_port() as port:
        async with process("--store", store, "--port", port) as server:
            out, errors = await server.communicate()
    assert server.returncode == 1
    assert not out
    assert errors.decode().startswith("inflora_service: error: ")
    assert f"127.0.0.1:{port}" in errors.decode()
    assert len(errors.splitlines()) == 1


def refusal(monkeypatch: pytest.MonkeyPatch, capsys: Any, *arguments: object) -> str:
    """Return what the program, run in this process, says before it ends with status 1."""
    monkeypatch.setattr(sys, "argv", ["inflora_service", *map(str, arguments)])
    assert __main__.main() == 1
    (line,) = capsys.readouterr().err.splitlines()
    return str(line)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(_spoil_format, "store format 99"), (_spoil_backbone, "checksum")],
)
def test_a_store_that_cannot_be_served(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, spoil: Any, message: str
) -> None:
    spoil(store)
    assert message in refusal(monkeypatch, capsys, "--store", store, "--port", 0)


def test_a_folder_that_is_no_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"")
    assert "not a store" in refusal(monkeypatch, capsys, "--store", tmp_path)
    assert os.listdir(tmp_path) == ["holiday.jpg"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--epochs", "nan"), "epochs"),
        (("--learning-rate", "-1"), "learning_rate"),
        (("--set", "augmentation=flip", "--set", "nonsense=1"), "nonsense"),
        (("--set", "rank"), "KEY=VALUE"),
        (("--host", "0.0.0.0"), "--insecure"),
        (("--tls-key", "server.key"), "--tls-cert and --tls-key belong together"),
        (("--tokens", "none.toml"), "none.toml cannot be read"),
        (("--max-calls", "0"), "--max-calls"),
    ],
)
def test_settings_that_cannot_be(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    store = tmp_path / "new"
    assert message in refusal(monkeypatch, capsys, "--store", store, *arguments)
    assert not store.exists()
