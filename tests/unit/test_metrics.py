"""What processes tell Prometheus: counted where it happens, bounded in labels, and never waiting for the broker."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import fakeredis
import pytest
import torch
from prometheus_client import CollectorRegistry
from support.live_api import Live, live_api
from support.missing import missing
from support.shipped import FOLDER, alert_expressions, dashboard_expressions
from support.stubs import RunnerBench

from latentline import Settings, records, routing
from latentline.api.metrics import ApiMetrics, FleetMetrics
from latentline.errors import BrokerUnavailable, ConfigurationError, StoreUnavailable
from latentline.exporter import serve_metrics
from latentline.jobs import JobRequest, Status, resolve
from latentline.models import Working
from latentline.records import Records
from latentline.testing import MODEL
from latentline_worker.callbacks.metrics import CallbackMetrics
from latentline_worker.generate.metrics import EngineMetrics, JobMetrics

DOCS = Path(__file__).parents[2] / "docs"


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(name, labels)


@pytest.fixture
def client() -> fakeredis.FakeRedis:
    return fakeredis.FakeRedis(decode_responses=True)


# The API


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Live, CollectorRegistry]]:
    metrics = ApiMetrics()
    with live_api(monkeypatch, metrics=metrics) as live:
        yield live, metrics.registry


def test_requests_are_counted_by_the_route_that_answered(counted: tuple[Live, CollectorRegistry]) -> None:
    live, registry = counted
    job = live.submit(prompt="a secret cat", tenant="ann")
    for _ in range(3):
        live.http.get(f"/v1/jobs/{job['id']}")
    live.http.get("/v1/jobs/none")
    live.http.get("/somewhere/else")
    live.http.request("PROPFIND", "/v1/jobs")
    count = "latentline_http_requests_total"
    assert value(registry, count, method="GET", route="/v1/jobs/{job_id}", status="200") == 3
    assert value(registry, count, method="GET", route="/v1/jobs/{job_id}", status="404") == 1
    assert value(registry, count, method="GET", route="(none)", status="404") == 1
    assert value(registry, count, method="POST", route="/v1/jobs", status="202") == 1
    assert value(registry, "latentline_http_request_seconds_count", route="/v1/jobs/{job_id}") == 4
    labels = [text for metric in registry.collect() for sample in metric.samples for text in sample.labels.values()]
    assert "other" in labels and not any("cat" in text or "ann" in text or job["id"] in text for text in labels)


def test_streams_are_counted_while_they_are_open_and_not_timed(counted: tuple[Live, CollectorRegistry]) -> None:
    live, registry = counted
    job = live.submit()
    route = "/v1/jobs/{job_id}/events"
    with live.http.stream("GET", f"/v1/jobs/{job['id']}/events") as stream:
        lines = stream.iter_lines()
        next(lines)
        assert value(registry, "latentline_event_streams") == 1
        live.worker.run_all()
        list(lines)
    while value(registry, "latentline_http_requests_total", method="GET", route=route, status="200") is None:
        live.http.get("/healthz")  # the server notices the end of the stream on its own thread
    assert value(registry, "latentline_event_streams") == 0
    assert value(registry, "latentline_http_request_seconds_count", route=route) is None


def fleet(client: fakeredis.FakeRedis, monkeypatch: pytest.MonkeyPatch) -> tuple[FleetMetrics, CollectorRegistry]:
    monkeypatch.setattr("latentline.api.metrics.connect", lambda url: client)
    metrics, registry = FleetMetrics(Settings()), CollectorRegistry()
    registry.register(metrics)
    return metrics, registry


def test_the_fleet_is_told_as_it_was_last_seen(client: fakeredis.FakeRedis, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics, registry = fleet(client, monkeypatch)
    assert value(registry, "latentline_broker_up") == 0 and value(registry, "latentline_running_jobs") is None
    store = Records(client)
    store.announce("gpu-1", [MODEL])
    store.announce("gpu-2", [MODEL, MODEL.model_copy(update={"id": "other"})])
    store.heartbeat("gpu-1", Working())
    one = resolve(JobRequest.parse({"prompt": "a cat"}))
    records.run(client, records.submit([one, one], 600))
    store.bury("dead", "message", "no JSON")
    client.zadd(routing.due_callbacks_key(), {"late": 1, "later": 2, "not yet": 4e9})
    metrics.look()
    assert value(registry, "latentline_broker_up") == 1
    assert value(registry, "latentline_queued_jobs", model=MODEL.id) == 2 and value(registry, "latentline_queued_jobs", model="other") == 0
    assert value(registry, "latentline_workers", model=MODEL.id) == 2 and value(registry, "latentline_workers", model="other") == 1
    assert value(registry, "latentline_dead_letters") == 1
    assert value(registry, "latentline_callbacks_due") == 2
    assert (value(registry, "latentline_callbacks_oldest_due_seconds") or 0) > 1.7e9
    assert (value(registry, "latentline_queue_oldest_seconds", model=MODEL.id) or 0) >= 0
    monkeypatch.setattr("latentline.api.metrics.records.run", away)
    metrics.look()
    metrics._client = cast(Any, None)  # a scrape has no use for the broker, so it cannot wait for it
    assert value(registry, "latentline_broker_up") == 0 and value(registry, "latentline_queued_jobs", model=MODEL.id) == 2


def away(*_: Any) -> Any:
    raise BrokerUnavailable("the broker is away")


# Workers


def test_a_worker_counts_what_becomes_of_its_jobs(client: fakeredis.FakeRedis) -> None:
    bench = RunnerBench(Records(client), at_once=True)
    registry = bench.metrics.registry
    one = resolve(JobRequest.parse({"prompt": "a cat", "num_inference_steps": 4, "scheduler": "ddim"}))
    first, second = (record.id for record in records.run(client, records.submit([one, one], 600)) if not isinstance(record, Exception))
    bench.runner.run(first)
    assert value(registry, "latentline_jobs_total", model=MODEL.id, status="succeeded") == 1
    for phase in ("queued", "encoding", "denoising", "decoding", "uploading"):
        assert value(registry, "latentline_phase_seconds_count", phase=phase) == 1
    bench.store.problem = StoreUnavailable("the store is away")
    bench.runner.run(second)
    assert value(registry, "latentline_retries_total") == 1
    assert value(registry, "latentline_job_errors_total", code="store_unavailable") == 1
    assert value(registry, "latentline_fenced_commits_total") == 0


def test_a_result_that_came_too_late_is_counted(client: fakeredis.FakeRedis) -> None:
    bench = RunnerBench(Records(client), at_once=True)
    one = resolve(JobRequest.parse({"prompt": "a cat", "num_inference_steps": 4, "scheduler": "ddim"}))
    (record,) = records.run(client, records.submit([one], 600))
    upload = bench.runner._uploader.upload

    def lose_the_job(claim: Any, *more: Any) -> Any:
        client.hincrby(routing.job_key(claim.record.id), "token", 1)  # another worker has claimed it
        return upload(claim, *more)

    cast(Any, bench.runner._uploader).upload = lose_the_job
    bench.runner.run(cast(Any, record).id)
    assert value(bench.metrics.registry, "latentline_fenced_commits_total") == 1
    assert value(bench.metrics.registry, "latentline_jobs_total", model=MODEL.id, status=Status.SUCCEEDED.value) is None


def engine_registry() -> CollectorRegistry:
    engine = SimpleNamespace(
        num_steps=10, num_shared_steps=8, num_rows=60, num_texts=9, num_encoded=4, used_bytes=7, families={"a": 1},
        clock=SimpleNamespace(step_s=2.0, forward_s=1.9), memory=SimpleNamespace(usable=100), device=torch.device("cpu"),
    )  # fmt: skip
    registry = JobMetrics().registry
    registry.register(EngineMetrics(cast(Any, engine), lambda: 3, 16, lambda: {"a": 2, "b": 1}))
    return registry


def test_the_engines_counters_are_read_at_a_scrape() -> None:
    registry = engine_registry()
    wanted = {"worker_jobs": 3, "worker_capacity": 16, "steps_total": 10, "shared_steps_total": 8, "rows_total": 60, "texts_total": 9}
    assert {name: value(registry, f"latentline_{name}") for name in wanted} == wanted
    assert value(registry, "latentline_model_warm", model="a") == 1 and value(registry, "latentline_model_warm", model="b") == 0
    assert value(registry, "latentline_model_swaps_total", model="a") == 2


def test_a_taken_port_is_a_sentence() -> None:
    settings = Settings(metrics_port=0)
    assert serve_metrics(settings, CollectorRegistry()) is None
    refused = pytest.raises(ConfigurationError, match=r"LATENTLINE_METRICS_PORT: 127\.0\.0\.1:")
    with socket.create_server(("127.0.0.1", 0)) as taken, refused:
        serve_metrics(Settings(metrics_port=taken.getsockname()[1]), CollectorRegistry())


# What is shipped for Prometheus and Grafana


def served() -> set[str]:
    """The names of all samples that processes may serve."""
    registries = [engine_registry(), ApiMetrics().registry, CallbackMetrics().registry]
    names = {sample.name for registry in registries for metric in registry.collect() for sample in metric.samples}
    names |= {metric.name + end for registry in registries for metric in registry.collect() for end in ("", "_total", "_bucket", "_count")}
    client = fakeredis.FakeRedis(decode_responses=True)
    Records(client).announce("gpu-1", [MODEL])
    fleet = FleetMetrics.__new__(FleetMetrics)
    fleet._seen, fleet._up = records.run(client, records.overview()), True
    fleet._due = records.run(client, records.due_callbacks())
    return names | {metric.name for metric in fleet.collect()}


def test_alerts_dashboard_and_guides_name_metrics_that_exist() -> None:
    texts = [(FOLDER / "alerts.yaml").read_text(), *((DOCS / name).read_text() for name in ("runbook.md", "operating.md"))]
    used = set(re.findall(r"\blatentline_[a-z_]+", "\n".join([*dashboard_expressions(), *texts])))
    assert used and used <= served()


def test_each_alert_has_its_entry_in_the_runbook() -> None:
    alerts = list(alert_expressions())
    assert alerts and alerts == re.findall(r"^## (\w+)$", (DOCS / "runbook.md").read_text(), re.MULTILINE)


def test_promtool_finds_each_alert_firing_in_its_case() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        missing("promtool (Debian: prometheus)")
    for command in ("check rules alerts.yaml", "check config prometheus.example.yaml", "test rules alerts_test.yaml"):
        done = subprocess.run([promtool, *command.split()], cwd=FOLDER, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
    tested = set(re.findall(r"alertname: (\w+)", (FOLDER / "alerts_test.yaml").read_text()))
    assert tested == set(alert_expressions())
