"""The exporting of spans over OTLP and HTTP. Needs the extra ``traces``; nothing imports this module where no endpoint is configured."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import threading
from collections.abc import Mapping, Sequence

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_INSTANCE_ID, SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import Tracer

log = logging.getLogger(__name__)

VERSION = importlib.metadata.version("latentline")
CLOSE_S = 2.0  # how long the end of a process waits for spans that were not sent yet
# Who tells that spans are lost: the exporter of an endpoint that is away, the queue once it is full.
COMPLAINERS = ("opentelemetry.exporter.otlp.proto.http.trace_exporter", "opentelemetry.sdk._shared_internal")


class Traces:
    """The spans of one process: queued, sent in batches by a thread of their own, dropped while nobody takes them.

    Args:
        service: the service's name where neither ``OTEL_SERVICE_NAME`` nor ``OTEL_RESOURCE_ATTRIBUTES`` names it.
        instance: of the service.
        exporter: for tests; without it, OTLP over HTTP to where the ``OTEL_*`` variables say.
    """

    def __init__(self, service: str, instance: str, exporter: SpanExporter | None = None) -> None:
        self.provider = TracerProvider(resource=Resource.create(_resource(service, instance)), shutdown_on_exit=False)
        self.provider.add_span_processor(BatchSpanProcessor(exporter or ToldOnce(OTLPSpanExporter())))
        self.tracer: Tracer = self.provider.get_tracer("latentline", VERSION)

    def close(self) -> None:
        """Send what is queued, but wait no longer than ``CLOSE_S``: an endpoint that hangs must not keep a process from ending."""
        closing = threading.Thread(target=self.provider.shutdown, name="close traces", daemon=True)
        closing.start()
        closing.join(CLOSE_S)


def _resource(service: str, instance: str, variables: Mapping[str, str] = os.environ) -> dict[str, str]:
    named = variables.get("OTEL_SERVICE_NAME") or f"{SERVICE_NAME}=" in variables.get("OTEL_RESOURCE_ATTRIBUTES", "")
    return {SERVICE_INSTANCE_ID: instance, SERVICE_VERSION: VERSION, **({} if named else {SERVICE_NAME: service})}


class ToldOnce(SpanExporter):
    """An exporter that tells once that its endpoint takes nothing, with the reason, and once that it does again."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self._told = False
        for name in COMPLAINERS:
            logging.getLogger(name).addFilter(self._first)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._exporter.export(spans)
        if result is SpanExportResult.SUCCESS and self._told:
            self._told = False
            log.info("traces are taken again")
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()
        for name in COMPLAINERS:
            logging.getLogger(name).removeFilter(self._first)

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._exporter.force_flush(timeout_millis)

    def _first(self, record: logging.LogRecord) -> bool:
        first, self._told = not self._told, True
        return first
