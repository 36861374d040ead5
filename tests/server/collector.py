"""A collector of OpenTelemetry traces: takes OTLP over HTTP as a real one does, and keeps the spans."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

PATIENCE_S = 20.0


@dataclass(frozen=True)
class Span:
    name: str
    trace: str
    id: str
    parent: str
    """Empty where it has none."""
    start: int
    end: int
    """Nanoseconds of the clock, as `start`."""
    failed: bool
    attributes: dict[str, Any]
    links: list[str]
    """Ids of the spans that it is linked to."""
    resource: dict[str, Any]


@dataclass
class Collector:
    url: str = ""
    raw: bytes = b""
    """All that was ever sent."""
    spans: list[Span] = field(default_factory=list)
    arrived: threading.Condition = field(default_factory=threading.Condition)

    def take(self, raw: bytes) -> None:
        request = ExportTraceServiceRequest.FromString(raw)
        with self.arrived:
            self.raw += raw
            for sent in request.resource_spans:
                resource = _values(sent.resource.attributes)
                self.spans += [_span(one, resource) for scope in sent.scope_spans for one in scope.spans]
            self.arrived.notify_all()

    def until(self, condition: Callable[[list[Span]], object]) -> list[Span]:
        """The spans so far, once there are those that the test waits for."""
        with self.arrived:
            enough = self.arrived.wait_for(lambda: condition(self.spans), PATIENCE_S)
            assert enough, [each.name for each in self.spans]
            return list(self.spans)


def children(spans: list[Span], parent: Span) -> list[Span]:
    """Its children, the earliest first."""
    return sorted((each for each in spans if each.parent == parent.id), key=lambda each: each.start)


def _span(sent: Any, resource: dict[str, Any]) -> Span:
    return Span(
        sent.name, sent.trace_id.hex(), sent.span_id.hex(), sent.parent_span_id.hex(),
        sent.start_time_unix_nano, sent.end_time_unix_nano, sent.status.code == sent.status.STATUS_CODE_ERROR,
        _values(sent.attributes), [link.span_id.hex() for link in sent.links], resource,
    )  # fmt: skip


def _values(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}


@contextlib.contextmanager
def collecting() -> Iterator[Collector]:
    """A collector on a port of its own."""
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            collector.take(self.rfile.read(int(self.headers["content-length"])))
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(200)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *values: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        collector.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, name="collector")
        thread.start()
        try:
            yield collector
        finally:
            server.shutdown()
            thread.join(PATIENCE_S)
