"""Metrics: what is exported is what is documented, and says what has happened."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import signal
import sqlite3
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram

from inflora.v1 import learner_service_pb2 as learner_pb
from inflora.v1 import model_service_pb2 as model_pb
from inflora.v1 import predictor_service_pb2 as pb
from inflora_core.model import TaskState
from inflora_service import metrics
from inflora_service.evaluations import Evaluations
from inflora_service.lineage import Lineage
from inflora_service.metrics import METRICS, OTHER, Distribution, Metric
from inflora_service.server import METHODS, Settings
from tests.service.conftest import BLUE, GREEN, RED, WHITE, Running, Script, png
from tests.service.scraping import scrape
from tests.service.test_bad_input import publish
from tests.service.test_evaluating import evaluate
from tests.service.test_restarting import damage

DOCS = Path(__file__).parents[2] / "docs" / "observability.md"

PREDICTOR = {"service": "inflora.v1.PredictorService", "method": "Predict"}


@pytest.fixture
async def running(start: Callable[..., Any], settings: Settings) -> Running:
    """A server with two versions."""
    publish(settings.store, red=RED, white=WHITE)
    publish(settings.store, green=GREEN)
    running: Running = await start()
    return running


async def predict(running: Running, *images: bytes) -> None:
    await running.predictor.Predict(pb.PredictRequest(images=images))


def exported(metric: Metric) -> tuple[str, str, str]:
    """Return a metric as a parser has its family."""
    return metric.name.removesuffix("_total"), metric.kind, metric.help


async def test_what_is_exported_is_what_is_listed(running: Running, script: Script) -> None:
    await predict(running, png())
    await evaluate(running, [(png(), "red")])
    script.hold("TRAINING")
    task = await running.learn({"blue": [png(BLUE)]})
    await script.reached("TRAINING")
    seen = await scrape(running)
    ours = {
        (family.name, family.type, family.documentation)
        for family in seen.families.values()
        if family.name.startswith("inflora_") and not family.name.startswith("inflora_worker_p")
    }
    assert ours == {exported(metric) for metric in METRICS}
    samples = {metric: seen.families[exported(metric)[0]].samples for metric in METRICS}
    absent = {metric for metric, found in samples.items() if not found}
    assert absent == {metrics.FOLLOW_VERSION, metrics.FOLLOW_LAG}, "it follows nobody"
    for metric, found in samples.items():
        for sample in found:
            assert sample.labels.keys() - {"le"} == set(metric.labels), sample
    script.release("TRAINING")
    await running.ended(task.name)


def table() -> str:
    """Return what the documentation has to say of the metrics."""
    rows = ["| metric | type | labels | |", "|---|---|---|---|"]
    for metric in METRICS:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        rows.append(f"| `{metric.name}` | {metric.kind} | {labels} | {metric.help} |")
    return "\n".join(rows)


def test_the_documentation_has_them_all() -> None:
    found = re.search(r"<!-- metrics: .* -->\n(.*?)\n<!-- /metrics -->", DOCS.read_text(), re.S)
    assert found is not None
    assert found[1] == table(), f"put this into {DOCS.name}:\n{table()}"


async def test_calls_are_counted(running: Running) -> None:
    for _ in range(3):
        await predict(running, png(), png(GREEN))
    for images in ([], [b"no image"]):
        with pytest.raises(grpc.aio.AioRpcError):
            await predict(running, *images)
    for method in ("/inflora.v1.PredictorService/Guess", "/anything/else"):
        with pytest.raises(grpc.aio.AioRpcError):
            await running.channel.unary_unary(method)(b"")
    await running.serving()  # a probe is not counted
    seen = await scrape(running)
    calls = {
        (*(sample.labels[name] for name in ("service", "method", "code")),): sample.value
        for sample in seen.families["inflora_rpc_calls"].samples
    }
    predicting = tuple(PREDICTOR.values())
    assert calls == {
        (*predicting, "OK"): 3,
        (*predicting, "INVALID_ARGUMENT"): 2,
        (OTHER, OTHER, "OK"): 0,
        (OTHER, OTHER, "UNIMPLEMENTED"): 2,
    }
    assert seen.value("inflora_rpc_in_flight", **PREDICTOR) == 0
    assert seen.value("inflora_rpc_duration_seconds_count", **PREDICTOR) == 5
    assert seen.value("inflora_images_total", purpose="predict") == 6
    assert seen.value("inflora_predict_batch_images_sum") == 6
    runs = seen.value("inflora_predict_batch_images_count")
    assert runs == seen.value("inflora_predict_run_seconds_count")
    assert seen.value("inflora_predict_waiting_images") == 0


async def test_a_call_that_is_under_way_and_one_that_is_given_up(
    running: Running, script: Script
) -> None:
    watching = {"service": "inflora.v1.LearnerService", "method": "WatchTask"}
    script.hold("TRAINING")
    task = await running.learn({"blue": [png(BLUE)]})
    await script.reached("TRAINING")
    stream = running.learner.WatchTask(learner_pb.WatchTaskRequest(name=task.name))
    await stream.read()
    assert (await scrape(running)).value("inflora_rpc_in_flight", **watching) == 1
    stream.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stream.read()
    while (seen := await scrape(running)).value("inflora_rpc_in_flight", **watching):
        pass  # it is for the server to hear of it
    assert seen.value("inflora_rpc_calls_total", code="CANCELLED", **watching) == 1
    script.release("TRAINING")
    await running.ended(task.name)
    slow = running.learner.WatchTask(learner_pb.WatchTaskRequest(name=task.name))
    assert [message.task.name async for message in slow] == [task.name]
    assert (await scrape(running)).value("inflora_rpc_calls_total", code="OK", **watching) == 2


async def test_a_task_on_its_way(running: Running, script: Script) -> None:
    script.hold("TRAINING")
    task = await running.learn({"blue": [png(BLUE)]})
    await script.reached("TRAINING")
    seen = await scrape(running)
    assert seen.value("inflora_tasks", state="LEARNING") == 1
    assert seen.value("inflora_tasks", state="PUBLISHED") == 0
    assert seen.value("inflora_task_progress_ratio") == pytest.approx(2 / 8)
    assert seen.value("inflora_tasks_queued_limit") == 3
    assert seen.value("inflora_worker_up") == 1
    assert seen.value("inflora_worker_restarts_total") == 0
    assert (seen.value("inflora_worker_process_resident_memory_bytes") or 0) > 0
    swaps = seen.value("inflora_swap_seconds_count")

    script.kill(signal.SIGKILL)
    await script.reached("TRAINING")
    assert (await scrape(running)).value("inflora_worker_restarts_total") == 1
    script.release("TRAINING")
    await running.ended(task.name)
    seen = await scrape(running)
    for state in TaskState:
        assert seen.value("inflora_tasks", state=state.value) == (state is TaskState.PUBLISHED)
    assert seen.value("inflora_tasks_ended_total", state="PUBLISHED") == 1
    assert seen.value("inflora_tasks_ended_total", state="FAILED") == 0
    assert seen.value("inflora_task_progress_ratio") is None
    assert seen.value("inflora_task_stage_seconds_sum", stage="TRAINING") == 1.5
    assert seen.value("inflora_task_stage_seconds_count", stage="DECODING") == 1
    assert (seen.value("inflora_version"), seen.value("inflora_classes")) == (3, 4)
    assert seen.value("inflora_swap_seconds_count") == (swaps or 0) + 1


async def test_what_was_learned(running: Running) -> None:
    seen = await scrape(running)
    assert seen.value("inflora_leak_ratio") == 1e-7
    assert seen.value("inflora_interference_ratio") == 0.25
    assert seen.value("inflora_capacity_ratio", layers="least") == 0.75
    assert seen.value("inflora_capacity_ratio", layers="mean") == 0.75
    assert seen.value("inflora_versions_kept") == 2
    assert seen.value("inflora_answering") == 1
    provider = seen.value("inflora_provider_info", provider="CPUExecutionProvider")
    assert provider == 1
    assert not seen.families["inflora_task_accuracy_ratio"].samples

    examples = [(png(RED), "red"), (png(RED), "white"), (png(GREEN), "green"), (png(), "puce")]
    await evaluate(running, examples, version="models/default/versions/1")
    assert not (await scrape(running)).families["inflora_task_accuracy_ratio"].samples
    await evaluate(running, examples)
    seen = await scrape(running)
    accuracy = seen.families["inflora_task_accuracy_ratio"].samples
    assert {(s.labels["position"], s.labels["source"]): s.value for s in accuracy} == {
        ("1", "evaluated"): 0.5,
        ("2", "evaluated"): 1.0,
    }
    assert seen.value("inflora_images_total", purpose="evaluate") == 8
    for family in seen.families.values():
        for sample in family.samples:
            assert not {"red", "white", "green", "puce"} & set(sample.labels.values())


async def test_the_accuracy_of_old_versions_is_that_of_their_tasks(
    start: Callable[..., Any], settings: Settings
) -> None:
    """Of the newest tasks, by their place in the whole line."""
    for number in range(5):
        publish(settings.store, **{f"class {number}": (number, 0, 0)})
    running = await start()
    await evaluate(running, [(png((n, 0, 0)), f"class {n}") for n in range(5)])
    promote = model_pb.PromoteVersionRequest(name="models/default/versions/3")
    await running.model.PromoteVersion(promote)
    accuracy = (await scrape(running)).families["inflora_task_accuracy_ratio"].samples
    assert [sample.labels["position"] for sample in accuracy] == ["1", "2", "3"]
    # What was found outlives the server.
    await running.server.stop()
    running = await start()
    assert (await scrape(running)).families["inflora_task_accuracy_ratio"].samples == accuracy


async def test_a_version_that_stands_in(start: Callable[..., Any], settings: Settings) -> None:
    publish(settings.store, red=RED)
    publish(settings.store, green=GREEN)
    damage(settings.store, 2, "head.safetensors")
    seen = await scrape(await start())
    found = [seen.value(f"inflora_{name}") for name in ("answering", "version", "stand_in")]
    assert found == [1, 1, 1]


async def test_a_server_that_has_learned_nothing(start: Callable[..., Any]) -> None:
    seen = await scrape(await start())
    found = [seen.value(f"inflora_{name}") for name in ("answering", "version", "stand_in")]
    assert found == [0, 0, 0]
    assert seen.value("inflora_leak_ratio") is None
    assert seen.value("inflora_versions_kept") == 0


async def test_the_disk(running: Running) -> None:
    seen = await scrape(running)
    root = running.settings.store
    found = {
        kind: seen.value("inflora_store_bytes", kind=kind) or 0
        for kind in ("models", "backbones", "records", "spool", "other")
    }
    versions = sum(p.stat().st_size for p in (root / "models").rglob("*") if p.is_file())
    assert found["models"] >= versions > 0
    assert min(found["backbones"], found["records"], found["other"]) > 0
    assert found["spool"] == 0
    assert (seen.value("inflora_disk_free_bytes") or 0) > 0
    assert seen.value("inflora_disk_needed_bytes") == running.server.tasks._space.needed()


async def test_what_cannot_be_read_leaves_the_rest(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    with contextlib.closing(sqlite3.connect(running.settings.store / "tasks.sqlite")) as records:
        records.execute("ALTER TABLE tasks RENAME TO others")
    seen = await scrape(running)  # in two formats
    assert not seen.families["inflora_tasks"].samples
    assert seen.value("inflora_version") == 2
    assert (await scrape(running)).value("inflora_scrape_faults_total") >= 2
    assert "cannot be read" in caplog.text
    with contextlib.closing(sqlite3.connect(running.settings.store / "tasks.sqlite")) as records:
        records.execute("ALTER TABLE others RENAME TO tasks")


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, 4.0, 5.0]) | st.floats(0, 10)))
def test_a_distribution_is_a_histogram_of_prometheus(values: list[float]) -> None:
    bounds = (0.5, 1.0, 2.0, 4.0)
    registry = CollectorRegistry()
    theirs, ours = Histogram("h", "h", buckets=bounds, registry=registry), Distribution(bounds)
    for value in values:
        theirs.observe(value)
        ours.add(value)
    buckets, total = ours.read()
    assert total == registry.get_sample_value("h_sum")
    for bound, count in buckets:
        assert count == registry.get_sample_value("h_bucket", {"le": bound})


def test_what_takes_long_to_find_out_is_fresh_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, found = [0.0], itertools.count()

    def find() -> int:
        clock[0] += 10.0
        return next(found)

    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    fresh = metrics.Fresh(find, 1.0)
    assert [fresh.value(), fresh.value()] == [0, 0]
    clock[0] += 1.5
    assert fresh.value() == 1


def test_every_method_has_a_label_of_its_own() -> None:
    assert "/inflora.v1.PredictorService/Predict" in METHODS
    assert "/inference.GRPCInferenceService/ModelInfer" in METHODS
    assert not [method for method in METHODS if method.startswith("/grpc.")]


async def test_a_server_that_follows_another(running: Running) -> None:
    """It need not have tasks, nor a worker."""
    registry = metrics.new_registry()
    sources = metrics.Sources(
        running.store,
        running.server.tasks._space,
        running.settings.limits,
        running.server.host,
        Lineage(running.store),
        Evaluations(),
        following=lambda: metrics.Following(3, 1.5),
    )
    metrics.watch(registry, sources)
    found = registry.get_sample_value
    assert found("inflora_follow_version") == 3
    assert found("inflora_follow_lag_seconds") == 1.5
    assert found("inflora_version") == 2
    assert found("inflora_tasks", {"state": "QUEUED"}) is None
    assert found("inflora_worker_up") is None
    assert found("inflora_scrape_faults_total") == 0
