"""A collector of traces on loopback: takes OTLP over HTTP, as Jaeger, Tempo and the OpenTelemetry collector do, and keeps the spans."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.context import Context, attach, detach
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from latentline.tracing import context_of

from .jobs import PATIENCE_S

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"  # of a client's own span
TRACE_ID, CLIENT_SPAN = TRACEPARENT.split("-")[1:3]


@dataclass(frozen=True)
class Span:
    """A span as it was received; ids in hexadecimal digits."""

    name: str
    service: str
    instance: str
    trace_id: str
    span_id: str
    parent_id: str
    links: tuple[tuple[str, str], ...]  # trace and span
    attributes: Mapping[str, Any]
    events: tuple[tuple[str, Mapping[str, Any]], ...]
    start_ns: int
    end_ns: int
    failed: bool

    @property
    def attempt(self) -> int:
        return int(self.attributes.get("latentline.attempt", 0))


class Collector:
    """Keeps every span that it is sent; ``raw`` holds the bytes of each request."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.raw: list[bytes] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                collector.raw.append(body)
                collector.spans += _read(body)
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        """Of processes that send their spans here, five times a second."""
        return {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{self._server.server_address[1]}",
            "OTEL_BSP_SCHEDULE_DELAY": "200",
            "NO_PROXY": "127.0.0.1",
        }

    def of(self, trace_id: str) -> list[Span]:
        """The spans of a trace, by their start."""
        return sorted((span for span in self.spans if span.trace_id == trace_id), key=lambda span: span.start_ns)

    def until(self, trace_id: str, enough: Callable[[list[Span]], Any], timeout_s: float = PATIENCE_S) -> list[Span]:
        """The spans of a trace once they are enough."""
        deadline = time.monotonic() + timeout_s
        while not enough(found := self.of(trace_id)):
            assert time.monotonic() < deadline, f"the trace has {[span.name for span in found]}"
            time.sleep(0.05)
        return found

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def collecting() -> Iterator[Collector]:
    collector = Collector()
    try:
        yield collector
    finally:
        collector.close()


@contextmanager
def in_trace(traceparent: str) -> Iterator[None]:
    """As an application that submits in a span of its own."""
    token = attach(context_of(traceparent) or Context())
    try:
        yield
    finally:
        detach(token)


def tree(spans: Sequence[Span]) -> str:
    """A trace as text: each span below its parent, with when it began and how long it took."""
    ids, first = {span.span_id for span in spans}, min(span.start_ns for span in spans)
    numbers = {span.span_id: span.attempt for span in spans}

    def lines(span: Span, depth: int) -> Iterator[str]:
        told = [span.service, *([f"attempt {span.attempt}", str(span.attributes["latentline.outcome"])] if span.attempt else [])]
        told += [f"follows attempt {numbers.get(linked, '?')}" for _, linked in span.links if span.attempt]
        name = "  " * depth + span.name
        yield f"{(span.start_ns - first) / 1e9:8.3f} {(span.end_ns - span.start_ns) / 1e9:8.3f}  {name:<24}{', '.join(told)}"
        for kind, attributes in span.events:
            yield " " * 19 + "  " * depth + f"  · {kind} " + " ".join(f"{key}={value}" for key, value in attributes.items())
        for child in spans:
            if child.parent_id == span.span_id:
                yield from lines(child, depth + 1)

    roots = [span for span in spans if span.parent_id not in ids]
    return "\n".join(["   start     took  span", *(line for root in roots for line in lines(root, 0))])


def _read(body: bytes) -> Iterator[Span]:
    for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
        about = _attributes(resource.resource.attributes)
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield Span(
                    name=span.name,
                    service=about["service.name"],
                    instance=about.get("service.instance.id", ""),
                    trace_id=span.trace_id.hex(),
                    span_id=span.span_id.hex(),
                    parent_id=span.parent_span_id.hex(),
                    links=tuple((link.trace_id.hex(), link.span_id.hex()) for link in span.links),
                    attributes=_attributes(span.attributes),
                    events=tuple((event.name, _attributes(event.attributes)) for event in span.events),
                    start_ns=span.start_time_unix_nano,
                    end_ns=span.end_time_unix_nano,
                    failed=span.status.code == span.status.STATUS_CODE_ERROR,
                )


def _attributes(found: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in found}
