"""Traces with OpenTelemetry, where the environment asks for them. No torch.

The variables are those of every OpenTelemetry program (``OTEL_TRACES_EXPORTER``,
``OTEL_EXPORTER_OTLP_ENDPOINT``, ``OTEL_TRACES_SAMPLER``, ...). Without one of them nothing is
imported, and the packages (the extra ``traces``) need not be installed.

The trace of a task begins at the client that uploads it. What the server knows of it, a W3C
``traceparent``, is kept in the task's record, for a task outlives the call that brought it, and
goes to the worker with the command to learn it.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from inflora_core.errors import InfloraError
from inflora_core.model import Stage

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

log = logging.getLogger(__name__)

OnStage = Callable[[Stage], None]
"""Is told which stage begins; the one before ends."""

_NAME = "inflora"


def wanted(environment: Mapping[str, str] | None = None) -> bool:
    """Whether the environment asks for traces."""
    env = os.environ if environment is None else environment
    if env.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    if exporter := env.get("OTEL_TRACES_EXPORTER", "").strip():
        return exporter != "none"
    return any(
        env.get(f"OTEL_EXPORTER_OTLP_{name}ENDPOINT", "").strip() for name in ("", "TRACES_")
    )


def traceparent() -> str:
    """Return the present span as a W3C ``traceparent``; "" if there is none."""
    # Only what is imported already: without traces, this is all that they cost.
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None:
        return ""
    span = trace.get_current_span().get_span_context()
    if not span.is_valid:
        return ""
    return f"00-{span.trace_id:032x}-{span.span_id:016x}-{span.trace_flags:02x}"


class Tracing:
    """Makes and exports the spans of this process, until it is closed.

    Args:
        provider: Makes them.

    Attributes:
        provider: The same, for instrumentation by others.
    """

    def __init__(self, provider: TracerProvider) -> None:
        self.provider = provider
        self._tracer = provider.get_tracer(_NAME)

    def close(self) -> None:
        """Export what is left."""
        self.provider.shutdown()

    def interceptor(self, methods: Collection[str]) -> Any:
        """Return the standard interceptor for a server of ``grpc.aio``.

        Args:
            methods: Those that are traced, ``/service/method``.

        Raises:
            InfloraError: its package is not installed.
        """
        try:
            from opentelemetry.instrumentation.grpc import aio_server_interceptor
        except ImportError as error:
            raise InfloraError(f"install inflora-server[traces] to trace calls: {error}") from error
        return aio_server_interceptor(  # type: ignore[no-untyped-call]
            tracer_provider=self.provider, filter_=lambda details: details.method in methods
        )

    @contextmanager
    def task(self, kind: str, task: str, parent: str) -> Iterator[OnStage]:
        """A span for work on a task, with one for each of its stages.

        Args:
            kind: What is done with it, ``learn`` or ``edit``.
            task: Its id.
            parent: ``traceparent`` of the call that brought it; "" begins a trace.

        Yields:
            What to tell of the stages. An open one ends with the task.
        """
        from opentelemetry.trace import Span, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        context = TraceContextTextMapPropagator().extract({"traceparent": parent})
        attributes = {"inflora.task.id": task, "inflora.task.kind": kind}
        stage: Span | None = None

        def on_stage(began: Stage) -> None:
            nonlocal stage
            if stage is not None:
                stage.end()
            stage = self._tracer.start_span(f"stage {began.value.lower()}")

        with self._tracer.start_as_current_span(
            f"task {kind}",
            context,
            attributes=attributes,
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                yield on_stage
            except Exception as error:
                reason = error.reason if isinstance(error, InfloraError) else type(error).__name__
                for failed in (span, stage):
                    if failed is not None:
                        failed.set_status(Status(StatusCode.ERROR))
                        failed.set_attribute("error.type", reason)
                raise
            finally:
                if stage is not None:
                    stage.end()


def begin(process: str) -> Tracing | None:
    """Begin to trace this process, if the environment asks for it.

    Args:
        process: Which of our processes this is; ``service.name`` unless the environment has one.
    """
    if not wanted():
        return None
    try:
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        log.warning(
            "OTEL_… asks for traces; install inflora-server[traces] to have them: %s", error
        )
        return None
    resource = Resource.create()
    own = {f"{_NAME}.process": process}
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        own[SERVICE_NAME] = f"{_NAME}-{process}"  # what the environment says holds
    provider = TracerProvider(resource=resource.merge(Resource(own)), shutdown_on_exit=False)
    for exporter in _exporters():
        provider.add_span_processor(BatchSpanProcessor(_discreet(exporter)))
    return Tracing(provider)


def _exporters() -> Iterator[SpanExporter]:
    """Yield the exporters that the environment names, as OpenTelemetry's own start-up finds them.

    Raises:
        InfloraError: there is none of that name.
    """
    for name in os.environ.get("OTEL_TRACES_EXPORTER", "otlp").split(","):
        asked = name.strip()
        if asked == "otlp":
            protocol = os.environ.get(
                "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL",
                os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
            )
            asked = "otlp_proto_grpc" if protocol == "grpc" else "otlp_proto_http"
        found = [*entry_points(group="opentelemetry_traces_exporter", name=asked)]
        if not found:
            known = sorted(entry_points(group="opentelemetry_traces_exporter").names)
            raise InfloraError(
                f"OTEL_TRACES_EXPORTER names {asked!r}, which is not installed; "
                f"there are: {', '.join(known)}"
            )
        yield found[0].load()()


def _discreet(exporter: SpanExporter) -> SpanExporter:
    """Return an exporter that leaves out what may quote names of classes.

    The standard instrumentation writes the messages of errors into spans, and our messages name
    the classes that they are about. Codes and kinds of errors stay.
    """
    from opentelemetry.sdk.trace import Event, ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
    from opentelemetry.trace import Status

    def without_words(span: ReadableSpan) -> ReadableSpan:
        events = [
            Event(
                event.name,
                {
                    name: value
                    for name, value in (event.attributes or {}).items()
                    if name == "exception.type"
                },
                event.timestamp,
            )
            for event in span.events
        ]
        return ReadableSpan(
            name=span.name,
            context=span.get_span_context(),
            parent=span.parent,
            resource=span.resource,
            attributes=span.attributes,
            events=events,
            links=span.links,
            kind=span.kind,
            status=Status(span.status.status_code),
            start_time=span.start_time,
            end_time=span.end_time,
            instrumentation_scope=span.instrumentation_scope,
        )

    class Discreet(SpanExporter):
        """Passes on all but words."""

        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            """Export spans."""
            return exporter.export([without_words(span) for span in spans])

        def shutdown(self) -> None:
            """End the other exporter."""
            exporter.shutdown()

        def force_flush(self, timeout_millis: int = 30_000) -> bool:
            """Have the other exporter export what it holds back."""
            return exporter.force_flush(timeout_millis)

    return Discreet()
