"""What the deliverer of callbacks tells Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

OUTCOMES = ("delivered", "pending", "failed", "refused", "gone")
SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 15)


class CallbackMetrics:
    """Counts tries by their outcome. No URL, tenant or job is a label: their number has no bound."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.outcomes = Counter("latentline_callbacks", "Tries to deliver a callback.", ("outcome",), registry=self.registry)
        for outcome in OUTCOMES:
            self.outcomes.labels(outcome)  # there from the start, so that a rate has a zero to begin with
        self.seconds = Histogram("latentline_callback_seconds", "Seconds of one try.", buckets=SECONDS, registry=self.registry)
