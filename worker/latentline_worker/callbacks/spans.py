"""The span of a try to deliver a callback, in the trace of its job."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from latentline.tracing import attributes_of, context_of

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer


@contextlib.contextmanager
def try_span(tracer: Tracer | None, taken: dict[str, Any]) -> Iterator[None]:
    """Around one try. The URL is not told: its path and query may hold the receiver's own secrets."""
    if tracer is None:
        yield
        return
    from opentelemetry.trace import SpanKind

    told = {**attributes_of(taken["record"]), "latentline.callback.event": taken["type"], "latentline.callback.try": taken["tries"]}
    parent = context_of(taken["record"].traceparent)
    with tracer.start_as_current_span("callback", parent, SpanKind.CLIENT, attributes=told, record_exception=False):
        yield


def note_outcome(tracer: Tracer | None, outcome: str, reason: str) -> None:
    """What came of the current try; of the reason only the status of an answer, as others may name the receiver."""
    if tracer is None:
        return
    from opentelemetry.trace import StatusCode, get_current_span

    span = get_current_span()
    span.set_attribute("latentline.callback.outcome", outcome)
    if status := re.fullmatch(r"status (\d{3})", reason):
        span.set_attribute("http.response.status_code", int(status[1]))
    if outcome != "delivered":
        span.set_status(StatusCode.ERROR)
