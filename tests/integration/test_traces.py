"""The trace of a job on the real stack: API, worker and deliverer send their spans to a collector on loopback."""

from __future__ import annotations

import httpx
from support.collector import CLIENT_SPAN, TRACE_ID, TRACEPARENT, Collector, Span, tree
from support.jobs import PATIENCE_S
from support.receiver import Receiver

PROMPT = "a red apple that nobody else should read of"


def test_one_job_is_one_trace_from_the_request_to_the_callback(http: httpx.Client, collector: Collector) -> None:
    receiver = Receiver()
    body = {"prompt": PROMPT, "num_inference_steps": 6, "callback": {"url": receiver.url}}
    job = http.post("/v1/jobs", json=body, headers={"traceparent": TRACEPARENT}).raise_for_status().json()
    for path in (f"/v1/jobs/{job['id']}?wait={PATIENCE_S:g}", "/v1/jobs", f"/v1/jobs/{job['id']}/timeline", f"/v1/jobs/{job['id']}/events"):
        http.get(path, headers={"traceparent": TRACEPARENT}, timeout=2 * PATIENCE_S).raise_for_status()
    spans = collector.until(TRACE_ID, lambda found: {"callback", "attempt", "POST /v1/jobs"} <= {span.name for span in found})
    receiver.close()
    print(tree(spans))
    by_name = {span.name: span for span in spans}
    assert len(by_name) == len(spans), "each of them once: polls, lists and streams have none"
    request, attempt = by_name["POST /v1/jobs"], by_name["attempt"]
    assert request.parent_id == CLIENT_SPAN

    def below(parent: Span) -> set[str]:
        return {span.name for span in spans if span.parent_id == parent.span_id}

    assert below(request) == {"queue", "attempt", "callback"}
    assert below(attempt) - {"waiting"} == {"claim", "encoding", "denoising", "decoding", "uploading", "settle"}
    services = {name: by_name[name].service for name in ("POST /v1/jobs", "denoising", "callback")}
    assert list(services.values()) == ["latentline-api", "latentline-worker", "latentline-callbacks"]
    steps = [attributes for kind, attributes in by_name["denoising"].events if kind == "steps"]
    assert sum(one["count"] for one in steps) == 6
    assert all(span.start_ns <= span.end_ns for span in spans)
    assert attempt.attributes["latentline.outcome"] == "succeeded" and not any(span.failed for span in spans)
    assert not any(PROMPT.encode() in raw for raw in collector.raw)
    assert not any(span.name.startswith(("GET", "HEAD")) for span in collector.spans), "of any other test either"
