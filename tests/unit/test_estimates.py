"""When jobs will have ended, as far as workers' measurements tell."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from support.live_api import Live, live_api

from latentline.api.estimates import Estimates, _steady, estimate
from latentline.api.jobs import ask_again_s
from latentline.jobs import JobRecord, JobRequest, Phase, Status, resolve
from latentline.models import StepCost, Working
from latentline.testing import MODEL

COST = StepCost(rows=8, step_s=0.4, pixels=64 * 64)


def record(**fields: Any) -> JobRecord:
    request = resolve(JobRequest.parse({"prompt": "a cat", "num_inference_steps": 20, "guidance_scale": 5}), MODEL).request
    given = {"id": "x", "request": request, "status": Status.QUEUED, "num_steps": 20, "created_at": 0.0, "cost": 40, "queue_position": 0}
    return JobRecord(**given | fields)


def test_a_job_takes_its_steps_and_those_before_it_in_the_queue_their_share() -> None:
    assert estimate(record(), [COST]) == 8.0
    # Ten jobs of 40 rows each, at 20 rows a second; two such workers take half of that.
    assert estimate(record(queue_position=10), [COST]) == 8.0 + 20.0
    assert estimate(record(queue_position=10), [COST, COST]) == 8.0 + 10.0
    assert estimate(record(status=Status.RUNNING, queue_position=None, step=15), [COST]) == 2.0
    assert estimate(record(), [COST.model_copy(update={"pixels": 32 * 32})]) == 32.0, "four times the pixels of what was measured"


def test_what_is_not_known_is_not_guessed() -> None:
    assert estimate(record(), []) is None and estimate(record(queue_position=None), [COST]) is None
    assert estimate(record(cost=0, queue_position=3), [COST]) is None
    sized = record()
    unsized = sized.model_copy(update={"request": sized.request.model_copy(update={"width": None})})
    assert estimate(unsized, [COST]) is None


def test_small_changes_of_what_was_measured_are_none() -> None:
    near, far = COST.model_copy(update={"step_s": 0.45}), COST.model_copy(update={"step_s": 0.6})
    assert _steady([COST], [near]) == [COST] and _steady([COST], [far]) == [far] and _steady([COST], [near, near]) == [near, near]


@pytest.mark.parametrize(("eta_s", "again_s"), [(None, 1), (0.0, 1), (3.0, 1), (20.0, 4), (1000.0, 10)])
def test_polls_are_asked_to_come_back_later_the_longer_it_takes(eta_s: float | None, again_s: int) -> None:
    assert ask_again_s(eta_s) == again_s


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Iterator[Live]:
    monkeypatch.setattr(Estimates, "life_s", 0.0)
    with live_api(monkeypatch) as running:
        yield running


def eta(live: Live, job_id: str) -> Any:
    return live.http.get(f"/v1/jobs/{job_id}").json()["eta_s"]


def test_the_api_tells_the_estimate_once_workers_have_told_their_costs(live: Live) -> None:
    first, second = (live.submit(num_inference_steps=20)["id"] for _ in range(2))
    assert eta(live, first) is None
    live.worker.records.heartbeat(live.worker.name, Working(costs={MODEL.id: COST}))
    while eta(live, first) is None:
        pass
    assert (eta(live, first), eta(live, second)) == (8.0, 10.0)
    assert [job["eta_s"] for job in live.http.get("/v1/jobs").json()["jobs"]] == [10.0, 8.0]
    poll = live.http.get(f"/v1/jobs/{second}")
    assert poll.headers["retry-after"] == "2"
    assert live.http.get(f"/v1/jobs/{second}", headers={"If-None-Match": poll.headers["etag"]}).status_code == 304
    claim = live.worker.records.claim(first, "one", 30)
    assert claim is not None
    live.worker.progress(claim, Phase.DENOISING, 10)
    assert (eta(live, first), eta(live, second)) == (4.0, 8.0)
    live.worker.run(second)
    ended = live.http.get(f"/v1/jobs/{second}")
    assert ended.json()["eta_s"] is None and "retry-after" not in ended.headers
