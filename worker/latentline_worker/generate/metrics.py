"""What a worker tells Prometheus: the jobs that it ended, and the engine's own counters as they are at a scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from latentline.jobs import JobRecord, Status
from latentline_worker.engine.engine import Engine

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)
PHASES = ("encoding", "denoising", "decoding", "uploading")


class JobMetrics:
    """Counts what becomes of jobs. No tenant, job or prompt is a label: their number has no bound."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._ended = Counter("latentline_jobs", "Jobs that this worker ended.", ("model", "status"), registry=self.registry)
        self._errors = Counter("latentline_job_errors", "Errors, also of tries that were not the last.", ("code",), registry=self.registry)
        self._phases = Histogram("latentline_phase_seconds", "Seconds by phase.", ("phase",), buckets=SECONDS, registry=self.registry)
        self.retries = Counter("latentline_retries", "Jobs that were queued again after an error.", registry=self.registry)
        self.fenced = Counter("latentline_fenced_commits", "Results refused since another worker holds the job.", registry=self.registry)
        self._checkpoints = Counter("latentline_checkpoints", "Checkpoints written.", registry=self.registry)
        self._checkpoint_bytes = Counter("latentline_checkpoint_bytes", "Bytes of checkpoints written.", registry=self.registry)

    def ended(self, record: JobRecord, status: Status, timings: Mapping[str, float]) -> None:
        """A job has ended.

        Args:
            record: as it was when it was claimed.
        """
        self._ended.labels(record.request.model, status.value).inc()
        if record.started_at:
            self._phases.labels("queued").observe(max(0.0, record.started_at - record.created_at))
        for phase in PHASES:
            if f"{phase}_s" in timings:
                self._phases.labels(phase).observe(timings[f"{phase}_s"])

    def failed(self, code: str) -> None:
        """A try has failed with this code."""
        self._errors.labels(code).inc()

    def checkpoint(self, num_bytes: int) -> None:
        """A checkpoint was written."""
        self._checkpoints.inc()
        self._checkpoint_bytes.inc(num_bytes)


class EngineMetrics(Collector):
    """Reads the engine's counters when Prometheus asks; nothing is counted for it while steps run.

    Args:
        jobs: how many jobs the worker holds now.
        capacity: how many it may hold.
        swaps: how often each model was loaded again.
    """

    def __init__(self, engine: Engine, jobs: Callable[[], int], capacity: int, swaps: Callable[[], Mapping[str, int]]) -> None:
        self._engine, self._jobs, self._capacity, self._swaps = engine, jobs, capacity, swaps

    def collect(self) -> Iterator[Metric]:
        """As prometheus_client asks for it."""
        engine = self._engine
        yield GaugeMetricFamily("latentline_worker_jobs", "Jobs that the worker holds.", self._jobs())
        yield GaugeMetricFamily("latentline_worker_capacity", "Jobs that it may hold.", self._capacity)
        yield CounterMetricFamily("latentline_steps", "Forwards of the network.", engine.num_steps)
        yield CounterMetricFamily("latentline_shared_steps", "Those that advanced two jobs or more.", engine.num_shared_steps)
        yield CounterMetricFamily("latentline_rows", "Rows of all forwards.", engine.num_rows)
        yield CounterMetricFamily("latentline_step_seconds", "Seconds in steps.", engine.clock.step_s)
        yield CounterMetricFamily("latentline_forward_seconds", "Seconds of them in the network's forward.", engine.clock.forward_s)
        yield CounterMetricFamily("latentline_texts", "Texts of jobs that began to denoise.", engine.num_texts)
        yield CounterMetricFamily("latentline_texts_encoded", "Texts encoded; the others were cached.", engine.num_encoded)
        yield GaugeMetricFamily("latentline_memory_limit_bytes", "What the engine may use beside the weights.", engine.memory.usable)
        yield GaugeMetricFamily("latentline_memory_used_bytes", "Slots, texts and adapters.", engine.used_bytes)
        warm = GaugeMetricFamily("latentline_model_warm", "Whether a model is in memory.", labels=("model",))
        loads = CounterMetricFamily("latentline_model_swaps", "How often a model was loaded again.", labels=("model",))
        resident = set(engine.families)
        swaps = self._swaps()
        for model in sorted(resident | swaps.keys()):
            warm.add_metric((model,), float(model in resident))
            loads.add_metric((model,), swaps.get(model, 0))
        yield warm
        yield loads
