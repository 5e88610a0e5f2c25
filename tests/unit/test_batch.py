"""Many jobs in one request, and lists by model, time and metadata."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from support.live_api import Live, live_api, problem

from latentline import records, routing
from latentline.api.batch import MAX_BATCH, MAX_BATCH_BYTES
from latentline.jobs import MAX_BODY_BYTES, MAX_PROMPT_CHARS


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Iterator[Live]:
    with live_api(monkeypatch) as running:
        yield running


def post(live: Live, *jobs: Any) -> list[dict[str, Any]]:
    answer = live.http.post("/v1/jobs/batch", json={"jobs": list(jobs)})
    assert answer.status_code == 200, answer.text
    results: list[dict[str, Any]] = answer.json()["results"]
    return results


def test_each_job_of_a_batch_is_accepted_or_refused_by_itself_in_order(live: Live) -> None:
    results = post(
        live,
        {"prompt": "a cat", "seed": 1},
        {"prompt": ""},
        {"prompt": "a dog", "width": 65},
        {"prompt": "a dog", "model": "no-such"},
        "a cat",
        None,
        {"prompt": "a cat", "nonsense": 1},
        {"prompt": "a bird", "seed": 2},
    )
    assert [one["status"] for one in results] == [202, 422, 422, 422, 422, 422, 422, 202]
    assert [one["error"] and one["error"]["field"] for one in results] == [
        None, "prompt", "width", "model", "request", "request", "nonsense", None,
    ]  # fmt: skip
    assert all(one["error"]["allowed"] for one in results[1:-1]) and all((one["job"] is None) != (one["error"] is None) for one in results)
    assert [one["job"]["request"]["prompt"] for one in (results[0], results[-1])] == ["a cat", "a bird"]
    assert results[0]["job"] == live.http.get(f"/v1/jobs/{results[0]['job']['id']}").json()
    assert len(live.http.get("/v1/jobs").json()["jobs"]) == 2


def test_a_batch_that_is_sent_again_gives_the_same_jobs(live: Live) -> None:
    jobs = [{"prompt": "a cat", "idempotency_key": f"order-{i}"} for i in range(3)]
    first = [one["job"]["id"] for one in post(live, *jobs)]
    assert [one["job"]["id"] for one in post(live, *jobs)] == first
    again = post(live, jobs[0], {**jobs[1], "prompt": "a dog"}, jobs[0])
    assert [one["status"] for one in again] == [202, 409, 202] and again[1]["error"]["code"] == "idempotency_conflict"
    assert again[0]["job"]["id"] == again[2]["job"]["id"] == first[0]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "jobs"), ({"jobs": []}, "jobs"), ({"jobs": {}}, "jobs"), ({"jobs": None}, "jobs"), ({"jobs": [{"prompt": "x"}] * 101}, "jobs"),
        ({"jobs": [{"prompt": "x"}], "tenant": "ann"}, "tenant"), ([{"prompt": "x"}], "body"),
    ],
)  # fmt: skip
def test_a_batch_that_is_none_is_refused_whole(live: Live, body: Any, field: str) -> None:
    assert MAX_BATCH == 100
    error = problem(live.http.post("/v1/jobs/batch", json=body), 422, "invalid_request")
    assert error["field"] == field and len(error["message"]) < 300
    assert live.http.get("/v1/jobs").json()["jobs"] == []


def test_one_key_for_a_whole_batch_is_refused(live: Live) -> None:
    answer = live.http.post("/v1/jobs/batch", json={"jobs": [{"prompt": "x"}]}, headers={"Idempotency-Key": "k"})
    assert problem(answer, 422, "invalid_request")["field"] == "Idempotency-Key"


def test_the_longest_prompts_fit_and_larger_bodies_do_not(live: Live) -> None:
    prompt = "\U0001f431" * MAX_PROMPT_CHARS  # in JSON twelve bytes each, in UTF-8 four
    body = json.dumps({"prompt": prompt, "num_images": 10}, ensure_ascii=False).encode()
    assert len(body) < MAX_BODY_BYTES
    answer = live.http.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 202 and answer.json()["request"]["prompt"] == prompt
    escaped = json.dumps({"prompt": prompt}).encode()  # 384 KB
    problem(live.http.post("/v1/jobs", content=escaped, headers={"Content-Type": "application/json"}), 413, "body_too_large")
    problem(live.http.post("/v1/jobs", json={"prompt": "x" * (MAX_PROMPT_CHARS + 1)}), 422, "invalid_request")
    assert len(post(live, *[{"prompt": "x" * MAX_PROMPT_CHARS}] * 20)) == 20
    large = live.http.post(
        "/v1/jobs/batch", json={"jobs": [{"prompt": "x" * MAX_PROMPT_CHARS}] * (MAX_BATCH_BYTES // MAX_PROMPT_CHARS + 1)}
    )
    problem(large, 413, "body_too_large")


# Lists


def listed(live: Live, **params: Any) -> list[str]:
    """The seeds of the jobs of all pages."""
    found: list[str] = []
    cursor: str | None = None
    while cursor is not None or not found:
        answer = live.http.get("/v1/jobs", params=params | ({"cursor": cursor} if cursor else {}))
        assert answer.status_code == 200, answer.text
        found += [job["request"]["seed"] for job in answer.json()["jobs"]]
        cursor = answer.json()["next_cursor"]
        if cursor is None:
            break
    return found


def test_jobs_are_listed_by_model_time_and_metadata(live: Live) -> None:
    live.worker.records.announce("other", [live.worker.model.model_copy(update={"id": "other"})])
    metadata = [{"order": 7}, {"order": 17}, {"order": "7", "new": True}, {}, {"a:b": "c\nd", "price": 1.5, "none": None}]
    made = [live.submit(seed=i, metadata=entries, model="other" if i == 3 else "latentline-emoji") for i, entries in enumerate(metadata)]
    for i, job in enumerate(made):  # apart by a second, so that times tell them apart
        score = 1_700_000_000_000 + 1000 * i
        for key in (routing.index_key(), routing.index_key("queued"), routing.tenant_index_key("default")):
            live.worker.redis.zadd(key, {job["id"]: score})
    assert listed(live, model="other") == [3] and listed(live, model="none") == []
    assert (
        listed(live, metadata="order:7") == [2, 0] and listed(live, metadata="order:17") == [1] and listed(live, metadata="order:1") == []
    )
    assert listed(live, metadata=["order:7", "new:true"]) == [2] and listed(live, metadata="a:b:c\nd") == [4]
    assert listed(live, metadata="price:1.5") == listed(live, metadata="none:null") == [4] and listed(live, metadata=":") == []
    start, third = "2023-11-14T22:13:20Z", "2023-11-14T22:13:22Z"
    assert listed(live, created_after=third) == [4, 3, 2] and listed(live, created_before=third) == [1, 0]
    assert listed(live, created_after="2023-11-14T22:13:21", created_before="2023-11-14T23:13:23+01:00") == [2, 1]
    assert listed(live, created_after=third, created_before=start) == []
    assert listed(live, created_before=third, limit=1) == [1, 0] and listed(live, created_after=third, limit=1, status="queued") == [
        4,
        3,
        2,
    ]
    assert listed(live, created_after=third, model="latentline-emoji", metadata="order:7", tenant="default") == [2]


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"created_after": "yesterday"}, "created_after"), ({"created_before": "2023-13-01"}, "created_before"),
        ({"metadata": [f"k:{i}" for i in range(6)]}, "metadata"), ({"model": "x" * 201}, "model"), ({"metadata": "x" * 5000}, "metadata"),
        ({"metadata": "order"}, "metadata"), ({"metadata": ["order:7", ""]}, "metadata"),
    ],
)  # fmt: skip
def test_a_condition_that_cannot_be_met_is_refused_by_name(live: Live, params: dict[str, Any], field: str) -> None:
    assert field in problem(live.http.get("/v1/jobs", params=params), 422, "invalid_request")["message"]


def test_a_time_that_is_none_says_what_one_looks_like(live: Live) -> None:
    for text in ("yesterday", "2023-13-01", "", "nan", "2023-11-14T22:13:20Z?"):
        for name in ("created_after", "created_before"):
            error = problem(live.http.get("/v1/jobs", params={name: text}), 422, "invalid_request")
            assert (error["field"], error["allowed"]) == (name, "a date and time such as 2026-11-27T22:00:00Z")


def test_a_page_of_long_prompts_is_shorter_and_goes_on(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentline.records.lists.MAX_PAGE_BYTES", 100_000)
    for i in range(6):
        live.submit(seed=i, prompt="x" * MAX_PROMPT_CHARS)
    page = live.http.get("/v1/jobs").json()
    assert 3 <= len(page["jobs"]) <= 4 and page["next_cursor"]
    assert listed(live) == [5, 4, 3, 2, 1, 0]
    monkeypatch.setattr("latentline.records.lists.MAX_PAGE_BYTES", 1)
    assert listed(live) == [5, 4, 3, 2, 1, 0]


def test_the_list_by_metadata_looks_at_a_bounded_number_of_jobs(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentline.records.lists.MAX_LOOK", 4)
    for i in range(7):
        live.submit(seed=i, metadata={"order": i})
    first = records.run(live.worker.redis, records.list_jobs(limit=1, where=records.JobFilter(metadata=("order:0",))))
    assert first[0] == [] and first[1] is not None
    assert listed(live, metadata="order:0", limit=1) == [0]
