"""The clients that we ship, with TLS, certificates and tokens, against real servers."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from typer.testing import CliRunner

from inflora.v1 import model_service_pb2 as pb
from inflora.v1 import model_service_pb2_grpc
from inflora_client import (
    AsyncClient,
    Client,
    ConnectionFailedError,
    CorruptDownloadError,
    Example,
    InsecureTokenError,
    PermissionDeniedError,
    ResourceExhaustedError,
    RetryPolicy,
    UnauthenticatedError,
)
from inflora_client._access import Access, is_loopback
from inflora_client._bench import CallFailedError, PredictCalls
from inflora_client._calls import Question
from inflora_client._names import Names
from inflora_client.cli import app
from inflora_service.principals import Principals, token_digest
from inflora_service.security import SecuritySettings
from inflora_service.server import Settings
from tests.service.conftest import RED, png
from tests.service.security_cases import Scene, entry
from tests.service.test_bad_input import publish
from tests.service.test_security import mutual, scene, tls

__all__ = ["mutual", "scene", "tls"]  # fixtures

QUICK = RetryPolicy(max_attempts=1)


def token_file(folder: Path, name: str) -> Path:
    path = folder / f"{name}.token"
    path.write_text(f"token-of-{name}\n")
    return path


def predict(target: str, **options: Any) -> str:
    with Client(target, retry=QUICK, **options) as client:
        return client.predict([png()]).predictions[0].label


async def test_both_clients_by_token_and_by_certificate(
    start: Callable[..., Any],
    scene: Scene,
    tls: SecuritySettings,
    mutual: SecuritySettings,
    settings: Settings,
    tmp_path: Path,
) -> None:
    publish(settings.store, red=RED)
    ca = scene.authority.ca
    running = await start(security=tls)
    address = running.server.address
    learner = {"ca": ca, "token_file": token_file(tmp_path, "learn")}
    assert await asyncio.to_thread(predict, address, **learner) == "red"
    async with AsyncClient(address, retry=QUICK, **learner) as client:
        assert (await client.predict([png()])).predictions[0].label == "red"
        # On a connection of its own.
        task = await client.learn([Example(png(), "more")])
        assert (await client.wait(task)).id == task.id
        with pytest.raises(PermissionDeniedError):
            await client.promote(1)
        file = await client.download(to=tmp_path)
        assert file.path.read_bytes()
    for options in ({}, {"token": "wrong"}):
        with pytest.raises(UnauthenticatedError) as caught:
            await asyncio.to_thread(predict, address, ca=ca, **options)
        assert caught.value.reason == "UNAUTHENTICATED"
    for options in ({"tls": True}, {"ca": scene.folder / "theirs.pem"}, {}):
        with pytest.raises(ConnectionFailedError):
            await asyncio.to_thread(predict, address, **options)
    await running.server.stop()

    running = await start(security=mutual)
    mine = scene.callers["certificate of predict"].files
    assert mine is not None
    options = {"ca": ca, "cert": mine.cert, "key": mine.key}
    assert await asyncio.to_thread(predict, running.server.address, **options) == "red"
    async with AsyncClient(running.server.address, retry=QUICK, **options) as client:
        with pytest.raises(PermissionDeniedError, match="'predict'"):
            await client.learn([Example(png(), "x")])
    with pytest.raises(ConnectionFailedError):
        await asyncio.to_thread(predict, running.server.address, ca=ca)


async def test_a_token_is_sent_in_the_clear_only_to_this_machine(
    start: Callable[..., Any], scene: Scene, settings: Settings, tmp_path: Path
) -> None:
    publish(settings.store, red=RED)
    running = await start(security=SecuritySettings(tokens=scene.tokens))
    file = token_file(tmp_path, "predict")
    port = running.server.address.rpartition(":")[2]
    for target in (running.server.address, f"localhost:{port}", f"ipv4:127.0.0.1:{port}"):
        assert await asyncio.to_thread(predict, target, token_file=file) == "red"
    question = Question(Names("models/default"), 1, None, None, False)
    for target in ("example.com:1", "10.0.0.1:1", "dns:///a.b:1", "ipv4:127.0.0.1:1,10.0.0.1:1"):
        with pytest.raises(InsecureTokenError, match="in the clear"):
            Client(target, token="x")
        with pytest.raises(InsecureTokenError, match="in the clear"):
            AsyncClient(target, token_file=file)
        with pytest.raises(InsecureTokenError):
            async with PredictCalls(target, question, [png()], access=Access(token="x")):
                pass
    calls = PredictCalls(running.server.address, question, [png()], access=Access(token="wrong"))
    async with calls as call:
        with pytest.raises(CallFailedError, match="UNAUTHENTICATED"):
            await call(0, 30.0)


async def test_a_new_token_in_the_file_is_taken(
    start: Callable[..., Any], settings: Settings, tmp_path: Path
) -> None:
    publish(settings.store, red=RED)
    tokens = tmp_path / "tokens.toml"
    tokens.write_text(
        entry("predict", "one") + entry("predict", "two", quota="calls_per_second = 1")
    )
    running = await start(security=SecuritySettings(tokens=tokens))
    file = token_file(tmp_path, "wrong")
    async with AsyncClient(running.server.address, retry=QUICK, token_file=file) as client:
        with pytest.raises(UnauthenticatedError):
            await client.version()
        file.write_text("token-of-one")
        await client.version()
        file.write_text("token-of-two")
        await client.version()
        with pytest.raises(ResourceExhaustedError) as caught:
            await asyncio.gather(*(client.version() for _ in range(3)))
        assert caught.value.reason == "QUOTA_EXCEEDED"
        assert caught.value.failure.retry_seconds is not None
        assert 0 < caught.value.failure.retry_seconds <= 1
        file.write_text("token-of-one")
        await client.version()
        file.unlink()  # as between two steps of replacing it
        await client.version()
        file.write_text("")
        await client.version()
    with pytest.raises(ValueError, match="no token"):
        AsyncClient(running.server.address, token_file=file)


async def test_a_proxy_of_the_environment_sees_nothing_that_is_for_this_machine(
    start: Callable[..., Any], settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(settings.store, red=RED)
    tokens = tmp_path / "tokens.toml"
    tokens.write_text(entry("predict", "one"))
    running = await start(security=SecuritySettings(tokens=tokens))
    with socket.socket() as proxy:
        proxy.bind(("127.0.0.1", 0))
        proxy.listen()
        proxy.setblocking(False)
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        monkeypatch.delenv("no_proxy", raising=False)
        async with AsyncClient(running.server.address, retry=QUICK, token="token-of-one") as client:
            await client.version()
        with pytest.raises(BlockingIOError):
            proxy.accept()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token": "x", "token_file": "y"}, "not both"),
        ({"cert": "x"}, "belong together"),
        ({"key": "x"}, "belong together"),
        ({"token": ""}, "token"),
        ({"token": "two words"}, "token"),
        ({"token": "naïve"}, "token"),
        ({"tls": True, "credentials": grpc.ssl_channel_credentials()}, "credentials"),
    ],
)
def test_what_makes_no_sense(options: dict[str, Any], message: str) -> None:
    for make in (Client, AsyncClient):
        with pytest.raises(ValueError, match=message) as caught:
            make("localhost:1", **options)
        assert "naïve" not in str(caught.value)


def test_secrets_are_not_shown() -> None:
    assert "hidden" not in repr(Access(token="hidden"))


def test_what_is_loopback() -> None:
    inside = ["localhost:1", "127.0.0.1:1", "[::1]:1", "dns:///localhost:1", "unix:/a", "localhost"]
    outside = ["localhost.example:1", "0.0.0.0:1", "a:1", "[::]:1", "xds:///localhost:1", ":1", ""]
    assert [is_loopback(each) for each in inside] == [True] * len(inside)
    assert [is_loopback(each) for each in outside] == [False] * len(outside)


class Odd(model_service_pb2_grpc.ModelServiceServicer):
    """A server that fails twice, and announces odd names."""

    def __init__(self, announced: str = "model.onnx") -> None:
        self.announced = announced
        self.seen: list[str] = []

    async def GetVersion(self, request: Any, context: Any) -> pb.GetVersionResponse:
        self.seen += [value for key, value in context.invocation_metadata() if key[0] == "a"]
        if len(self.seen) < 3:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "not yet")
        return pb.GetVersionResponse(version=pb.Version(name="models/default/versions/1"))

    async def DownloadArtifact(
        self, request: Any, context: Any
    ) -> AsyncIterator[pb.DownloadArtifactResponse]:
        sha256 = hashlib.sha256(b"content").hexdigest()
        artifact = pb.Artifact(name=self.announced, size=7, sha256=sha256)
        yield pb.DownloadArtifactResponse(
            artifact=artifact, version="models/default/versions/1", data=b"content"
        )


@contextlib.asynccontextmanager
async def odd(servicer: Odd, scene: Scene) -> AsyncIterator[str]:
    """Serve with TLS."""
    server = grpc.aio.server()
    model_service_pb2_grpc.add_ModelServiceServicer_to_server(servicer, server)
    pair = (scene.server.key.read_bytes(), scene.server.cert.read_bytes())
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def test_secure_channels_retry_as_others_do(scene: Scene) -> None:
    quick = RetryPolicy(max_attempts=3, initial_backoff=0.01)
    for kind in (Client, AsyncClient):
        servicer = Odd()
        async with odd(servicer, scene) as address:
            client = kind(address, ca=scene.authority.ca, token="abc", retry=quick)
            if isinstance(client, AsyncClient):
                await client.version()
                await client.close()
            else:
                await asyncio.to_thread(client.version)
                client.close()
        assert servicer.seen == ["Bearer abc"] * 3


@pytest.mark.parametrize("announced", ["../evil", "/tmp/evil", "a/b", "..", "", "model.onnx\0"])
async def test_a_server_cannot_say_where_a_download_goes(
    scene: Scene, tmp_path: Path, announced: str
) -> None:
    folder = tmp_path / "inside"
    folder.mkdir()
    async with (
        odd(Odd(announced), scene) as address,
        AsyncClient(address, ca=scene.authority.ca, retry=QUICK) as client,
    ):
        for artifact in ("model.onnx", "../../outside", "/outside"):
            with contextlib.suppress(CorruptDownloadError):
                file = await client.download(artifact=artifact, to=folder)
                assert file.path.parent == folder
        for artifact in ("", "..", "a/.."):
            with pytest.raises(ValueError, match="no name of a file"):
                await client.download(artifact=artifact, to=folder)
    assert os.listdir(tmp_path) == ["inside"]
    assert set(os.listdir(folder)) <= {"model.onnx", "outside"}


# -- the command ----------------------------------------------------------------------------------


def inflora(*arguments: object, **env: str) -> Any:
    return CliRunner().invoke(app, list(map(str, arguments)), env=env)


def test_a_token_is_made_and_printed_is_only_its_hash(tmp_path: Path) -> None:
    file, tokens = tmp_path / "a.token", tmp_path / "tokens.toml"
    made = inflora("token", "camera-7", "--role", "predict", "--out", file)
    assert made.exit_code == 0, made.output
    token = file.read_text().strip()
    assert token not in made.output
    assert file.stat().st_mode & 0o777 == 0o600
    tokens.write_text(made.output)
    principal = Principals.read(tokens, certificates=False).by_digest(token_digest(token))
    assert principal is not None
    assert (principal.name, principal.role) == ("camera-7", "predict")

    again = inflora("token", "camera-7", "--role", "predict", "--out", file)
    assert (again.exit_code, file.read_text().strip()) == (2, token)
    shown = inflora("--json", "token", "b", "--role", "admin", "--out", tmp_path / "b")
    assert set(json.loads(shown.output)) == {"name", "role", "token_sha256", "file"}
    for arguments in (("a b", "--role", "admin"), ("a", "--role", "root"), ("a",)):
        assert inflora("token", *arguments, "--out", tmp_path / "c").exit_code == 2
    assert not (tmp_path / "c").exists()


async def test_the_command_says_who_calls(
    start: Callable[..., Any],
    scene: Scene,
    tls: SecuritySettings,
    settings: Settings,
    tmp_path: Path,
) -> None:
    publish(settings.store, red=RED)
    running = await start(security=tls)
    image = tmp_path / "image.png"
    image.write_bytes(png())
    file, ca = token_file(tmp_path, "predict"), scene.authority.ca
    server = ("--server", running.server.address)

    async def run(*arguments: object, **env: str) -> Any:
        return await asyncio.to_thread(inflora, *server, *arguments, **env)

    env = {"INFLORA_TOKEN_FILE": str(file), "INFLORA_CA": str(ca)}
    for options, more in (
        (("--ca", ca, "--token-file", file), {}),
        ((), env),
    ):
        found = await run(*options, "predict", image, **more)
        assert (found.exit_code, "red" in found.output) == (0, True), found.output
    found = await run("bench", image, "--calls", 2, "--warm-up", 0, **env)
    assert found.exit_code == 0, found.output
    for arguments, more, code, text in (
        (("--ca", ca, "versions"), {}, 1, "--token-file"),
        (("promote", "1"), env, 1, "role"),
        (("--cert", ca, "versions"), {}, 2, "belong together"),
        (("--token-file", tmp_path / "none", "versions"), {}, 2, "none"),
        (("--ca", scene.folder / "theirs.pem", "versions"), env, 3, "does not vouch"),
        (("--server", "example.com:1", "--token-file", file, "versions"), {}, 2, "in the clear"),
    ):
        found = await run(*arguments, **more)
        assert (found.exit_code, text in found.output) == (code, True), found.output
