"""Calls as spans: below those of their clients, kept with tasks, and without a word of images."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from opentelemetry.instrumentation.grpc import (
    GrpcAioInstrumentorClient,
    GrpcInstrumentorClient,
    aio_client_interceptors,
)
from opentelemetry.sdk.trace import TracerProvider

from inflora.v1 import predictor_service_pb2 as pb
from inflora_client import AsyncClient, Client
from inflora_core import tracing
from inflora_service.server import Settings
from tests.service.collector import Collector, collecting
from tests.service.conftest import GREEN, RED, Running, Script, png
from tests.service.test_bad_input import publish

LEARN = "/inflora.v1.LearnerService/LearnTask"
PREDICT = "/inflora.v1.PredictorService/Predict"


@pytest.fixture
def collector() -> Iterator[Collector]:
    """Where spans go."""
    with collecting() as collector:
        yield collector


@pytest.fixture
async def running(
    collector: Collector,  # the first, so that it outlives the server
    start: Callable[..., Any],
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> Running:
    """A server that is traced, with a version."""
    publish(settings.store, red=RED)
    for name, value in collector.environment.items():
        monkeypatch.setenv(name, value)
    running: Running = await start()
    return running


def sampled(traceparent: str) -> tuple[str, str]:
    """Return trace and span of a ``traceparent`` that wants to be recorded."""
    version, trace, span, flags = traceparent.split("-")
    assert (version, int(flags, 16) & 1) == ("00", 1)
    return trace, span


async def test_calls_are_below_those_of_their_clients(
    running: Running, collector: Collector
) -> None:
    provider = TracerProvider(shutdown_on_exit=False)
    tracer = provider.get_tracer("a test")
    interceptors = aio_client_interceptors(tracer_provider=provider)
    async with grpc.aio.insecure_channel(
        running.server.address, interceptors=interceptors
    ) as channel:
        client = Running(running.server, channel, running.settings)
        with tracer.start_as_current_span("an application"):
            trace = tracing.traceparent().split("-")[1]
            await client.predictor.Predict(pb.PredictRequest(images=[png()]))
            task = await client.learn({"green": [png(GREEN)]})
    await running.ended(task.name)
    await running.serving()
    spans = await asyncio.to_thread(collector.spans, PREDICT, LEARN)
    calls = {span.name: span for span in spans if span.trace == trace}
    assert calls.keys() == {PREDICT, LEARN}
    for span in calls.values():
        assert (span.process, span.kind) == ("inflora-server", "SPAN_KIND_SERVER")
        assert span.parent, "it is below the client's"
        assert span.attributes["rpc.grpc.status_code"] == 0
    kept = (await running.server.tasks.get(task.name.rpartition("/")[2])).task.traceparent
    assert sampled(kept) == (trace, calls[LEARN].id)
    assert not [span.name for span in spans if "Health" in span.name]


async def test_the_worker_is_told_where_its_task_belongs(
    running: Running, script: Script, collector: Collector
) -> None:
    task = await running.learn({"green": [png(GREEN)]})
    await running.ended(task.name)
    (span,) = [s for s in await asyncio.to_thread(collector.spans, LEARN) if s.name == LEARN]
    told = {sampled(command["traceparent"]) for command in script.commands if command}
    assert told == {(span.trace, span.id)}


async def test_errors_do_not_tell_names(running: Running, collector: Collector) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await running.learn({"tulip": [b"no image"], "tulip ": [png()]})
    assert refused.value.code() is not grpc.StatusCode.OK
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await running.predictor.Predict(
            pb.PredictRequest(images=[png()], task="models/default/tasks/tulip")
        )
    assert "tulip" in str(caught.value.details()), "the client is told"
    spans = await asyncio.to_thread(collector.spans, PREDICT, LEARN)
    assert {span.attributes["rpc.grpc.status_code"] for span in spans} >= {
        caught.value.code().value[0]
    }
    assert not [span.text for span in spans if "tulip" in span.text or "PNG" in span.text]


async def test_without_the_variables_there_are_none(start: Callable[..., Any]) -> None:
    running = await start()
    task = await running.learn({"green": [png(GREEN)]})
    ended = await running.ended(task.name)
    record = await running.server.tasks.get(ended.name.rpartition("/")[2])
    assert record.task.traceparent == ""


async def test_our_clients_can_be_traced(running: Running) -> None:
    """The standard instrumentation makes other things of calls than grpc does."""
    task = await running.learn({"green": [png(GREEN)]})
    await running.ended(task.name)

    def use() -> list[Any]:
        with Client(running.server.address) as client:
            watched = [seen.state.value for seen in client.watch(task.name)]
            answers = [*client.predict_stream([[png()], [png(GREEN)]])]
            again = client.learn([(png(), "red")])
            return [*watched, len(answers), client.wait(again).state.value]

    instrumentors = GrpcInstrumentorClient(), GrpcAioInstrumentorClient()
    for each in instrumentors:
        each.instrument()
    try:
        assert await asyncio.to_thread(use) == ["PUBLISHED", 2, "PUBLISHED"]
        async with AsyncClient(running.server.address) as client:
            assert [seen.state.value async for seen in client.watch(task.name)] == ["PUBLISHED"]
            assert (await client.predict([png()])).predictions[0].label == "red"
    finally:
        for each in instrumentors:
            each.uninstrument()
