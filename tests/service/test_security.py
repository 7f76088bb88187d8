"""Who may call what: a real server, real certificates, real clients."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from grpc_status import rpc_status

from inflora.oip.v2 import open_inference_pb2
from inflora.v1 import (
    evaluator_service_pb2,
    learner_service_pb2,
    model_service_pb2,
    predictor_service_pb2,
)
from inflora.v1 import model_service_pb2 as model_pb
from inflora.v1 import predictor_service_pb2 as predictor_pb
from inflora_core import audit
from inflora_core.config import Limits
from inflora_core.errors import InfloraError
from inflora_service.access import RULES
from inflora_service.security import SecuritySettings
from inflora_service.server import Settings
from tests.certificates import Authority
from tests.service.conftest import RED, Running, Script, fails, fault_of, png, upload
from tests.service.security_cases import RPCS, Caller, Scene, entry, told, wrong_of
from tests.service.test_bad_input import publish

QUICK = 0.02
"""Seconds between looks at files: tests wait for what comes of them."""


@pytest.fixture(scope="session")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def tls(scene: Scene) -> SecuritySettings:
    """Of a server with TLS and tokens."""
    return SecuritySettings(scene.server.cert, scene.server.key, None, scene.tokens, False, QUICK)


@pytest.fixture
def mutual(scene: Scene, tls: SecuritySettings) -> SecuritySettings:
    """Of a server that asks for certificates, too."""
    return replace(tls, tls_client_ca=scene.authority.ca, tokens=scene.certified)


@contextlib.asynccontextmanager
async def calling(
    running: Running, token: str = "", channel: grpc.aio.Channel | None = None
) -> AsyncIterator[Running]:
    """A client that sends a token with every call, in the clear."""
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    opened = channel or grpc.aio.insecure_channel(running.server.address)
    async with opened:
        yield Running(running.server, _Sending(opened, metadata), running.settings)  # type: ignore[arg-type]


class _Sending:
    """A channel whose calls all have some metadata."""

    def __init__(self, channel: grpc.aio.Channel, metadata: Any) -> None:
        self._channel, self._metadata = channel, metadata

    def __getattr__(self, kind: str) -> Any:
        def stub(*arguments: Any, **options: Any) -> Any:
            made = getattr(self._channel, kind)(*arguments, **options)
            return lambda request, **more: made(request, metadata=self._metadata, **more)

        return stub


def retry_seconds(error: grpc.aio.AioRpcError) -> float:
    """Return when the server says to ask again."""
    metadata = list(error.trailing_metadata() or ())

    class Call:
        code, details, trailing_metadata = error.code, error.details, lambda self: metadata

    status = rpc_status.from_call(Call())
    assert status is not None
    info = error_details_pb2.RetryInfo()
    (detail,) = [each for each in status.details if each.Is(info.DESCRIPTOR)]
    detail.Unpack(info)
    return float(info.retry_delay.ToTimedelta().total_seconds())


# -- the table ------------------------------------------------------------------------------------


def test_every_rpc_has_a_rule_and_every_rule_an_rpc() -> None:
    files = (learner_service_pb2, predictor_service_pb2, evaluator_service_pb2, model_service_pb2)
    others = (open_inference_pb2, health_pb2, reflection_pb2)
    found = {
        f"/{service.full_name}/{method.name}"
        for file in (*files, *others)
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    assert set(RULES) == found
    assert {method: role or "" for method, role in RULES.items()} == {
        method: rpc.role for method, rpc in RPCS.items()
    }


async def test_every_rpc_of_a_server_has_a_rule(running: Running) -> None:
    """By reflection, so that no service is left out."""
    ask = running.channel.stream_stream(
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    (response,) = [each async for each in ask(iter([request]))]
    services = {each.name for each in response.list_services_response.service}
    assert services == {method.split("/")[1] for method in RULES}


async def test_an_rpc_without_a_rule_is_refused(
    start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(RULES, "/inflora.v1.LearnerService/ListTasks")
    running = await start()
    with fails("PERMISSION_DENIED", "PERMISSION_DENIED"):
        await running.learner.ListTasks(learner_service_pb2.ListTasksRequest())


async def test_every_rpc_with_every_caller(
    start: Callable[..., Any], scene: Scene, tls: SecuritySettings, settings: Settings
) -> None:
    publish(settings.store, red=RED)
    running = await start(security=tls)
    cases, wrong = await asyncio.to_thread(wrong_of, scene, {"tls": running.server.address})
    assert not wrong, "\n".join(wrong)
    assert cases == 9 * len(RPCS)


async def test_certificates_say_who_calls(
    start: Callable[..., Any], scene: Scene, mutual: SecuritySettings, settings: Settings
) -> None:
    publish(settings.store, red=RED)
    running = await start(security=mutual)
    cases, wrong = await asyncio.to_thread(wrong_of, scene, {"mtls": running.server.address})
    assert not wrong, "\n".join(wrong)
    assert cases == 9 * len(RPCS)


async def test_who_is_unknown_is_refused_before_anything_is_read(
    start: Callable[..., Any], tls: SecuritySettings
) -> None:
    """Also where a call has one message, which grpc.aio reads before it calls a handler."""
    running = await start(security=replace(tls, tls_cert=None, tls_key=None))
    for method in ("PredictorService/Predict", "LearnerService/LearnTask"):
        silent = asyncio.Event()

        async def nothing(silent: asyncio.Event = silent) -> AsyncIterator[bytes]:
            await silent.wait()
            yield b""

        call = running.channel.stream_stream(f"/inflora.v1.{method}")(nothing())
        with fails("UNAUTHENTICATED", "UNAUTHENTICATED", "authorization"):
            async for _ in call:
                pass
        silent.set()


# -- what is started ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "changes", "message"),
    [
        ("0.0.0.0", {"tokens": None}, "--tokens, --tls-cert"),
        ("::", {"tokens": None}, "--tokens, --tls-cert"),
        ("", {"tokens": None}, "--tokens, --tls-cert"),
        ("0.0.0.0", {"tokens": None, "tls_cert": None, "tls_key": None}, "--tokens"),
        ("0.0.0.0", {"tls_cert": None, "tls_key": None}, "in the clear"),
        ("127.0.0.1", {"tls_key": None}, "belong together"),
        ("127.0.0.1", {"tls_cert": None}, "belong together"),
        (
            "127.0.0.1",
            {"tls_cert": None, "tls_key": None, "tls_client_ca": Path("x")},
            "needs both",
        ),
        ("127.0.0.1", {"tokens": None, "tls_client_ca": Path("x")}, "--tls-client-ca needs --tok"),
        ("127.0.0.1", {"tls_key": Path("/none")}, "--tls-key /none cannot be read"),
        ("127.0.0.1", {"tls_client_ca": Path(__file__)}, "--tls-client-ca"),
        ("127.0.0.1", {"tls_cert": Path(__file__)}, "--tls-cert"),
        ("127.0.0.1", {"tokens": Path(__file__)}, "test_security.py"),
    ],
)
async def test_what_is_not_started(
    start: Callable[..., Any],
    tls: SecuritySettings,
    settings: Settings,
    tmp_path: Path,
    host: str,
    changes: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(InfloraError, match=re.escape(message)) as caught:
        await start(store=tmp_path / "new", host=host, security=replace(tls, **changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "changes", [{"tokens": None}, {"tls_cert": None, "tls_key": None}, {}], ids=str
)
async def test_what_is_started_if_it_is_asked_for(
    start: Callable[..., Any],
    tls: SecuritySettings,
    caplog: pytest.LogCaptureFixture,
    changes: dict[str, Any],
) -> None:
    """On all addresses; without warning only with TLS and tokens."""
    await start(host="0.0.0.0", security=replace(tls, insecure=bool(changes), **changes))
    warned = [each for each in caplog.records if "--insecure" in each.getMessage()]
    assert bool(warned) == bool(changes)


async def test_an_open_server_says_so(
    start: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        running = await start()
    assert running.server.address.startswith("127.0.0.1:")
    assert "loopback only" in caplog.text


# -- what changes on the disk ---------------------------------------------------------------------


def reached(address: str, ca: Path) -> str:
    """Return what a new client is told that believes ``ca``."""
    with Caller("", "", trusts=ca).channel(address) as channel:
        method = "/grpc.health.v1.Health/Check"
        return told(channel, method, RPCS[method], "")


async def logged(caplog: pytest.LogCaptureFixture, text: str) -> str:
    """Wait for a line in the log."""
    async with asyncio.timeout(60):
        while True:
            for record in caplog.records:
                if text in record.getMessage():
                    return str(record.getMessage())
            await asyncio.sleep(QUICK)


def secret(folder: Path, number: int, cert: bytes, key: bytes) -> None:
    """Put files where Kubernetes would: in a new folder, which a link is then moved to."""
    new = folder / f"..{number}"
    new.mkdir(parents=True)
    (new / "tls.crt").write_bytes(cert)
    (new / "tls.key").write_bytes(key)
    draft = folder / "..tmp"
    draft.symlink_to(new.name)
    os.replace(draft, folder / "..data")
    for name in ("tls.crt", "tls.key"):
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(f"..data/{name}")


async def test_a_renewed_certificate_is_used_and_a_broken_one_is_not(
    start: Callable[..., Any],
    scene: Scene,
    tls: SecuritySettings,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    folder, other = tmp_path / "secret", Authority(tmp_path / "other", "other")
    first, renewed = scene.server, other.issue("server")
    expired = scene.authority.issue("server", expired=True, file="server-expired")
    secret(folder, 1, first.cert.read_bytes(), first.key.read_bytes())
    files = replace(tls, tls_cert=folder / "tls.crt", tls_key=folder / "tls.key")
    running = await start(security=files)
    address = running.server.address
    async with grpc.aio.secure_channel(
        address, grpc.ssl_channel_credentials(scene.authority.ca.read_bytes())
    ) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        await health.Check(health_pb2.HealthCheckRequest())

        # A key of another certificate, one that is out of date, and one that is none.
        for number, (cert, key, why) in enumerate(
            [
                (renewed.cert.read_bytes(), first.key.read_bytes(), "KEY_VALUES_MISMATCH"),
                (expired.cert.read_bytes(), expired.key.read_bytes(), "expired"),
                (b"", b"", "cannot be used"),
            ],
            2,
        ):
            secret(folder, number, cert, key)
            assert "the last stays" in await logged(caplog, why)
            assert await asyncio.to_thread(reached, address, scene.authority.ca) == "OK"
        caplog.clear()
        secret(folder, 9, renewed.cert.read_bytes(), renewed.key.read_bytes())
        await logged(caplog, "what is new of the TLS certificates is used")
        assert await asyncio.to_thread(reached, address, other.ca) == "OK"
        assert await asyncio.to_thread(reached, address, scene.authority.ca) == "UNAVAILABLE"
        # A connection that is open goes on.
        await health.Check(health_pb2.HealthCheckRequest())


async def test_a_token_that_is_taken_away_is_refused_also_in_a_stream(
    start: Callable[..., Any],
    settings: Settings,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    publish(settings.store, red=RED)
    tokens = tmp_path / "tokens.toml"
    tokens.write_text(entry("predict", "one") + entry("predict", "two"))
    running = await start(security=SecuritySettings(tokens=tokens, reload_seconds=QUICK))
    request = predictor_pb.PredictStreamRequest(request=predictor_pb.PredictRequest(images=[png()]))
    async with calling(running, "token-of-one") as one, calling(running, "token-of-two") as two:
        streams = {}
        for name, client in {"one": one, "two": two}.items():
            sent: asyncio.Queue[Any] = asyncio.Queue()

            async def requests(sent: asyncio.Queue[Any] = sent) -> AsyncIterator[Any]:
                while (each := await sent.get()) is not None:
                    yield each

            streams[name] = (sent, client.predictor.PredictStream(requests()))
            sent.put_nowait(request)
            assert (await streams[name][1].read()).response.predictions
        tokens.write_text("nothing of this kind")
        await logged(caplog, "the last stays")
        await one.predictor.Predict(request.request)
        tokens.write_text(entry("predict", "two"))
        await logged(caplog, "what is new of the tokens is used")
        with fails("UNAUTHENTICATED", "UNAUTHENTICATED", "authorization"):
            await one.predictor.Predict(request.request)
        await two.predictor.Predict(request.request)
        for name in ("one", "two"):
            streams[name][0].put_nowait(request)
        assert (await streams["two"][1].read()).response.predictions
        with fails("UNAUTHENTICATED", "UNAUTHENTICATED", "authorization"):
            await streams["one"][1].read()
        streams["two"][0].put_nowait(None)


# -- what principals may use ----------------------------------------------------------------------


async def begin(
    start: Callable[..., Any], tmp_path: Path, quota: str, role: str = "predict", **changes: Any
) -> Running:
    """Start a server with ``limited``, who has a quota, and ``other``, who has none."""
    tokens = tmp_path / "tokens.toml"
    tokens.write_text(entry(role, "limited", quota=quota) + entry(role, "other"))
    running: Running = await start(security=SecuritySettings(tokens=tokens), **changes)
    return running


async def test_calls_over_the_quota_are_refused_and_those_of_others_are_not(
    start: Callable[..., Any], tmp_path: Path
) -> None:
    running = await begin(start, tmp_path, "calls_per_second = 3")
    async with calling(running, "token-of-limited") as limited:
        answers = await asyncio.gather(
            *(limited.model.ListVersions(model_pb.ListVersionsRequest()) for _ in range(12)),
            return_exceptions=True,
        )
        refused = [each for each in answers if isinstance(each, grpc.aio.AioRpcError)]
        assert len(refused) >= 8  # one more may have come in time
        for each in refused:
            fault = fault_of(each)
            assert (fault.code.name, fault.reason) == ("RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED")
            assert 0 < retry_seconds(each) <= 1 / 3
        async with calling(running, "token-of-other") as other:
            for _ in range(12):
                await other.model.ListVersions(model_pb.ListVersionsRequest())
        await asyncio.sleep(max(map(retry_seconds, refused)))
        await limited.model.ListVersions(model_pb.ListVersionsRequest())


async def test_bytes_over_the_quota_are_refused(
    start: Callable[..., Any], tmp_path: Path, settings: Settings
) -> None:
    publish(settings.store, red=RED)
    running = await begin(start, tmp_path, "bytes_per_second = 1024")
    async with calling(running, "token-of-limited") as limited:
        large = predictor_pb.PredictRequest(images=[png(size=(1, 1)), b"x" * 20_000])
        with fails("INVALID_ARGUMENT", "INVALID_IMAGE", "images[0]"):
            await limited.predictor.Predict(large)  # more than there is, once
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await limited.predictor.Predict(predictor_pb.PredictRequest(images=[png()]))
        assert fault_of(caught.value).reason == "QUOTA_EXCEEDED"
        assert retry_seconds(caught.value) > 10


async def test_calls_at_a_time(start: Callable[..., Any], tmp_path: Path, script: Script) -> None:
    script.hold("DECODING")
    running = await begin(
        start,
        tmp_path,
        "concurrent_calls = 1",
        "learn",
        limits=Limits(reserve_bytes=0, max_calls=2),
    )
    async with (
        calling(running, "token-of-limited") as one,
        calling(running, "token-of-other") as two,
    ):
        task = await one.learn({"red": [png()]})
        watching = one.learner.WatchTask(learner_service_pb2.WatchTaskRequest(name=task.name))
        await watching.read()
        with fails("RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED"):
            await one.get(task.name)
        also = two.learner.WatchTask(learner_service_pb2.WatchTaskRequest(name=task.name))
        await also.read()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await two.get(task.name)
        assert fault_of(caught.value).reason == "LIMIT_EXCEEDED"
        assert retry_seconds(caught.value) > 0
        assert await two.serving() == "SERVING"
        await script.let_pass("DECODING")
        for stream in (watching, also):
            while await stream.read() is not grpc.aio.EOF:
                pass
        await one.get(task.name)


async def test_a_call_whose_message_does_not_come_counts_until_it_is_given_up(
    start: Callable[..., Any],
) -> None:
    running = await start(limits=Limits(reserve_bytes=0, max_calls=1))

    async def reason() -> str:
        try:
            await running.model.ListVersions(model_pb.ListVersionsRequest())
        except grpc.aio.AioRpcError as error:
            return fault_of(error).reason
        return ""

    async def nothing() -> AsyncIterator[bytes]:
        await asyncio.Event().wait()
        yield b""

    predict = running.channel.stream_stream("/inflora.v1.PredictorService/Predict")
    async with asyncio.timeout(60):
        silent = predict(nothing())
        while await reason() != "LIMIT_EXCEEDED":
            if silent.done():  # the only place was taken by the other call
                silent = predict(nothing())
        silent.cancel()
        while await reason():
            pass


async def test_tasks_in_the_queue_and_who_sent_them(
    start: Callable[..., Any], tmp_path: Path, script: Script, settings: Settings
) -> None:
    script.hold("DECODING")
    running = await begin(start, tmp_path, "queued_tasks = 1", "learn")
    async with (
        calling(running, "token-of-limited") as one,
        calling(running, "token-of-other") as two,
    ):
        first = await one.learn({"red": [png()]})
        await script.reached("DECODING")  # it is in the queue no more
        second = await one.learn({"green": [png()]}, request_id="second")
        again = await one.learn({"green": [png()]}, request_id="second")
        assert again.name == second.name
        call = one.learner.LearnTask(iter(upload({"blue": [png()]})))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        if caught.value.details() != "Internal error from Core":  # see Running.learn
            assert fault_of(caught.value).reason == "QUOTA_EXCEEDED"
            assert retry_seconds(caught.value) > 0
        third = await two.learn({"blue": [png()]})
        script.release("DECODING")
        for task in (first, second, third):
            await two.ended(task.name)
    lines = audit.verify(settings.store).lines
    accepted = [line.who.partition("@")[0] for line in lines if line.event == "task accepted"]
    assert accepted == ["limited", "limited", "other"]


async def test_only_learners_download_more_than_the_model(
    start: Callable[..., Any], tmp_path: Path, settings: Settings
) -> None:
    publish(settings.store, red=RED)
    tokens = tmp_path / "tokens.toml"
    tokens.write_text(entry("predict") + entry("learn"))
    running = await start(security=SecuritySettings(tokens=tokens))

    async def download(client: Running, artifact: str) -> None:
        request = model_pb.DownloadArtifactRequest(
            name="models/default/versions/current", artifact=artifact
        )
        async for _ in client.model.DownloadArtifact(request):
            pass

    async with calling(running, "token-of-predict") as predict:
        await download(predict, "model.onnx")
        with fails("PERMISSION_DENIED", "PERMISSION_DENIED"):
            await download(predict, "memory.safetensors")
    async with calling(running, "token-of-learn") as learn:
        await download(learn, "memory.safetensors")
        for artifact in ("../../../tokens.toml", "/etc/passwd", "..", "manifest.json"):
            with fails("NOT_FOUND", "NOT_FOUND", "artifact"):
                await download(learn, artifact)


async def test_refusals_are_logged_without_tokens_and_not_each(
    start: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    running = await begin(start, tmp_path, "calls_per_second = 1000")
    async with calling(running, "a-secret-that-is-wrong") as nobody:
        for _ in range(20):
            with fails("UNAUTHENTICATED", "UNAUTHENTICATED", "authorization"):
                await nobody.model.ListVersions(model_pb.ListVersionsRequest())
    lines = [each.getMessage() for each in caplog.records if "refused" in each.getMessage()]
    assert 1 <= len(lines) < 20
    assert "a-secret" not in caplog.text
