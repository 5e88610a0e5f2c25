"""The fleet as administrators see it, and dead letters that they send again."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.live_api import Live, live_api, new_key, problem

from latentline import Settings, records
from latentline.models import Working
from latentline.records import Records
from latentline.testing import MODEL


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Iterator[Live]:
    with live_api(monkeypatch, Settings(auth="keys")) as running:
        yield running


def test_the_fleet_at_a_glance(live: Live) -> None:
    admin = {"Authorization": f"Bearer {new_key(live, 'admin')}"}
    for tenant, number in (("ann", 2), ("bob", 1)):
        key = {"Authorization": f"Bearer {new_key(live, tenant=tenant)}"}
        for _ in range(number):
            live.http.post("/v1/jobs", json={"prompt": "a cat", "num_inference_steps": 2}, headers=key)
    store = Records(live.worker.redis)
    store.announce("gpu-1", [MODEL])
    store.heartbeat("gpu-1", Working(device="cuda:0", jobs=3, capacity=16, steps_per_s=4.5, rows_per_step=6.0, warm=()))
    found = live.http.get("/v1/fleet", headers=admin).json()
    by_name = {worker["name"]: worker for worker in found["workers"]}
    assert by_name["gpu-1"] | {"heard_s": 0} == {
        "name": "gpu-1", "heard_s": 0, "models": [{"id": MODEL.id, "warm": False}], "device": "cuda:0", "jobs": 3, "capacity": 16,
        "steps_per_s": 4.5, "rows_per_step": 6.0,
    }  # fmt: skip
    unknown = by_name[live.worker.name]  # as a worker of an earlier version, it tells nothing of what it does
    assert unknown["device"] is unknown["jobs"] is None and unknown["models"] == [{"id": MODEL.id, "warm": True}]
    assert (found["queued"], found["running"]) == (3, 0)
    assert {(queue["model"], queue["tenant"]): queue["jobs"] for queue in found["queues"]} == {(MODEL.id, "ann"): 2, (MODEL.id, "bob"): 1}
    live.worker.run_all()
    assert live.http.get("/v1/fleet", headers=admin).json()["queues"] == []


def test_dead_letters_are_sent_again_or_forgotten(live: Live) -> None:
    admin = {"Authorization": f"Bearer {new_key(live, 'admin')}"}
    key = {"Authorization": f"Bearer {new_key(live)}"}
    job = live.http.post("/v1/jobs", json={"prompt": "a cat", "idempotency_key": "once"}, headers=key).json()
    record = records.run(live.worker.redis, records.get(job["id"]))
    store = Records(live.worker.redis)
    store.bury("dead-job", "job", "it failed", request=record.request.model_dump_json(exclude_defaults=True), at=1.0)
    store.bury("dead-message", "message", "no JSON", at=2.0)
    letters = {letter["id"]: letter for letter in live.http.get("/v1/fleet", headers=admin).json()["dead_letters"]}
    assert letters["dead-job"]["replayable"] and not letters["dead-message"]["replayable"]
    problem(live.http.post("/v1/dead/dead-message/replay", headers=admin), 422, "invalid_request")
    again = live.http.post("/v1/dead/dead-job/replay", headers=admin)
    assert again.status_code == 202 and again.json()["id"] != job["id"]
    assert live.http.get(f"/v1/jobs/{again.json()['id']}", headers=key).json()["request"]["tenant"] == "ann"
    problem(live.http.post("/v1/dead/dead-job/replay", headers=admin), 404, "job_not_found")
    assert live.http.delete("/v1/dead/dead-message", headers=admin).status_code == 204
    assert live.http.get("/v1/fleet", headers=admin).json()["num_dead_letters"] == 0
