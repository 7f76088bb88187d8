"""Spans: when there are any, what they hang from, and what they must not say."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from inflora_core import tracing
from inflora_core.errors import InfloraError, InvalidInputError
from inflora_core.model import Progress, Stage
from inflora_core.progress import Tracker
from inflora_core.tracing import Tracing

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
UNSAMPLED = PARENT[:-1] + "0"


@pytest.fixture
def spans() -> InMemorySpanExporter:
    """Where spans are exported to."""
    return InMemorySpanExporter()


@pytest.fixture
def traces(spans: InMemorySpanExporter) -> Tracing:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(tracing._discreet(spans)))
    return Tracing(provider)


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, False),
        ({"OTEL_SERVICE_NAME": "x"}, False),
        ({"OTEL_TRACES_EXPORTER": "console"}, True),
        ({"OTEL_TRACES_EXPORTER": "none"}, False),
        ({"OTEL_TRACES_EXPORTER": ""}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:4317"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://localhost:4317"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_TRACES_EXPORTER": "none"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_SDK_DISABLED": "True"}, False),
    ],
)
def test_when_there_are_traces(environment: Mapping[str, str], wanted: bool) -> None:
    assert tracing.wanted(environment) is wanted


def test_without_the_packages_there_are_none(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "console")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    assert tracing.begin("server") is None
    assert "inflora-server[traces]" in caplog.text


def test_an_exporter_that_there_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "carrier-pigeon")
    with pytest.raises(InfloraError, match=r"carrier-pigeon.*console"):
        tracing.begin("server")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "inflora-worker"),
        ({"OTEL_SERVICE_NAME": "shop"}, "shop"),
        ({"OTEL_RESOURCE_ATTRIBUTES": "service.name=shop"}, "shop"),
    ],
)
def test_what_a_process_is_called(
    monkeypatch: pytest.MonkeyPatch, environment: Mapping[str, str], expected: str
) -> None:
    for name, value in {"OTEL_TRACES_EXPORTER": "console", **environment}.items():
        monkeypatch.setenv(name, value)
    begun = tracing.begin("worker")
    assert begun is not None
    try:
        attributes = begun.provider.resource.attributes
        assert attributes["service.name"] == expected
        assert attributes["inflora.process"] == "worker"
    finally:
        begun.close()


def test_a_task_is_below_the_call_that_brought_it(
    traces: Tracing, spans: InMemorySpanExporter
) -> None:
    inside = ""
    with traces.task("learn", "a-task", PARENT) as on_stage:
        inside = tracing.traceparent()
        tracker = Tracker(on_stage=on_stage)
        for stage in (Stage.DECODING, Stage.TRAINING, Stage.PUBLISHING):
            tracker.start(stage)
    found = {span.name: span for span in spans.get_finished_spans()}
    assert list(found) == ["stage decoding", "stage training", "stage publishing", "task learn"]
    task = found.pop("task learn")
    assert dict(task.attributes or {}) == {
        "inflora.task.id": "a-task",
        "inflora.task.kind": "learn",
    }
    for span, parent in ((task, PARENT), *((each, inside) for each in found.values())):
        assert span.parent is not None
        assert f"00-{span.parent.trace_id:032x}-{span.parent.span_id:016x}-01" == parent
        assert span.context.trace_id == int(PARENT.split("-")[1], 16)
    assert tracing.traceparent() == ""


@pytest.mark.parametrize("parent", ["", "nonsense", PARENT, UNSAMPLED])
def test_what_a_task_hangs_from(traces: Tracing, spans: InMemorySpanExporter, parent: str) -> None:
    with traces.task("edit", "a-task", parent):
        pass
    found = spans.get_finished_spans()
    if parent == UNSAMPLED:
        assert not found, "who began the trace does not want it"
    elif parent == PARENT:
        assert found[0].parent is not None
    else:
        assert found[0].parent is None


def test_errors_are_codes_without_words(traces: Tracing, spans: InMemorySpanExporter) -> None:
    tulip = InvalidInputError("there are too few images of 'tulip'", field="examples")

    def learn() -> None:
        with traces.task("learn", "a-task", "") as on_stage:
            Tracker(on_stage=on_stage).start(Stage.TRAINING)
            raise tulip

    with pytest.raises(InvalidInputError):
        learn()
    tracer = traces.provider.get_tracer("another")
    with pytest.raises(InvalidInputError), tracer.start_as_current_span("as others do"):
        raise tulip
    found = spans.get_finished_spans()
    assert len(found) == 3
    for span in found:
        assert span.status.status_code is StatusCode.ERROR
        assert "tulip" not in span.to_json()
    assert {(s.attributes or {}).get("error.type") for s in found} == {"INVALID_INPUT", None}
    (event,) = found[2].events
    assert dict(event.attributes or {}) == {
        "exception.type": "inflora_core.errors.InvalidInputError"
    }


def test_a_tracker_tells_of_stages_before_it_can_be_stopped(
    traces: Tracing, spans: InMemorySpanExporter
) -> None:
    def give_up(progress: Progress) -> None:
        raise InfloraError("given up")

    with pytest.raises(InfloraError), traces.task("learn", "a-task", "") as on_stage:
        Tracker(give_up, on_stage).start(Stage.DECODING)
    assert [span.name for span in spans.get_finished_spans()] == ["stage decoding", "task learn"]


PROGRAM = """
import sys
from inflora_core import logs, tracing
import inflora_service.server, inflora_service.__main__
assert tracing.begin("server") is None
assert tracing.traceparent() == ""
sys.exit(sum(name.startswith("opentelemetry") for name in sys.modules))
"""


def test_nothing_is_imported_where_nothing_is_traced() -> None:
    environment: dict[str, Any] = {"PATH": "", "PYTHONPATH": ":".join(sys.path)}
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr


def test_a_log_names_the_span(traces: Tracing) -> None:
    from tests.core.test_logs import line

    with traces.task("learn", "a-task", PARENT):
        read = line("x", exc_info=None)
        assert PARENT.split("-")[1] == read["trace_id"]
        assert tracing.traceparent().split("-")[2] == read["span_id"]
    assert "trace_id" not in line("x", exc_info=None)
