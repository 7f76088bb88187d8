"""Health for those who have neither certificate nor token, and connections that end in time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from inflora.v1 import predictor_service_pb2 as predictor_pb
from inflora.v1 import predictor_service_pb2_grpc
from inflora_service import __main__, probe
from inflora_service.errors import Context
from inflora_service.health import Health
from inflora_service.server import CURRENT, LEARNER, MODEL, PREDICTOR, Settings
from tests.service.conftest import RED, Running, png
from tests.service.test_bad_input import publish


@pytest.fixture
async def probed(start: Callable[..., Any]) -> Running:
    running: Running = await start(health_port=0)
    return running


def address_of(running: Running) -> str:
    address = running.server.health_address
    assert address is not None
    return address


async def ask(running: Running, service: str = "") -> str:
    return await asyncio.to_thread(probe.ask, address_of(running), service, 30.0)


async def test_a_server_without_versions_is_ready_to_learn_and_not_to_predict(
    probed: Running,
) -> None:
    """What start-up and liveness, the learner's readiness and a predictor's readiness ask for."""
    answers = {name: await ask(probed, name) for name in ("", MODEL, LEARNER, PREDICTOR, CURRENT)}
    assert answers == {
        "": "SERVING",
        MODEL: "SERVING",
        LEARNER: "SERVING",
        PREDICTOR: "NOT_SERVING",
        CURRENT: "SERVING",
    }


async def test_a_damaged_current_version_takes_no_pod_away(
    start: Callable[..., Any], settings: Settings
) -> None:
    publish(settings.store, red=RED)
    publish(settings.store, red=RED, blue=(0, 0, 255))
    head = settings.store / "models/default/versions/00000002/head.safetensors"
    head.write_bytes(head.read_bytes()[:-1] + b"!")
    running = await start(health_port=0)
    assert await ask(running, PREDICTOR) == await ask(running) == "SERVING"
    assert await ask(running, CURRENT) == "NOT_SERVING"


async def test_nothing_but_health_can_be_asked(probed: Running) -> None:
    async with grpc.aio.insecure_channel(address_of(probed)) as channel:
        stub = predictor_service_pb2_grpc.PredictorServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Predict(predictor_pb.PredictRequest(images=[png()]))
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_it_says_that_the_server_is_going_while_calls_still_run(
    start: Callable[..., Any], settings: Settings
) -> None:
    publish(settings.store, red=RED)
    running = await start(health_port=0)
    states = health_pb2.HealthCheckResponse
    request = predictor_pb.PredictStreamRequest(request=predictor_pb.PredictRequest(images=[png()]))
    stream = running.predictor.PredictStream()
    await stream.write(request)
    assert (await stream.read()).response.predictions
    seen = running.health.Watch(health_pb2.HealthCheckRequest(service=PREDICTOR))
    assert (await seen.read()).status == states.SERVING
    stopping = asyncio.create_task(running.server.stop())
    assert (await seen.read()).status == states.NOT_SERVING
    assert await ask(running, PREDICTOR) == "NOT_SERVING"
    seen.cancel()
    await stream.write(request)
    assert (await stream.read()).response.predictions
    await stream.done_writing()
    await stopping


async def test_calls_that_stay_open_take_no_probe_away(probed: Running) -> None:
    async with grpc.aio.insecure_channel(address_of(probed)) as channel:
        watches = [
            health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            for _ in range(64)
        ]
        codes = [await each.code() for each in watches]
    assert set(codes) == {grpc.StatusCode.UNIMPLEMENTED}
    assert await ask(probed) == "SERVING"


async def test_who_reads_nothing_keeps_no_state_as_it_was() -> None:
    """gRPC's own servicer waits for such a one with a lock that every change takes."""
    health = Health()
    health.set("", serving=True)
    unread = health.Watch(health_pb2.HealthCheckRequest(), cast(Context, None))
    assert (await anext(unread)).status == health_pb2.HealthCheckResponse.SERVING
    for serving in (False, True, False):
        health.set("", serving=serving)
    health.end()
    health.set("", serving=True)
    assert health.of("") is False
    assert (await anext(unread)).status == health_pb2.HealthCheckResponse.NOT_SERVING
    await unread.aclose()


@pytest.mark.parametrize(
    ("address", "service", "status"),
    [
        ("", "", 0),
        ("", PREDICTOR, 1),
        ("", "inflora.v1.NoSuchService", 1),
        ("localhost:1", "", 1),
    ],
)
async def test_the_probe_says_so_by_its_exit_status(
    probed: Running,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    address: str,
    service: str,
    status: int,
) -> None:
    arguments = ["probe", address or address_of(probed), "--service", service, "--timeout", "30"]
    monkeypatch.setattr("sys.argv", arguments)
    assert await asyncio.to_thread(probe.main) == status
    assert (capsys.readouterr().out == "SERVING\n") is (status == 0)


async def test_a_connection_ends_with_its_age_and_no_call_does(
    start: Callable[..., Any], settings: Settings
) -> None:
    publish(settings.store, red=RED)
    running = await start(max_connection_age_seconds=0.2)
    states = grpc.ChannelConnectivity
    reconnected = 0
    # A stream that began on the first connection outlives it, and several after it.
    request = predictor_pb.PredictRequest(images=[png()])
    stream = running.predictor.PredictStream()
    await stream.write(predictor_pb.PredictStreamRequest(request=request))
    assert (await stream.read()).response.predictions
    while reconnected < 3:
        state = running.channel.get_state(try_to_connect=True)
        if state is states.READY:
            await running.predictor.Predict(request)
            await running.channel.wait_for_state_change(state)
            reconnected += 1
        else:
            await running.channel.wait_for_state_change(state)
    await stream.write(predictor_pb.PredictStreamRequest(request=request))
    assert (await stream.read()).response.predictions
    await stream.done_writing()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--backbone", "", "name a backbone"),
        ("--backbone", "  ", "name a backbone"),
        ("--max-connection-age-seconds", "-1", "invalid"),
        ("--max-connection-age-seconds", "nan", "invalid"),
        ("--health-port", "-1", "no port"),
    ],
)
def test_values_that_are_refused_at_once(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, option: str, value: str, message: str
) -> None:
    monkeypatch.setattr("sys.argv", ["inflora_service", f"{option}={value}"])
    with pytest.raises(SystemExit):
        __main__.main()
    said = capsys.readouterr().err
    assert option in said
    assert message in said
