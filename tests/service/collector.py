"""A real OpenTelemetry collector, as far as it takes spans in."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc


@dataclass(frozen=True)
class Span:
    """A span as it arrived.

    Attributes:
        process: ``service.name`` of the process that it is from.
        name: What it is called.
        trace: Id of its trace.
        id: Its own.
        parent: That of the span above it; "" without one.
        kind: Its kind, for example ``SPAN_KIND_SERVER``.
        attributes: Those of its attributes that are strings or integers.
        text: All of it, to be searched.
    """

    process: str
    name: str
    trace: str
    id: str
    parent: str
    kind: str
    attributes: dict[str, Any] = field(compare=False)
    text: str = field(compare=False, repr=False)


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps all spans that arrive.

    Attributes:
        endpoint: Where, as ``OTEL_EXPORTER_OTLP_ENDPOINT`` has it.
    """

    def __init__(self) -> None:
        self.endpoint = ""
        self._spans: list[Span] = []
        self._arrived = threading.Condition()

    def Export(self, request: pb.ExportTraceServiceRequest, context: Any) -> Any:
        with self._arrived:
            for resource in request.resource_spans:
                names = {a.key: a.value.string_value for a in resource.resource.attributes}
                for scope in resource.scope_spans:
                    self._spans += [_span(names["service.name"], each) for each in scope.spans]
            self._arrived.notify_all()
        return pb.ExportTraceServiceResponse()

    @property
    def environment(self) -> dict[str, str]:
        """What makes a process export to this, soon."""
        return {"OTEL_EXPORTER_OTLP_ENDPOINT": self.endpoint, "OTEL_BSP_SCHEDULE_DELAY": "50"}

    def spans(self, *names: str, timeout: float = 30.0) -> list[Span]:
        """Return all spans once there is one of each of these names."""

        def all_there() -> bool:
            return set(names) <= {span.name for span in self._spans}

        with self._arrived:
            assert self._arrived.wait_for(all_there, timeout), [s.name for s in self._spans]
            return list(self._spans)


@contextmanager
def collecting() -> Iterator[Collector]:
    """Run a collector."""
    server = grpc.server(ThreadPoolExecutor(2))
    collector = Collector()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    collector.endpoint = f"http://127.0.0.1:{port}"
    server.start()
    try:
        yield collector
    finally:
        server.stop(1).wait()


def _span(process: str, span: Any) -> Span:
    values = {a.key: a.value.string_value or a.value.int_value for a in span.attributes}
    kind = span.SpanKind.Name(span.kind)
    ids = (span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex())
    return Span(process, span.name, *ids, kind, values, str(span))
