"""What an API process tells Prometheus: its requests, its listeners, and the fleet as the broker knows it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from latentline import records
from latentline.connection import connect
from latentline.errors import LatentlineError
from latentline.exporter import serve_metrics
from latentline.records import Overview
from latentline.settings import Settings

log = logging.getLogger(__name__)

LOOK_S = 5.0  # between two looks at the fleet; a scrape shows the newest and waits for none
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
STREAM = b"text/event-stream"


class ApiMetrics:
    """The metrics of one API process. No tenant, key, job or prompt is a label: their number has no bound."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        names = ("method", "route", "status")
        self.requests = Counter("latentline_http_requests", "Requests answered.", names, registry=self.registry)
        help_ = "Seconds until a request was answered; event streams are left out."
        self.seconds = Histogram("latentline_http_request_seconds", help_, ("route",), buckets=SECONDS, registry=self.registry)
        self.streams = Gauge("latentline_event_streams", "Event streams that are open.", registry=self.registry)


class Measured:
    """Middleware: counts and times requests by the route that answered them."""

    def __init__(self, app: ASGIApp, metrics: ApiMetrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, stream = time.perf_counter(), 500, False

        async def sent(message: Message) -> None:
            nonlocal status, stream
            if message["type"] == "http.response.start":
                status = message["status"]
                if any(name == b"content-type" and value.startswith(STREAM) for name, value in message.get("headers", ())):
                    stream = True
                    self._metrics.streams.inc()
            await send(message)

        try:
            await self._app(scope, receive, sent)
        finally:
            # The path of an unknown route has no bound; its template, known once the router has matched, has.
            path = getattr(scope.get("route"), "path", None)
            route = scope.get("root_path", "") + path if path else "(none)"
            self._metrics.requests.labels(_method(scope), route, status).inc()
            if stream:
                self._metrics.streams.dec()
            else:
                self._metrics.seconds.labels(route).observe(time.perf_counter() - began)


def _method(scope: Scope) -> str:
    """The method of a request; anything that is none is counted together, since clients may send any word."""
    return scope["method"] if scope["method"] in METHODS else "other"


class FleetMetrics(Collector):
    """The fleet as it was when it was last looked at, by a thread of its own.

    Every process of the API tells the same of the fleet: dashboards and alerts take the maximum, not the sum, over processes.
    """

    def __init__(self, settings: Settings) -> None:
        self._client = connect(settings.redis_url.get_secret_value())
        self._seen: Overview | None = None
        self._due = (0, 0.0)  # callbacks, and for how long the oldest has been
        self._up = False
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._look_on, name="fleet metrics", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()

    def look(self) -> None:
        """Look at the fleet once. While the broker is away, what was seen last stays."""
        try:
            # Callbacks are told here and not by the deliverer: one that does not run could not say that they are late.
            self._due = records.run(self._client, records.due_callbacks())
            self._seen = records.run(self._client, records.overview())
            self._up = True
        except LatentlineError as error:
            if self._up:
                log.warning("the fleet's metrics: %s", error.message)
            self._up = False

    def _look_on(self) -> None:
        while not self._stopped.is_set():
            self.look()
            self._stopped.wait(LOOK_S)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """As prometheus_client asks for it; nothing here waits for the broker."""
        yield GaugeMetricFamily("latentline_broker_up", "Whether the broker answered when the fleet was last looked at.", float(self._up))
        seen = self._seen
        if seen is None:
            return
        yield GaugeMetricFamily("latentline_running_jobs", "Jobs that workers hold.", seen.running)
        yield GaugeMetricFamily("latentline_dead_letters", "Jobs that failed for good, and unreadable messages.", seen.num_letters)
        due, oldest_due_s = self._due
        yield GaugeMetricFamily("latentline_callbacks_due", "Callbacks whose next try is due, counted up to 1000.", due)
        yield GaugeMetricFamily("latentline_callbacks_oldest_due_seconds", "For how long the oldest of them has been due.", oldest_due_s)
        waiting = GaugeMetricFamily("latentline_queued_jobs", "Jobs that wait.", labels=("model",))
        for model, number in seen.queued_by_model.items():
            waiting.add_metric((model,), number)
        yield waiting
        ages: dict[str, float] = dict.fromkeys(seen.queued_by_model, 0.0)
        for group in seen.waiting:
            ages[group.model] = max(ages.get(group.model, 0.0), group.oldest_s)
        oldest = GaugeMetricFamily("latentline_queue_oldest_seconds", "How long the oldest queued job has waited.", labels=("model",))
        for model, age in ages.items():
            oldest.add_metric((model,), age)
        yield oldest
        serving = GaugeMetricFamily("latentline_workers", "Workers that are alive, by the models that they serve.", labels=("model",))
        for model in ages:
            serving.add_metric((model,), sum(model in worker.models for worker in seen.workers))
        yield serving


def serve_api_metrics(settings: Settings) -> ApiMetrics:
    """Begin to serve this process's metrics and the fleet's; raises ConfigurationError when the port is taken."""
    metrics, fleet = ApiMetrics(), FleetMetrics(settings)
    metrics.registry.register(fleet)
    serve_metrics(settings, metrics.registry)
    fleet.start()
    return metrics
