"""What the deliverer of callbacks tells Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from latentline.records import Records
from latentline_worker.maintenance.service import Service

LOOK_S = 5.0  # between two looks at the outbox; a scrape shows the newest and waits for none
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


class OutboxMetrics(Service, Collector):
    """The callbacks that are due, as they were when the outbox was last looked at. While the broker is away, that stays."""

    def __init__(self, records: Records) -> None:
        super().__init__("outbox metrics", LOOK_S)
        self._records = records
        self._seen: tuple[int, float] | None = None

    def start(self) -> None:
        """Look at once; if that fails, the service does it later."""
        self._turn()
        super().start()

    def run_once(self) -> None:
        self._seen = self._records.due_callbacks()

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """As prometheus_client asks for it; nothing here waits for the broker."""
        if self._seen:
            due, oldest_s = self._seen
            yield GaugeMetricFamily("latentline_callbacks_due", "Callbacks whose next try is due.", due)
            yield GaugeMetricFamily("latentline_callbacks_oldest_due_seconds", "For how long the oldest of them has been due.", oldest_s)
