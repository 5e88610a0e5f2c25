"""Traces: which requests have a span, what the spans of an attempt and of a callback tell, and that they can do no harm."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fakeredis
import httpx
import pytest
from fastapi import FastAPI
from opentelemetry import trace
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.routing import Mount
from support.collector import CLIENT_SPAN, TRACE_ID, TRACEPARENT
from support.live_api import Live, live_api
from support.receiver import Receiver
from support.stubs import PATIENCE_S, RunnerBench

from latentline import Settings, records
from latentline.addresses import CallbackRule, parse_networks, parse_ports
from latentline.api.app import create_app
from latentline.api.telemetry import TRACED, untraced
from latentline.errors import BrokerUnavailable
from latentline.jobs import JobRecord, JobRequest, resolve
from latentline.records import Records
from latentline.testing import FakeImages, FakeWorker
from latentline.timeline import Account
from latentline.tracing import context_of, current_traceparent, open_traces, trace_id_of
from latentline.tracing.export import CLOSE_S, Traces
from latentline.webhooks import generate_secret
from latentline_worker.callbacks.deliverer import Deliverer
from latentline_worker.generate.spans import AttemptSpans

ROOT = Path(__file__).parents[2]
PROMPT = "a very private prompt"
JOB = "00000000-0000-4000-8000-000000000000"


@pytest.fixture
def memory() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def traces(memory: InMemorySpanExporter) -> Iterator[Traces]:
    """Traces whose spans are in memory as soon as they end."""
    made = Traces("latentline-test", "one", InMemorySpanExporter())
    made.provider.add_span_processor(SimpleSpanProcessor(memory))
    yield made
    made.close()


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch, traces: Traces) -> Iterator[Live]:
    with live_api(monkeypatch, Settings(auth="none"), traces=traces) as live:
        yield live


def told(memory: InMemorySpanExporter) -> str:
    """All that the spans say."""
    return "\n".join(span.to_json() for span in memory.get_finished_spans())


def hex_ids(span: Any) -> tuple[str, str, str]:
    """Of a span: its trace, itself, its parent."""
    return f"{span.context.trace_id:032x}", f"{span.context.span_id:016x}", f"{span.parent.span_id:016x}" if span.parent else ""


def test_a_submission_has_a_span_in_the_clients_trace_whose_context_is_in_the_record(api: Live, memory: InMemorySpanExporter) -> None:
    answer = api.http.post("/v1/jobs", json={"prompt": PROMPT, "tenant": "secret-tenant"}, headers={"traceparent": TRACEPARENT})
    (span,) = memory.get_finished_spans()
    trace_id, span_id, parent = hex_ids(span)
    assert (span.name, trace_id, parent) == ("POST /v1/jobs", TRACE_ID, CLIENT_SPAN)
    assert span.attributes is not None and span.attributes["latentline.job.id"] == answer.json()["id"]
    assert span.attributes["http.response.status_code"] == 202
    record = records.run(api.worker.redis, records.get(answer.json()["id"]))
    assert record.traceparent == f"00-{TRACE_ID}-{span_id}-01"
    assert "traceparent" not in answer.text
    assert PROMPT not in told(memory) and "secret-tenant" not in told(memory)


@pytest.mark.parametrize("header", [None, "00-nonsense", f"ff-{TRACE_ID}-{CLIENT_SPAN}-01"])
def test_without_a_readable_traceparent_a_submission_begins_a_trace(api: Live, memory: InMemorySpanExporter, header: str | None) -> None:
    job = api.http.post("/v1/jobs", json={"prompt": PROMPT}, headers={"traceparent": header} if header else {}).json()
    (span,) = memory.get_finished_spans()
    assert span.parent is None and hex_ids(span)[0] != TRACE_ID
    assert trace_id_of(records.run(api.worker.redis, records.get(job["id"])).traceparent) == hex_ids(span)[0]


def test_the_head_of_a_trace_decides_whether_it_is_kept(api: Live, memory: InMemorySpanExporter) -> None:
    job = api.http.post("/v1/jobs", json={"prompt": PROMPT}, headers={"traceparent": f"{TRACEPARENT[:-2]}00"}).json()
    assert memory.get_finished_spans() == ()
    assert records.run(api.worker.redis, records.get(job["id"])).traceparent.endswith("-00"), "workers hear of it"


def test_a_sampler_of_the_environment_decides_where_no_client_has(monkeypatch: pytest.MonkeyPatch, memory: InMemorySpanExporter) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0")
    traces = Traces("latentline-test", "one", memory)
    with traces.tracer.start_as_current_span("a root") as span:
        assert not span.is_recording() and int(current_traceparent()[-2:], 16) & 1 == 0
    assert traces.tracer.start_span("of a client", context_of(TRACEPARENT)).is_recording()
    traces.close()


def test_a_cancel_and_a_repeated_submission_link_to_the_trace_of_the_job(api: Live, memory: InMemorySpanExporter) -> None:
    body = {"prompt": PROMPT, "idempotency_key": "once"}
    job = api.http.post("/v1/jobs", json=body, headers={"traceparent": TRACEPARENT}).json()
    api.http.post("/v1/jobs", json=body)
    api.http.post(f"/v1/jobs/{job['id']}/cancel")
    first, *others = memory.get_finished_spans()
    assert first.links == () and len(others) == 2
    for span in others:
        assert hex_ids(span)[0] != TRACE_ID
        assert [link.context.span_id for link in span.links] == [first.context.span_id]


def test_a_batch_and_every_dialect_make_jobs_of_their_requests_trace(api: Live, memory: InMemorySpanExporter) -> None:
    model = api.worker.model.id
    headers = {"traceparent": TRACEPARENT}
    api.http.post("/v1/jobs/batch", json={"jobs": [{"prompt": PROMPT}, {"prompt": ""}, {"prompt": PROMPT}]}, headers=headers)
    body = {"version": f"latentline/{model}", "input": {"prompt": PROMPT}}
    assert api.http.post("/replicate/v1/predictions", json=body, headers=headers).status_code == 201
    found, _ = records.run(api.worker.redis, records.list_jobs())
    assert len(found) == 3 and {trace_id_of(record.traceparent) for record in found} == {TRACE_ID}
    batch, prediction = memory.get_finished_spans()
    assert (batch.name, (batch.attributes or {})["latentline.jobs"]) == ("POST /v1/jobs/batch", 3)
    assert prediction.name == "POST /replicate/v1/predictions"


def test_what_only_reads_has_no_span(api: Live, memory: InMemorySpanExporter) -> None:
    job_id = api.submit()["id"]
    api.worker.run_all()
    memory.clear()
    paths = (
        "/healthz", "/readyz", "/", "/v1/jobs", f"/v1/jobs/{job_id}", f"/v1/jobs/{job_id}?wait=1", f"/v1/jobs/{job_id}/timeline",
        f"/v1/jobs/{job_id}/images/0", f"/v1/jobs/{job_id}/events", f"/v1/events?jobs={job_id}", "/v1/models", "/v1/fleet",
        "/openai/v1/models", "/replicate/v1/predictions", f"/replicate/v1/predictions/{job_id}", "/sdapi/v1/progress", "/openapi.json",
    )  # fmt: skip
    for path in paths:
        assert api.http.get(path, headers={"traceparent": TRACEPARENT}).status_code == 200, path
    assert api.http.delete(f"/v1/jobs/{job_id}").status_code == 204
    assert memory.get_finished_spans() == ()


def calls_of_a_poll(monkeypatch: pytest.MonkeyPatch, traces: Traces | None) -> int:
    """Functions that one poll calls in the API, in the client and in what stands for the broker; the least of several polls."""
    redis = fakeredis.FakeServer()
    monkeypatch.setattr("latentline.operations.Images", lambda settings: FakeImages())
    monkeypatch.setattr("latentline.async_client.connect_async", lambda url: fakeredis.FakeAsyncRedis(server=redis, decode_responses=True))
    blocking = fakeredis.FakeRedis(server=redis, decode_responses=True)
    (record,) = records.run(blocking, records.submit([resolve(JobRequest.parse({"prompt": PROMPT}))], 600))
    app = create_app(Settings(auth="none"), traces=traces)

    async def polls() -> int:
        found = []
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as http,
        ):
            for _ in range(6):
                calls = 0

                def count(frame: Any, event: str, argument: Any) -> None:
                    nonlocal calls
                    calls += event in ("call", "c_call")

                sys.setprofile(count)
                answer = await http.get(f"/v1/jobs/{record.id}")
                sys.setprofile(None)
                assert answer.status_code == 200
                found.append(calls)
        return min(found)

    return asyncio.run(polls())


def test_a_poll_costs_with_traces_what_it_costs_without(monkeypatch: pytest.MonkeyPatch, traces: Traces) -> None:
    without, with_traces = (calls_of_a_poll(monkeypatch, one) for one in (None, traces))
    print(f"a poll: {without} function calls, with traces {with_traces - without} more")
    assert with_traces - without <= 40


def posts(app: FastAPI, prefix: str = "") -> Iterator[str]:
    """Paths that take a POST, also those of the dialects."""
    yield from (prefix + path for path, methods in app.openapi()["paths"].items() if "post" in methods)
    for route in app.routes:
        if isinstance(route, Mount) and isinstance(route.app, FastAPI):
            yield from posts(route.app, prefix + route.path)


def test_every_route_that_makes_or_cancels_a_job_is_traced(api: Live) -> None:
    found = {path: re.sub(r"{\w+_id}", JOB, path) for path in posts(api.app)}
    plain = {path for path, example in found.items() if not TRACED.fullmatch(example)}
    assert len(found) - len(plain) == 10
    made = {"txt2img", "interrupt", "predictions", "generations", "cancel", "batch", "jobs", "replay"}
    assert not {path.rpartition("/")[2] for path in plain} & made


def test_words_that_a_client_puts_into_a_url_get_into_no_span() -> None:
    for path, query in (("/v1/jobs", b"key=ll_secret"), (f"/v1/{PROMPT}/cancel", b""), (f"/v1/jobs/{PROMPT}/cancel", b"")):
        assert untraced({"type": "http", "method": "POST", "path": path, "query_string": query})


@pytest.fixture
def bench(traces: Traces) -> Iterator[RunnerBench]:
    made = RunnerBench(Records(fakeredis.FakeRedis(decode_responses=True)), at_once=True)
    made.runner._spans = AttemptSpans(traces.tracer, made.records)
    yield made
    made.engine.abandon_all()


def submit(bench: RunnerBench, traceparent: str = TRACEPARENT, **fields: Any) -> str:
    request = JobRequest.parse({"prompt": PROMPT, "num_inference_steps": 4, "scheduler": "ddim", **fields})
    one = resolve(request)
    (record,) = records.run(bench.records._client, records.submit([replace(one, traceparent=traceparent)], 600))
    return str(record.id)


def test_an_attempt_is_told_with_its_phases_below_the_span_of_the_submission(bench: RunnerBench, memory: InMemorySpanExporter) -> None:
    job_id = submit(bench)
    bench.runner.run(job_id)
    spans = {span.name: span for span in memory.get_finished_spans()}
    attempt = spans["attempt"]
    assert hex_ids(attempt)[0::2] == hex_ids(spans["queue"])[0::2] == (TRACE_ID, CLIENT_SPAN)
    assert {span.name for span in spans.values() if span.parent and span.parent.span_id == attempt.context.span_id} >= {
        "claim", "settle", "uploading",
    }  # fmt: skip
    assert {span.context.trace_id for span in spans.values()} == {int(TRACE_ID, 16)}
    said = attempt.attributes or {}
    assert (said["latentline.job.id"], said["latentline.attempt"], said["latentline.outcome"]) == (job_id, 1, "succeeded")
    for span in spans.values():
        assert span.start_time is not None and span.end_time is not None and span.start_time <= span.end_time
    assert PROMPT not in told(memory)


def test_a_job_without_a_trace_begins_one_with_its_attempt(bench: RunnerBench, memory: InMemorySpanExporter) -> None:
    bench.runner.run(submit(bench, ""))
    spans = memory.get_finished_spans()
    assert [span.name for span in spans if span.parent is None] == ["attempt"]
    assert len({span.context.trace_id for span in spans}) == 1


def test_a_job_whose_trace_is_not_kept_has_no_spans(bench: RunnerBench, memory: InMemorySpanExporter) -> None:
    bench.runner.run(submit(bench, f"{TRACEPARENT[:-2]}00"))
    assert memory.get_finished_spans() == ()


def test_an_attempt_that_was_lost_is_told_by_the_next_one(bench: RunnerBench, memory: InMemorySpanExporter) -> None:
    store, job_id = bench.records, submit(bench)
    assert store.claim(job_id, "gone@test", 0.001) is not None
    time.sleep(0.01)  # the lease has run out
    assert store.reclaim() == [job_id]
    bench.runner.run(job_id)
    first, second = sorted((span for span in memory.get_finished_spans() if span.name == "attempt"), key=lambda span: span.start_time or 0)
    for span, outcome, worker in ((first, "lost", "gone@test"), (second, "succeeded", "cpu@test")):
        assert (span.attributes or {})["latentline.outcome"] == outcome and (span.attributes or {})["latentline.worker"] == worker
        assert hex_ids(span)[0::2] == (TRACE_ID, CLIENT_SPAN)
    assert first.links == () and [link.context.span_id for link in second.links] == [first.context.span_id]
    assert not first.status.is_ok and second.status.is_ok


def test_an_attempt_links_to_the_one_that_its_worker_told_of(bench: RunnerBench, memory: InMemorySpanExporter) -> None:
    job_id = submit(bench)
    claim = bench.records.claim(job_id, "other@test", 30)
    assert claim is not None
    bench.records.release(job_id, claim.token, Account(span=f"00-{TRACE_ID}-{'7' * 16}-01", resumed_from=1).to_json())
    bench.runner.run(job_id)
    (attempt,) = (span for span in memory.get_finished_spans() if span.name == "attempt")
    assert [f"{link.context.span_id:x}" for link in attempt.links] == ["7" * 16]


def test_an_attempt_is_told_also_where_the_broker_does_not_tell_of_those_before_it(
    bench: RunnerBench, memory: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = submit(bench)
    claim = bench.records.claim(job_id, "other@test", 30)
    assert claim is not None and bench.records.release(job_id, claim.token)

    def refused(record: JobRecord) -> None:
        raise BrokerUnavailable("the broker does not let the user do this")

    monkeypatch.setattr(bench.records, "attempts", refused)
    bench.runner.run(job_id)
    (attempt,) = (span for span in memory.get_finished_spans() if span.name == "attempt")
    assert attempt.links == () and (attempt.attributes or {})["latentline.attempt"] == 2


@pytest.mark.parametrize("broken", ["_start", "attributes_of", "AttemptSpans._describe"])
def test_an_error_in_the_making_of_spans_ends_no_job(
    bench: RunnerBench, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    monkeypatch.setattr(f"latentline_worker.generate.spans.{broken}", lambda *_: 1 / 0)
    job_id = submit(bench)
    bench.runner.run(job_id)
    assert records.run(bench.records._client, records.get(job_id)).status == "succeeded"
    assert "no spans of this attempt" in caplog.text


@pytest.mark.parametrize("status", [200, 500])
def test_a_try_to_deliver_a_callback_is_a_span_and_goes_on_in_the_receiver(
    traces: Traces, memory: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    redis, receiver = fakeredis.FakeRedis(decode_responses=True), Receiver()
    receiver.status = status
    callback = {"url": f"{receiver.url}?token=t0psecret"}
    one = replace(resolve(JobRequest.parse({"prompt": PROMPT, "callback": callback})), traceparent=TRACEPARENT)
    (record,) = records.run(redis, records.submit([one], 600))
    FakeWorker(redis, FakeImages()).run(record.id)
    rule = CallbackRule(parse_networks("127.0.0.0/8"), parse_ports("1-65535"))
    Deliverer(Records(redis), [generate_secret()], rule, tracer=traces.tracer).deliver(f"msg_{record.id}_succeeded")
    receiver.close()
    (span,) = memory.get_finished_spans()
    said = span.attributes or {}
    assert (span.name, *hex_ids(span)[0::2]) == ("callback", TRACE_ID, CLIENT_SPAN)
    assert receiver.requests[0][0]["traceparent"] == f"00-{TRACE_ID}-{hex_ids(span)[1]}-01"
    assert (said["http.response.status_code"], said["latentline.callback.try"]) == (status, 1)
    assert said["latentline.callback.outcome"] == ("delivered" if status == 200 else "pending") and span.status.is_ok == (status == 200)
    assert "t0psecret" not in told(memory) and PROMPT not in told(memory)


def test_a_client_in_an_applications_own_span_submits_into_its_trace(traces: Traces) -> None:
    assert current_traceparent() == ""
    context = context_of(TRACEPARENT)
    assert context is not None
    with traces.tracer.start_as_current_span("checkout", context) as span:
        assert current_traceparent() == f"00-{TRACE_ID}-{span.get_span_context().span_id:016x}-01"
    assert trace.get_current_span() is trace.INVALID_SPAN


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318", "OTEL_SDK_DISABLED": "true"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318", "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_without_an_endpoint_there_are_no_traces_and_nothing_is_said(variables: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    assert open_traces("api", "one", variables) is None
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("variables", "allowed"),
    [
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4317", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "http/protobuf"),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "127.0.0.1:4318"}, "http://HOST:PORT"),
    ],
)
def test_what_cannot_be_used_is_named_once_and_the_process_goes_on(
    variables: dict[str, str], allowed: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert open_traces("api", "one", variables) is None
    (line,) = caplog.messages
    assert "no traces: OTEL_EXPORTER_OTLP_" in line and allowed in line


OFF = """
import sys
class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name.startswith(("opentelemetry.sdk.trace", "opentelemetry.exporter", "opentelemetry.proto")):
            raise ImportError(f"{name} is imported while there are no traces")
sys.meta_path.insert(0, Forbidden())
from latentline.api.app import create_app
from latentline.api.server import open_traces
from latentline import Client, Settings
from latentline_worker.callbacks import worker
from latentline_worker.generate import launch, spans, worker
assert open_traces("api", "one") is None
create_app(Settings(auth="none"))
"""
MISSING = """
import logging, sys
logging.basicConfig(format="%(levelname)s %(message)s")
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter")):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
from latentline.tracing import open_traces
assert open_traces("api", "one") is None
"""


@pytest.mark.parametrize(
    ("script", "endpoint", "said"),
    [(OFF, "", ""), (MISSING, "http://127.0.0.1:4318", "WARNING no traces: opentelemetry.exporter is not installed: pip install")],
    ids=["off", "not installed"],
)
def test_where_traces_are_off_nothing_of_them_is_imported(script: str, endpoint: str, said: str) -> None:
    environment = {**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert said in done.stderr


def exporting_to(monkeypatch: pytest.MonkeyPatch, port: int, delay_ms: int) -> Traces:
    """Traces of a process whose endpoint is a loopback port, and which has made far more spans than its queue takes."""
    variables = {"EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}", "EXPORTER_OTLP_TIMEOUT": "30", "BSP_SCHEDULE_DELAY": str(delay_ms)}
    for name, value in (variables | {"BSP_MAX_QUEUE_SIZE": "16", "BSP_MAX_EXPORT_BATCH_SIZE": "16"}).items():
        monkeypatch.setenv(f"OTEL_{name}", value)
    traces = open_traces("worker", "one")
    assert traces is not None
    for _ in range(1000):
        traces.tracer.start_span("attempt").end()
    return traces


def test_an_endpoint_that_is_away_costs_one_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    caplog.set_level(logging.DEBUG, "opentelemetry")
    traces = exporting_to(monkeypatch, port, 20)
    deadline = time.monotonic() + PATIENCE_S
    while not caplog.records and time.monotonic() < deadline:
        time.sleep(0.01)
    traces.close()
    assert len([one for one in caplog.records if one.levelno >= logging.WARNING]) == 1, caplog.text


def test_an_endpoint_that_hangs_keeps_no_process_from_ending(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:  # takes connections and never answers
        traces = exporting_to(monkeypatch, listener.getsockname()[1], 60_000)
        threading.Thread(target=lambda: (traces.close(), ended.set()), daemon=True).start()
        assert listener.accept() and ended.wait(CLOSE_S + 20), "one try alone may take thirty seconds"
