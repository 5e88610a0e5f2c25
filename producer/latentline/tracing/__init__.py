"""Traces of jobs (OpenTelemetry), where an endpoint for them is configured: ``OTEL_EXPORTER_OTLP_ENDPOINT``.

A job's record keeps the W3C ``traceparent`` of the span in which it was submitted; whatever worker takes the job, and the process
that delivers its callbacks, continue that trace. This module imports nothing of OpenTelemetry until a process opens its traces.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Link

    from latentline.jobs import JobRecord

    from .export import Traces

log = logging.getLogger(__name__)

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_TRACEPARENT = re.compile(r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})")


def open_traces(role: str, instance: str, variables: Mapping[str, str] = os.environ) -> Traces | None:
    """Begin to export this process's spans, as the ``OTEL_*`` variables say; None where they ask for none.

    Args:
        role: ``latentline-ROLE`` is the service's name unless the variables name it.
        instance: which of the role's processes this is.
    """
    endpoint = next((variables[name] for name in ENDPOINTS if variables.get(name)), None)
    off = variables.get("OTEL_SDK_DISABLED", "").strip().lower() == "true" or variables.get("OTEL_TRACES_EXPORTER", "").strip() == "none"
    if endpoint is None or off:
        return None
    protocol = next((variables[name] for name in PROTOCOLS if variables.get(name)), "http/protobuf")
    if protocol != "http/protobuf":
        log.warning("no traces: OTEL_EXPORTER_OTLP_PROTOCOL: got %r; allowed: http/protobuf (port 4318 of most collectors)", protocol)
        return None
    if not re.match(r"https?://[^/\s]", endpoint):
        log.warning("no traces: OTEL_EXPORTER_OTLP_ENDPOINT: got %r; allowed: http://HOST:PORT or https://HOST:PORT", endpoint)
        return None
    try:
        from .export import Traces
    except ModuleNotFoundError as error:
        log.warning("no traces: %s is not installed: pip install 'latentline[traces]'", error.name)
        return None
    return Traces(f"latentline-{role}", instance)


def traceparent_of(context: Any) -> str:
    """A span's context as W3C text; empty where there is no span."""
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}" if context.is_valid else ""


def current_traceparent() -> str:
    """The ``traceparent`` of the span in which the caller runs, be it ours or an application's own; empty without one."""
    span = _current_span()
    return traceparent_of(span.get_span_context()) if span else ""


def trace_id_of(traceparent: str) -> str:
    """The trace's id in a ``traceparent``; empty where it holds none."""
    found = _TRACEPARENT.fullmatch(traceparent)
    return found[1] if found else ""


def context_of(traceparent: str) -> Context | None:
    """For a span whose parent is told by a ``traceparent``; None where that tells of none. Only while traces are open."""
    from opentelemetry.trace import NonRecordingSpan, set_span_in_context

    span_context = _span_context(traceparent)
    return set_span_in_context(NonRecordingSpan(span_context)) if span_context else None


def link_to(traceparent: str) -> tuple[Link, ...]:
    """A link to the span that a ``traceparent`` names, if it names one. Only while traces are open."""
    from opentelemetry.trace import Link

    span_context = _span_context(traceparent)
    return (Link(span_context),) if span_context else ()


def _span_context(traceparent: str) -> Any:
    from opentelemetry.trace import SpanContext, TraceFlags

    found = _TRACEPARENT.fullmatch(traceparent)
    return SpanContext(int(found[1], 16), int(found[2], 16), is_remote=True, trace_flags=TraceFlags(int(found[3], 16))) if found else None


def attributes_of(record: JobRecord) -> dict[str, str | int]:
    """What spans tell of a job: no words of its prompts, and nothing of its tenant."""
    request = record.request
    found: dict[str, str | int | None] = {
        "latentline.job.id": record.id,
        "latentline.model": request.model,
        "latentline.steps": record.num_steps,
        "latentline.width": request.width,
        "latentline.height": request.height,
        "latentline.images": request.num_images,
    }
    return {name: value for name, value in found.items() if value is not None}


def note_job(record: JobRecord) -> None:
    """Tell the current span, if there is one, which job it is about, with a link to the job's own trace where that is another."""
    span = _current_span()
    if span and span.is_recording():
        span.set_attributes(attributes_of(record))
        if trace_id_of(record.traceparent) != f"{span.get_span_context().trace_id:032x}":
            for link in link_to(record.traceparent):
                span.add_link(link.context)


def note_batch(num_jobs: int) -> None:
    """Tell the current span, if there is one, how many jobs it submits."""
    if span := _current_span():
        span.set_attribute("latentline.jobs", num_jobs)


def _current_span() -> Any:
    api: Any = sys.modules.get("opentelemetry.trace")  # where it was not imported, there is no span
    return api.get_current_span() if api else None
