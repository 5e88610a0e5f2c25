"""The logs of the real stack as JSON, at DEBUG: one object a line, with ids of jobs and traces, and no prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
from support.jobs import PATIENCE_S
from support.receiver import Receiver

MARKER = "xylophone of a heron"
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"  # another one than that of the tests of traces, which look at all of theirs
TRACEPARENT = f"00-{TRACE_ID}-00f067aa0ba902b7-01"
SERVICES = ("api", "worker", "callbacks")


def lines(folder: Path, service: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{service}.log").read_text().splitlines()]


def test_every_line_is_an_object_that_names_its_job_and_none_holds_a_prompt(http: httpx.Client, stack_folder: Path) -> None:
    receiver = Receiver()
    words = {"prompt": f"a {MARKER}", "negative_prompt": f"no {MARKER}"}
    body = {**words, "num_inference_steps": 4, "callback": {"url": receiver.url}, "idempotency_key": "logs"}
    job = http.post("/v1/jobs", json=body, headers={"traceparent": TRACEPARENT}).raise_for_status().json()
    for refused in ({**body, "num_inference_steps": 5}, {**words, "scheduler": MARKER}, {"prompt": MARKER * 10_000}, {**words, MARKER: 1}):
        assert http.post("/v1/jobs", json=refused).status_code in (409, 422)
    assert http.post("/v1/jobs/batch", json={"jobs": [{**words, "num_inference_steps": 1}]}).status_code == 200
    drawn = {"prompt": MARKER, "steps": 2, "width": 64, "height": 64}
    assert http.post("/sdapi/v1/txt2img", json=drawn, timeout=2 * PATIENCE_S).status_code in (200, 422)
    ended = http.get(f"/v1/jobs/{job['id']}?wait={PATIENCE_S}", timeout=2 * PATIENCE_S).raise_for_status().json()
    assert ended["status"] == "succeeded"
    assert receiver.arrived.acquire(timeout=PATIENCE_S)
    receiver.close()
    found = {service: lines(stack_folder, service) for service in SERVICES}
    for service, records in found.items():
        assert MARKER not in json.dumps(records), service
        assert all({"time", "level", "logger", "message", "worker"} <= record.keys() for record in records), service
        assert any(record["level"] == "debug" for record in records), "or nothing would be shown"
    mine = [record for record in found["worker"] if record.get("job_id") == job["id"] and record["message"].endswith("started, attempt 1")]
    assert [record["trace_id"] for record in mine] == [TRACE_ID]
    assert any(record.get("job_id") == job["id"] and record["trace_id"] == TRACE_ID for record in found["callbacks"])
    assert len({record["worker"] for records in found.values() for record in records}) == 3
