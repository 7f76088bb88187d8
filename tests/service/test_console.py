"""The console's questions by HTTP: who is let in, what they are told, and what they cannot do."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import logging
import math
import re
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from inflora.v1 import learner_service_pb2 as learner_pb
from inflora.v1 import predictor_service_pb2 as predictor_pb
from inflora_core.config import Limits
from inflora_service import web
from inflora_service.console import POLICY
from inflora_service.security import SecuritySettings
from inflora_service.server import Settings
from tests.service.conftest import BLUE, GREEN, RED, WHITE, Running, Script, png, upload
from tests.service.scraping import scrape
from tests.service.security_cases import Scene, entry
from tests.service.test_bad_input import publish
from tests.service.test_evaluating import evaluate, messages
from tests.service.test_restarting import damage

PAGE = (
    "/",
    "/console/console.css",
    "/console/console.js",
    "/console/icon.svg",
    "/console/pictures.css",
)
STATE, PREDICT = "/console/state", "/console/predict"
BINARY = {"Content-Type": "application/octet-stream"}


@dataclass(frozen=True)
class Reply:
    """What came back."""

    status: int
    headers: dict[str, str]
    content: bytes

    @property
    def told(self) -> Any:
        return json.loads(self.content)


def ask(
    address: str,
    path: str,
    body: bytes | None = None,
    headers: dict[str, str | None] | None = None,
    *,
    method: str = "",
    source: str = "",
) -> Reply:
    """Ask a server. Blocks.

    Args:
        address: Where.
        path: For what.
        body: What is sent.
        headers: More of them; None leaves out one that would be sent.
        method: How; GET without a body, or else POST.
        source: Address to come from.
    """
    host, _, port = address.rpartition(":")
    connection = http.client.HTTPConnection(
        host, int(port), timeout=30, source_address=(source, 0) if source else None
    )
    try:
        chosen: dict[str, str | None] = {"Host": address, **(headers or {})}
        if body is not None:
            chosen.setdefault("Content-Length", str(len(body)))
        connection.putrequest(method or ("GET" if body is None else "POST"), path, skip_host=True)
        for name, value in chosen.items():
            if value is not None:
                connection.putheader(name, value)
        connection.endheaders(body)
        response = connection.getresponse()
        return Reply(response.status, dict(response.getheaders()), response.read())
    finally:
        connection.close()


async def asked(running: Running, path: str, *arguments: Any, **more: Any) -> Reply:
    return await asyncio.to_thread(ask, running.server.http_address, path, *arguments, **more)


async def state(running: Running, seen: str = "", token: str = "") -> Any:
    """Return what the page is told."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    reply = await asked(running, f"{STATE}?seen={seen}", None, headers)
    assert reply.status == 200, reply
    return reply.told


async def until(running: Running, there: Callable[[Any], bool], **more: Any) -> Any:
    """Return what the page is told once that is so: answers may be a second old."""
    async with asyncio.timeout(60):
        while not there(told := await state(running, **more)):
            pass
    return told


def secure(folder: Path, *entries: str) -> SecuritySettings:
    """Return settings of a server that asks for tokens, on loopback."""
    (folder / "tokens.toml").write_text("".join(entries))
    return SecuritySettings(tokens=folder / "tokens.toml")


@pytest.fixture
async def taught(start: Callable[..., Any], settings: Settings) -> Running:
    """A server with two versions."""
    publish(settings.store, red=RED, white=WHITE)
    publish(settings.store, green=GREEN)
    running: Running = await start()
    return running


# -- the page -------------------------------------------------------------------------------------


async def test_the_page_is_small_and_asks_nobody_else(running: Running) -> None:
    size = 0
    for path in PAGE:
        reply = await asked(running, path)
        assert reply.status == 200, path
        assert reply.headers["Content-Security-Policy"] == POLICY
        assert reply.headers["X-Content-Type-Options"] == "nosniff"
        assert reply.headers["Server"] == "inflora"
        size += len(reply.content)
        others = re.findall(rb"https?://[^\s\"']*", reply.content)
        assert set(others) <= {b"http://www.w3.org/2000/svg"}, path
    assert 10_000 < size < 500_000
    assert "unsafe" not in POLICY


@pytest.mark.parametrize(
    ("path", "method", "allowed"),
    [
        ("/", "POST", "GET"),
        (STATE, "POST", "GET"),
        (PREDICT, "GET", "POST"),
        (PREDICT, "PUT", "POST"),
        (PREDICT, "OPTIONS", "POST"),
        ("/console/nothing", "POST", "GET"),
    ],
)
async def test_other_methods(running: Running, path: str, method: str, allowed: str) -> None:
    reply = await asked(running, path, method=method)
    assert (reply.status, reply.headers["Allow"]) == (405, allowed)


async def test_without_a_console(start: Callable[..., Any]) -> None:
    running = await start(console=False)
    for path in (*PAGE, STATE):
        assert (await asked(running, path)).status == 404
    assert (await asked(running, PREDICT, b"")).status == 405
    assert (await asked(running, "/metrics")).status == 200


# -- who is let in --------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", STATE])
async def test_only_this_machine_is_answered(running: Running, path: str) -> None:
    """A mesh's proxy comes from another address of 127/8, and a web server's says for whom."""
    others: list[dict[str, Any]] = [
        {"source": "127.0.0.6"},
        {"headers": {"X-Forwarded-For": "192.0.2.1"}},
        {"headers": {"Forwarded": "for=192.0.2.1"}},
    ]
    for more in others:
        reply = await asked(running, path, **more)
        assert (reply.status, b"ssh -L" in reply.content) == (403, True), more
    assert (await asked(running, path)).status == 200
    assert (await asked(running, "/metrics", source="127.0.0.6")).status == 200
    refused = await asked(running, PREDICT, png(), BINARY, source="127.0.0.6")
    assert refused.status == 403


async def test_others_where_that_was_asked_for(start: Callable[..., Any]) -> None:
    running = await start(security=SecuritySettings(insecure=True))
    assert (await asked(running, STATE, source="127.0.0.6")).status == 200
    for host, status in {
        "192.0.2.7:9464": 200,
        "[2001:db8::1]:80": 200,
        "evil.example": 403,
    }.items():
        assert (await asked(running, STATE, None, {"Host": host})).status == status, host


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:1234", 200),
        ("127.0.0.1:80", 200),
        ("[::1]:80", 200),
        ("evil.example", 403),
        ("evil.example:9464", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example", 403),
        ("192.0.2.7", 403),
        ("[::1", 403),
        ("", 403),
        (None, 403),
    ],
)
async def test_names_that_lead_here(running: Running, host: str | None, status: int) -> None:
    for path in ("/", STATE):
        assert (await asked(running, path, None, {"Host": host})).status == status


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "https://localhost:9464", "Host": "localhost:9464"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
async def test_other_pages_may_not_ask(taught: Running, headers: dict[str, Any]) -> None:
    assert (await asked(taught, STATE, None, headers)).status == 403
    assert (await asked(taught, PREDICT, png(), {**BINARY, **headers})).status == 403
    before = (await scrape(taught)).value("inflora_images_total", purpose="predict")
    assert before == 0
    ours = {"Host": "localhost:9464", "Origin": "http://localhost:9464", **BINARY}
    assert (await asked(taught, PREDICT, png(), ours)).status == 200


async def test_who_asks_is_asked_for_a_token(
    start: Callable[..., Any], settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    publish(settings.store, red=RED)
    running = await start(security=secure(tmp_path, entry("predict"), entry("learn")))
    assert (await asked(running, "/")).status == 200
    for value in (None, "Bearer wrong", "Bearer ", "Basic token-of-predict"):
        for path, body in ((STATE, None), (PREDICT, png())):
            reply = await asked(running, path, body, {"Authorization": value, **BINARY})
            assert (reply.status, reply.told["reason"]) == (401, "UNAUTHENTICATED")
            assert reply.headers["WWW-Authenticate"] == "Bearer"
    assert f"refused {STATE}" in caplog.text
    for role, told in {"predict": False, "learn": True}.items():
        found = await state(running, token=f"token-of-{role}")
        assert found["tasks"]["told"] is told
        assert found["server"]["version"] == 1
        headers = {**BINARY, "Authorization": f"Bearer token-of-{role}"}
        assert (await asked(running, PREDICT, png(), headers)).status == 200
    seen = await scrape(running)
    counted = {"service": "console", "code": "UNAUTHENTICATED"}
    for method in ("state", "predict"):
        assert seen.value("inflora_rpc_calls_total", method=method, **counted) == 4
        assert seen.value("inflora_rpc_in_flight", service="console", method=method) == 0


async def test_refused_before_anything_is_read(start: Callable[..., Any], tmp_path: Path) -> None:
    """Who says that ten megabytes come, and sends none, is told at once."""
    running = await start(security=secure(tmp_path, entry("predict")))
    promised = {**BINARY, "Content-Length": str(10 * 2**20)}
    assert (await asked(running, PREDICT, b"", promised)).status == 401


@pytest.mark.parametrize("case", ["no token", "too large"])
async def test_who_sends_much_is_told_why_it_is_refused(
    start: Callable[..., Any], tmp_path: Path, case: str
) -> None:
    """Closed with bytes unread, a connection is reset, and the answer lost."""
    body = bytes(5 * 2**20)
    if case == "no token":
        running = await start(security=secure(tmp_path, entry("predict")))
    else:
        running = await start(limits=Limits(image_bytes=2**20))
    expected = 401 if case == "no token" else 413
    for _ in range(4):
        assert (await asked(running, PREDICT, body, BINARY)).status == expected


async def test_an_image_may_come_slowly(taught: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks without sending anything has been hung up on meanwhile."""
    monkeypatch.setattr(web, "REQUEST_SECONDS", 1.0)
    address = taught.server.http_address
    host, _, port = address.rpartition(":")
    image = png(GREEN)
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(
        f"POST {PREDICT} HTTP/1.1\r\nHost: {address}\r\nContent-Length: {len(image)}\r\n"
        "Content-Type: application/octet-stream\r\n\r\n".encode()
    )
    writer.write(image[:10])
    await writer.drain()
    silent, other = await asyncio.open_connection(host, int(port))
    other.write(b"GET /hea")
    assert await asyncio.wait_for(silent.read(), 30) == b""
    writer.write(image[10:])
    answer = await asyncio.wait_for(reader.read(), 30)
    assert b" 200 " in answer.splitlines()[0]
    for each in (other, writer):
        each.close()


async def test_a_server_that_wants_certificates(start: Callable[..., Any], tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    certificates = SecuritySettings(
        scene.server.cert, scene.server.key, scene.authority.ca, scene.certified
    )
    running = await start(security=certificates)
    for headers in ({}, {"Authorization": "Bearer token-of-admin"}):
        reply = await asked(running, STATE, None, headers)
        assert (reply.status, "--tls-client-ca" in reply.told["message"]) == (401, True)


async def test_quotas_and_limits_hold(
    start: Callable[..., Any], settings: Settings, tmp_path: Path
) -> None:
    publish(settings.store, red=RED)
    quotas = {"few": "calls_per_second = 0.001", "small": "bytes_per_second = 1024"}
    entries = [entry("predict", name, quota=quota) for name, quota in quotas.items()]
    running = await start(security=secure(tmp_path, *entries))
    for name in quotas:
        headers = {"Authorization": f"Bearer token-of-{name}"}
        assert (await asked(running, STATE, None, headers)).status == 200
        reply = await asked(running, STATE, None, headers)
        assert (reply.status, reply.told["reason"]) == (429, "QUOTA_EXCEEDED")
        assert int(reply.headers["Retry-After"]) >= 1
    limited = await start(
        limits=replace_limits(settings.limits, max_calls=1), store=tmp_path / "other"
    )
    watching = limited.learner.WatchTask(learner_pb.WatchTaskRequest(name="models/default/tasks/x"))
    with pytest.raises(Exception, match="NOT_FOUND"):
        await watching.read()
    # What has ended counts no more, the console's own questions among it.
    for _ in range(3):
        assert (await asked(limited, STATE)).status == 200


def replace_limits(limits: Limits, **changes: Any) -> Limits:
    return Limits.model_validate({**limits.model_dump(), **changes})


# -- predicting -----------------------------------------------------------------------------------


async def test_it_answers_as_the_api_does(taught: Running) -> None:
    answer = await taught.predictor.Predict(predictor_pb.PredictRequest(images=[png(GREEN)]))
    (theirs,) = answer.predictions
    mine = (await asked(taught, PREDICT, png(GREEN), BINARY)).told
    assert mine["version"] == 2
    assert [each["label"] for each in mine["scores"]] == [each.label for each in theirs.scores]
    shares = [each.probability for each in theirs.scores]
    assert [each["probability"] for each in mine["scores"]] == pytest.approx(shares)
    assert mine["novelty"] == pytest.approx(theirs.novelty)


async def test_figures_are_kept_of_who_may_learn(
    start: Callable[..., Any], settings: Settings, tmp_path: Path
) -> None:
    """Nobody else can have the server say that it has forgotten something, or has not."""
    publish(settings.store, red=RED)
    running = await start(security=secure(tmp_path, entry("predict"), entry("learn")))
    accuracies = {}
    for role in ("predict", "learn"):
        metadata = (("authorization", f"Bearer token-of-{role}"),)
        sent = messages([(png(RED), "red")])
        response = await running.evaluator.Evaluate(sent, metadata=metadata)
        assert response.evaluation.accuracy == 1
        seen = await scrape(running)
        accuracies[role] = len(seen.families["inflora_task_accuracy_ratio"].samples)
    assert accuracies == {"predict": 0, "learn": 1}


async def test_what_is_no_image(taught: Running) -> None:
    most = taught.settings.limits.image_bytes
    cases: list[tuple[bytes, dict[str, Any], int, str]] = [
        (b"no image", {}, 400, "images[0]"),
        (b"", {}, 400, "images[0]"),
        (png(), {"Content-Type": "text/plain"}, 400, "Content-Type"),
        (png(), {"Content-Type": None}, 400, "Content-Type"),
        (png(), {"Content-Length": "many"}, 400, "Content-Length"),
        (b"", {"Content-Length": None}, 400, "Content-Length"),
        (b"", {"Content-Length": str(most + 1)}, 413, "image"),
        (b"", {"Content-Length": "-1"}, 413, "image"),
    ]
    for body, headers, status, field in cases:
        reply = await asked(taught, PREDICT, body, {**BINARY, **headers})
        assert (reply.status, reply.told["field"]) == (status, field), headers


async def test_before_the_first_version_and_where_nothing_is_predicted(
    start: Callable[..., Any], settings: Settings, tmp_path: Path
) -> None:
    running = await start()
    assert (await asked(running, PREDICT, png(), BINARY)).status == 409
    told = await state(running)
    assert told["server"]["version"] is None
    assert all("inflora learn" in part for part in told["story"]["views"].values())
    await running.server.stop()
    learner = await start(role="learner")
    assert (await state(learner))["server"]["predicts"] is False
    assert (await asked(learner, PREDICT, png(), BINARY)).status == 409


# -- what is told ---------------------------------------------------------------------------------


async def test_only_what_is_new_is_sent(taught: Running) -> None:
    told = await state(taught)
    assert told["server"]["version"] == 2
    assert {"accuracy", "forgetting", "capacity", "interference", "lineage"} == set(
        told["story"]["views"]
    )
    assert "inflora evaluate" in told["story"]["views"]["forgetting"]
    assert (await state(taught, told["digest"]))["story"] is None

    examples = [(png(RED), "red"), (png(RED), "white"), (png(GREEN), "green")]
    await evaluate(taught, examples, version="models/default/versions/1")
    await evaluate(taught, examples[1:])
    more = await until(taught, lambda told: "+50.0" in str(told["story"]))
    # Of task 1, half of two images by version 1, and none of one by version 2.
    assert "50% of 2 images" in more["story"]["views"]["accuracy"]
    assert "0% of 1 images" in more["story"]["views"]["accuracy"]


async def test_a_task_on_its_way(running: Running, script: Script) -> None:
    script.hold("TRAINING")
    task = await running.learn({"blue": [png(BLUE)]}, display_name="<b>Monday</b>")
    await script.reached("TRAINING")
    told = await until(running, lambda told: bool(told["tasks"]["running"]))
    shown = told["tasks"]["running"]
    assert (shown["name"], shown["what"], shown["images"]) == ("<b>Monday</b>", "blue", 1)
    assert (shown["stage"], shown["epoch"], shown["epochs"]) == (
        "training",
        1,
        5,
    )
    assert 0 < shown["fraction"] < 1
    assert shown["left"]
    assert "&lt;b&gt;Monday" in told["tasks"]["table"]
    assert "<b>Monday" not in told["tasks"]["table"]
    script.release("TRAINING")
    await running.ended(task.name)
    told = await until(running, lambda told: not told["tasks"]["running"])
    assert "published" in told["tasks"]["table"]


async def test_progress_is_told_to_who_may_not_see_tasks(
    start: Callable[..., Any], script: Script, tmp_path: Path
) -> None:
    running = await start(security=secure(tmp_path, entry("predict"), entry("learn")))
    script.hold("TRAINING")
    metadata = (("authorization", "Bearer token-of-learn"),)
    accepted = await running.learner.LearnTask(
        iter(upload({"blue": [png(BLUE)]}, display_name="Monday")), metadata=metadata
    )
    await script.reached("TRAINING")
    told = await until(
        running, lambda told: told["tasks"]["running"] is not None, token="token-of-predict"
    )
    assert told["tasks"]["running"].keys() == {"fraction"}
    assert "Monday" not in json.dumps(told)
    script.release("TRAINING")
    request = learner_pb.WatchTaskRequest(name=accepted.task.name)
    stream = running.learner.WatchTask(request, metadata=metadata)
    assert [response.task.state async for response in stream]


async def test_names_of_purged_classes_are_gone(taught: Running) -> None:
    await evaluate(taught, [(png(GREEN), "green")])
    assert "green" in json.dumps(await state(taught))
    response = await taught.learner.ForgetClasses(
        learner_pb.ForgetClassesRequest(labels=["green"], purge=True)
    )
    await taught.ended(response.task.name)
    told = await until(taught, lambda told: told["server"]["version"] == 3)
    told = await until(taught, lambda told: "purged" in told["story"]["views"]["lineage"])
    assert "green" not in json.dumps(told)


@pytest.mark.parametrize("purge", [False, True])
async def test_what_is_forgotten_on_purpose_is_no_loss(taught: Running, purge: bool) -> None:
    right, wrong = [(png(RED), "red"), (png(WHITE), "white")], [(png(RED), "green")]
    await evaluate(taught, right + wrong)
    told = await until(taught, lambda told: "2 of 2 tasks measured" in str(told["story"]))
    assert "<b>50%</b>" in told["story"]["tiles"]
    task = taught.store.version(2).task
    forget = learner_pb.ForgetClassesRequest(labels=["green"], purge=purge)
    response = await taught.learner.ForgetClasses(forget)
    await taught.ended(response.task.name)
    told = await until(taught, lambda told: "1 of 1 tasks measured" in str(told["story"]))
    assert "<b>100%</b>" in told["story"]["tiles"]
    assert "2 forgotten classes" in told["story"]["views"]["interference"]
    assert "forgotten classes" not in told["story"]["views"]["accuracy"]
    assert "known classes" not in json.dumps(told)
    accuracy = (await scrape(taught)).families["inflora_task_accuracy_ratio"].samples
    assert [sample.labels["position"] for sample in accuracy] == ["1"]
    kept = {score.task for score in taught.server.tasks._records.scores()}
    assert (task in kept) is not purge


async def test_a_version_that_stands_in(start: Callable[..., Any], settings: Settings) -> None:
    publish(settings.store, red=RED)
    publish(settings.store, green=GREEN)
    damage(settings.store, 2, "head.safetensors")
    told = await state(await start())
    assert (told["server"]["version"], told["server"]["stands_in"]) == (1, True)
    assert "stands in" in told["story"]["views"]["lineage"]


async def test_what_cannot_be_read_leaves_the_rest(taught: Running) -> None:
    (taught.settings.store / "models" / "default" / "forgotten.json").write_text("{")
    told = await until(taught, lambda told: bool(told["trouble"]))
    assert "forgotten.json" in told["trouble"]
    assert told["server"]["version"] == 2


async def test_a_record_that_cannot_be_read_leaves_the_rest(taught: Running) -> None:
    task = await taught.learn({"blue": [png(BLUE)]})
    await taught.ended(task.name)
    path = taught.settings.store / "tasks.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("UPDATE tasks SET record = '{'")
        other.commit()
    told = await until(taught, lambda told: bool(told["trouble"]))
    assert "tasks.sqlite" in told["trouble"]
    assert told["tasks"]["table"] == ""
    assert told["story"]["views"]


async def test_a_loss_that_is_no_number_is_none(running: Running, script: Script) -> None:
    script.hold("TRAINING")
    task = await running.learn({"blue": [png(BLUE)]})
    await script.reached("TRAINING")
    (live,) = running.server.tasks._live.values()
    assert live.progress is not None
    live.progress = replace(live.progress, loss=math.nan)
    told = await until(running, lambda told: told["tasks"]["running"]["loss"] is None)
    assert told["tasks"]["running"]["stage"] == "training"
    script.release("TRAINING")
    await running.ended(task.name)


async def test_a_server_that_follows_another(start: Callable[..., Any], tmp_path: Path) -> None:
    url = (tmp_path / "shared").as_uri()
    learner = await start(role="learner", shared=url)
    task = await learner.learn({"red": [png(RED)], "green": [png(GREEN)]})
    await learner.ended(task.name)
    await learner.server.publisher.settled()
    predictor = await start(
        role="predictor", shared=url, store=tmp_path / "copy", poll_seconds=3600.0
    )
    await evaluate(predictor, [(png(RED), "red")])
    told = await until(predictor, lambda told: "100% of 1 images" in str(told["story"]))
    assert told["server"]["following"] == {"version": 1, "lag": 0}
    assert told["server"]["learns"] is False
    assert told["tasks"].pop("trouble") == ""
    assert told["tasks"] == {"told": True, "running": None, "queued": 0, "table": ""}
    assert (await asked(predictor, PREDICT, png(RED), BINARY)).told["version"] == 1


async def test_the_load_is_that_of_predictions(taught: Running) -> None:
    for _ in range(5):
        await taught.predictor.Predict(predictor_pb.PredictRequest(images=[png(), png()]))
    told = await until(taught, lambda told: told["load"]["calls"] > 0)
    load = told["load"]
    assert load["images"] == pytest.approx(2 * load["calls"])
    assert 0 < load["p50"] <= load["p99"]
    assert load["waiting"] == 0
    # The console's own questions are none of them.
    calls = (await scrape(taught)).value(
        "inflora_rpc_calls_total",
        service="inflora.v1.PredictorService",
        method="Predict",
        code="OK",
    )
    assert calls == 5


async def test_refusals_are_no_quick_answers(taught: Running) -> None:
    for _ in range(5):
        with pytest.raises(grpc.aio.AioRpcError, match="INVALID_ARGUMENT"):
            await taught.predictor.Predict(predictor_pb.PredictRequest(images=[b"no image"]))
    told = await until(taught, lambda told: told["load"]["failed"] > 0)
    load = told["load"]
    assert (load["calls"], load["p50"], load["p99"]) == (0, None, None)
    counted = {"service": "inflora.v1.PredictorService", "method": "Predict"}
    seen = await scrape(taught)
    assert seen.value("inflora_rpc_duration_seconds_count", **counted) == 5


async def test_a_server_that_starts_says_so(
    start: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        running = await start()
    assert f"console on http://{running.server.http_address}/" in caplog.text
