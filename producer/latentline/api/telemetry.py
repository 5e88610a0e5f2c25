"""Which requests have a span: those that make or cancel jobs. FastAPI makes the spans itself; polls, lists and streams have none."""

from __future__ import annotations

import re
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

from fastapi.telemetry import TelemetryConfig

if TYPE_CHECKING:
    from latentline.tracing.export import Traces

_ID = "[0-9a-f-]{36}"
TRACED = re.compile(
    rf"/v1/jobs(/batch|/{_ID}/cancel)?|/v1/dead/[^/]+/replay|/openai/v1/images/generations"
    rf"|/replicate/v1/(models/[^/]+/[^/]+/)?predictions|/replicate/v1/predictions/{_ID}/cancel|/sdapi/v1/(txt2img|interrupt)"
)


def telemetry(traces: Traces | None) -> TelemetryConfig:
    """For :class:`fastapi.FastAPI`. Nothing else is told: its logs would hold the messages of exceptions."""
    return {
        "tracing": traces is not None,
        "tracer_provider": traces.provider if traces else None,
        "metrics": False,
        "logs": False,
        "operation_spans": False,
        "auto_configure": False,
        "exclude": untraced,
    }


def untraced(scope: MutableMapping[str, Any]) -> bool:
    """Whether a request has no span. One with a query has none: the span would hold it, and these requests have no use for it."""
    return scope.get("method") != "POST" or bool(scope.get("query_string")) or not TRACED.fullmatch(scope["path"])
