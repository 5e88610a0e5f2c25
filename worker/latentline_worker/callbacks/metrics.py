"""What the deliverer of callbacks tells Prometheus."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from latentline.errors import LatentlineError
from latentline.records import Records

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


class OutboxMetrics(Collector):
    """The callbacks that are due, as they were when the outbox was last looked at."""

    def __init__(self, records: Records) -> None:
        self._records = records
        self._seen: tuple[int, float] | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._look_on, name="outbox metrics", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()

    def look(self) -> None:
        """Look once. While the broker is away, what was seen last stays."""
        try:
            self._seen = self._records.due_callbacks()
        except LatentlineError:
            return

    def _look_on(self) -> None:
        while not self._stopped.is_set():
            self.look()
            self._stopped.wait(LOOK_S)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """As prometheus_client asks for it; nothing here waits for the broker."""
        if self._seen:
            due, oldest_s = self._seen
            yield GaugeMetricFamily("latentline_callbacks_due", "Callbacks whose next try is due.", due)
            yield GaugeMetricFamily("latentline_callbacks_oldest_due_seconds", "For how long the oldest of them has been due.", oldest_s)
