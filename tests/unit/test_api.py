"""The HTTP API on a loopback port: a real server over fakeredis and the fake worker."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import re
import threading
from collections.abc import AsyncIterator, Iterator
from datetime import datetime, timedelta
from typing import Any

import httpx
import jsonschema
import pytest
from pydantic import ValidationError
from support.live_api import Live, live_api, problem, sse

from latentline import AsyncClient, Settings, routing
from latentline.api.app import create_app
from latentline.jobs import MAX_BODY_BYTES, JobError, Phase
from latentline.testing import MODEL

JSON = {"Content-Type": "application/json"}


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Iterator[Live]:
    with live_api(monkeypatch) as running:
        yield running


# Submitting and reading


def test_a_submitted_job_is_accepted_and_found_at_its_location(live: Live) -> None:
    answer = live.http.post("/v1/jobs", json={"prompt": "a cat", "seed": 7, "idempotency_key": "k"})
    job = answer.json()
    assert answer.status_code == 202 and answer.headers["location"] == f"/v1/jobs/{job['id']}"
    assert set(job) == {
        "id", "status", "phase", "step", "num_steps", "queue_position", "eta_s", "created_at", "started_at", "finished_at",
        "cancel_requested", "images", "error", "warnings", "timings", "request",
    }  # fmt: skip
    assert (job["status"], job["queue_position"], job["step"], job["num_steps"], job["images"]) == ("queued", 0, 0, 20, [])
    assert (job["request"]["prompt"], job["request"]["seed"], job["request"]["width"]) == ("a cat", 7, MODEL.default_width)
    assert "idempotency_key" not in job["request"]
    assert datetime.fromisoformat(job["created_at"]).utcoffset() == timedelta(0)
    assert live.http.get(answer.headers["location"]).json() == job


def test_what_is_left_to_the_model_is_shown_as_it_was_resolved(live: Live) -> None:
    own = {"id": "own", "default_width": 96, "default_num_inference_steps": 4, "default_scheduler": "lcm", "default_guidance_scale": 1.5}
    live.worker.records.announce("other", [MODEL.model_copy(update=own)])
    body = {"prompt": "a cat", "model": "own", "num_inference_steps": None, "width": None}
    job = live.http.post("/v1/jobs", json=body).json()
    shown = {name: job["request"][name] for name in ("width", "height", "num_inference_steps", "scheduler", "guidance_scale")}
    assert shown == {"width": 96, "height": 64, "num_inference_steps": 4, "scheduler": "lcm", "guidance_scale": 1.5}
    assert job["num_steps"] == 4 and live.http.get(f"/v1/jobs/{job['id']}").json()["request"] == job["request"]


def test_a_job_of_a_newer_release_is_shown_and_listed(live: Live) -> None:
    job_id = live.submit()["id"]
    key = routing.job_key(job_id)
    newer = json.loads(str(live.worker.redis.hget(key, "request"))) | {"style": "oil", "scheduler": "newest"}
    live.worker.redis.hset(key, mapping={"request": json.dumps(newer), "status": "running", "phase": "upscaling"})
    job = live.http.get(f"/v1/jobs/{job_id}").json()
    assert (job["phase"], job["request"]["scheduler"]) == ("upscaling", "newest") and "style" not in job["request"]
    assert [one["id"] for one in live.http.get("/v1/jobs").json()["jobs"]] == [job_id]


def test_a_finished_job_shows_its_images_with_urls(live: Live) -> None:
    job_id = live.submit(num_images=2, seed=7)["id"]
    live.worker.run_all()
    job = live.http.get(f"/v1/jobs/{job_id}").json()
    assert (job["status"], job["step"], job["queue_position"], job["error"]) == ("succeeded", 2, None, None)
    assert [image["seed"] for image in job["images"]] == [7, 8]
    for image in job["images"]:
        assert set(image) == {"url", "seed", "width", "height", "content_type", "sha256", "pixels_sha256"}
        assert image["url"].removeprefix("memory://") in live.images.objects
    assert job["created_at"] <= job["started_at"] <= job["finished_at"]


def test_a_job_that_has_not_changed_is_not_sent_again(live: Live) -> None:
    job_id = live.submit()["id"]

    def poll(etag: str) -> httpx.Response:
        return live.http.get(f"/v1/jobs/{job_id}", headers={"If-None-Match": etag})

    first = poll('"another"')
    etag = first.headers["etag"]
    for known in (etag, f"W/{etag}", f'"x", {etag}', "*"):
        again = poll(known)
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)
    live.worker.run_all()
    changed = poll(etag)
    assert (changed.status_code, changed.json()["status"]) == (200, "succeeded") and changed.headers["etag"] != etag
    assert poll(changed.headers["etag"]).status_code == 304


def test_a_failed_job_says_why(live: Live) -> None:
    live.worker.fail_with = JobError(code="numerical_error", message="not finite")
    job_id = live.submit()["id"]
    live.worker.run_all()
    job = live.http.get(f"/v1/jobs/{job_id}").json()
    assert (job["status"], job["error"]) == ("failed", {"code": "numerical_error", "message": "not finite"})


def test_a_running_job_shows_phase_and_step(live: Live) -> None:
    job_id = live.submit(num_inference_steps=9)["id"]
    claim = live.worker.records.claim(job_id, "w", 30)
    assert claim is not None
    live.worker.progress(claim, Phase.DENOISING, 4)
    job = live.http.get(f"/v1/jobs/{job_id}").json()
    assert (job["status"], job["phase"], job["step"], job["queue_position"]) == ("running", "denoising", 4, None)


def test_an_idempotency_key_gives_one_job_for_one_body(live: Live) -> None:
    def post(prompt: str, key: str) -> httpx.Response:
        return live.http.post("/v1/jobs", json={"prompt": prompt}, headers={"Idempotency-Key": key})

    first = post("a cat", "k")
    again = post("a cat", "k")
    assert (again.status_code, again.json()["id"]) == (202, first.json()["id"])
    problem(post("a dog", "k"), 409, "idempotency_conflict")
    assert post("a dog", "other").json()["id"] != first.json()["id"]
    assert len(live.http.get("/v1/jobs").json()["jobs"]) == 2
    assert problem(post("a cat", "k" * 201), 422, "invalid_request")["field"] == "idempotency_key"


def test_cancel(live: Live) -> None:
    queued, running = live.submit()["id"], live.submit()["id"]
    assert live.http.post(f"/v1/jobs/{queued}/cancel").json()["status"] == "cancelled"
    claim = live.worker.records.claim(running, "w", 30)
    assert claim is not None
    job = live.http.post(f"/v1/jobs/{running}/cancel").json()
    assert (job["status"], job["cancel_requested"]) == ("running", True)
    live.worker.finish(claim)
    again = live.http.post(f"/v1/jobs/{running}/cancel")
    assert (again.status_code, again.json()["status"]) == (200, "cancelled")


def test_list_pages_and_filters(live: Live) -> None:
    made = [live.submit()["id"] for _ in range(5)]
    live.http.post(f"/v1/jobs/{made[2]}/cancel")
    seen, cursor = [], None
    for expected in (2, 2, 1):
        page = live.http.get("/v1/jobs", params={"limit": 2} | ({"cursor": cursor} if cursor else {})).json()
        assert len(page["jobs"]) == expected
        seen += [job["id"] for job in page["jobs"]]
        cursor = page["next_cursor"]
    assert cursor is None and sorted(seen) == sorted(made)
    assert [job["id"] for job in live.http.get("/v1/jobs?status=cancelled").json()["jobs"]] == [made[2]]


def test_models(live: Live) -> None:
    assert live.http.get("/v1/models").json() == {"models": [{**MODEL.model_dump(mode="json"), "workers": 1, "warm": 1, "swaps": 0}]}


# Bad input


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"", "body"),
        (b'{"prompt": "a cat"', "body"),
        (b'{"prompt": NaN}', "body"),
        (b"\xff\xfe\xfa", "body"),
        (b"[" * 60_000, "body"),
        (b'[{"prompt": "a cat"}]', "body"),
        (b"null", "body"),
        (b"{}", "prompt"),
        (b'{"prompt": "  "}', "prompt"),
        (b'{"prompt": "\\ud800"}', "prompt"),
        (b'{"prompt": "a cat", "promt": 1}', "promt"),
        (b'{"prompt": "a cat", "width": 65}', "width"),
        (b'{"prompt": "a cat", "width": 4096}', "width"),
        (b'{"prompt": "a cat", "num_inference_steps": 0}', "num_inference_steps"),
        (b'{"prompt": "a cat", "guidance_scale": 1e999}', "guidance_scale"),
        (b'{"prompt": "a cat", "num_images": 11}', "num_images"),
        (b'{"prompt": "a cat", "scheduler": "magic"}', "scheduler"),
        (b'{"prompt": "a cat", "seed": "7"}', "seed"),
        (b'{"prompt": "a cat", "seed": -1}', "seed"),
        (b'{"prompt": "a cat", "output": {"format": "gif"}}', "output.format"),
        (b'{"prompt": "a cat", "callback": {"url": "ftp://a.example"}}', "callback.url"),
        (b'{"prompt": "a cat", "metadata": {"a": "\\ud800"}}', "metadata"),
        (b'{"prompt": "a cat", "prompt": "a dog"}', "prompt"),
        (b'{"prompt": "a cat", "metadata": {"a": 1, "a": 2}}', "a"),
        (b'{"prompt": "a cat", "guidance_scale": true}', "guidance_scale"),
        (b'{"prompt": "a cat", "tenant": ".."}', "tenant"),
        (b'{"prompt": "a cat", "callback": {"url": "http://169.254.169.254/"}}', "callback.url"),
        (b'{"prompt": "a cat", "callback": {"url": "http://127.1/"}}', "callback.url"),
        (b'{"prompt": "a cat", "callback": {"url": "http://2130706433/"}}', "callback.url"),
        (b'{"prompt": "a cat", "callback": {"url": "http://localhost/"}}', "callback.url"),
        (b'{"prompt": "a cat", "callback": {"url": "https://[::1]/"}}', "callback.url"),
        (b'{"prompt": "a cat", "callback": {"url": "https://a.example:22/"}}', "callback.url"),
    ],
)
def test_a_body_that_is_not_acceptable(live: Live, body: bytes, field: str) -> None:
    error = problem(live.http.post("/v1/jobs", content=body, headers=JSON), 422, "invalid_request")
    assert error["field"].startswith(field) and error["allowed"]
    assert live.worker.take() is None


def test_an_unknown_model_is_answered_with_the_known_ones(live: Live) -> None:
    error = problem(live.http.post("/v1/jobs", json={"prompt": "a cat", "model": "no-such"}), 422, "invalid_request")
    assert error["field"] == "model" and MODEL.id in error["allowed"]


@pytest.mark.parametrize("headers", [{}, {"Content-Type": "text/plain"}, {"Content-Type": "application/x-www-form-urlencoded"}])
def test_another_content_type(live: Live, headers: dict[str, str]) -> None:
    problem(live.http.post("/v1/jobs", content=b'{"prompt": "a cat"}', headers=headers), 415, "unsupported_media_type")


def test_a_content_type_may_have_parameters(live: Live) -> None:
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert live.http.post("/v1/jobs", content=b'{"prompt": "a cat"}', headers=headers).status_code == 202


def test_an_encoded_body(live: Live) -> None:
    body = gzip.compress(b'{"prompt": "a cat"}')
    problem(live.http.post("/v1/jobs", content=body, headers=JSON | {"Content-Encoding": "gzip"}), 415, "unsupported_media_type")


def test_only_one_idempotency_key(live: Live) -> None:
    two = [("Idempotency-Key", "a"), ("Idempotency-Key", "b")]
    assert problem(live.http.post("/v1/jobs", json={"prompt": "a cat"}, headers=two), 422, "invalid_request")["allowed"] == "one header"
    body = {"prompt": "a cat", "idempotency_key": "a"}
    error = problem(live.http.post("/v1/jobs", json=body, headers={"Idempotency-Key": "b"}), 422, "invalid_request")
    assert error["field"] == "idempotency_key"
    assert live.http.post("/v1/jobs", json=body, headers={"Idempotency-Key": "a"}).status_code == 202


def test_a_callback_goes_where_the_operator_allows_it(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live.client, "settings", Settings(callback_allow="10.1.0.0/16", callback_ports="9000-9010"))
    assert live.submit(callback={"url": "http://10.1.2.3:9005/"})["status"] == "queued"
    assert live.submit(callback={"url": "http://named.example:9005/"})["status"] == "queued"  # judged when it is delivered
    for url in ("http://10.2.2.3:9005/", "http://10.1.2.3/"):
        answer = live.http.post("/v1/jobs", json={"prompt": "a cat", "callback": {"url": url}})
        assert problem(answer, 422, "invalid_request")["field"] == "callback.url"


@pytest.mark.parametrize("query", ["limit=many", "status=done", "cursor=" + "a" * 301])
def test_a_query_is_refused_in_words_of_our_own(live: Live, query: str) -> None:
    assert "should" not in problem(live.http.get(f"/v1/jobs?{query}"), 422, "invalid_request")["allowed"].lower()


def pieces(size: int) -> Iterator[bytes]:
    body = b'{"prompt": "a cat"}'.ljust(size)
    return (body[i : i + 5000] for i in range(0, size, 5000))


def test_a_body_over_the_cap(live: Live) -> None:
    def send(content: bytes | Iterator[bytes]) -> httpx.Response:
        return live.http.post("/v1/jobs", content=content, headers=JSON)

    assert send(pieces(MAX_BODY_BYTES)).status_code == 202
    assert send(b"".join(pieces(MAX_BODY_BYTES))).status_code == 202
    problem(send(b"".join(pieces(MAX_BODY_BYTES + 1))), 413, "body_too_large")


def test_a_chunked_body_over_the_cap_is_read_no_further() -> None:
    taken = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal taken
        while True:
            taken += 5000
            yield b" " * 5000

    async def send() -> httpx.Response:
        # In this process: over TCP the server hangs up while the client still sends, and the answer may be lost.
        app = create_app(Settings(auth="none"))
        transport = httpx.ASGITransport(app)
        async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            return await http.post("/v1/jobs", content=endless(), headers=JSON)

    problem(asyncio.run(send()), 413, "body_too_large")
    assert taken <= MAX_BODY_BYTES + 10_000


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("status=done", "status"), ("limit=0", "limit"), ("limit=201", "limit"), ("limit=many", "limit"),
        ("cursor=%21", "cursor"), ("cursor=Zm9v", "cursor"), ("cursor=%C3%A9", "cursor"), ("cursor=" + "a" * 301, "cursor"),
    ],
)  # fmt: skip
def test_a_query_that_is_not_acceptable(live: Live, query: str, field: str) -> None:
    assert problem(live.http.get(f"/v1/jobs?{query}"), 422, "invalid_request")["field"] == field


@pytest.mark.parametrize(("method", "path"), [("GET", ""), ("POST", "/cancel"), ("GET", "/events")])
@pytest.mark.parametrize("job_id", ["no-such-job", "%00", "%ff", "a" * 5000])
def test_an_unknown_id(live: Live, method: str, path: str, job_id: str) -> None:
    problem(live.http.request(method, f"/v1/jobs/{job_id}{path}"), 404, "job_not_found")


def test_unknown_paths_and_methods(live: Live) -> None:
    problem(live.http.get("/v1/no-such-thing"), 404, "not_found")
    answer = live.http.delete("/v1/jobs")
    problem(answer, 405, "method_not_allowed")
    assert answer.headers["allow"]


def test_a_path_that_does_not_exist_is_not_repeated_at_length(live: Live) -> None:
    for path in ("/v1/" + "a" * 50_000, "/v1/jobs/" + "a" * 50_000):
        assert len(live.http.get(path).content) < 400


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/v1/jobs", "/v1/models", "/openapi.json", "/docs"])
def test_head_is_answered_as_get_without_a_body(live: Live, path: str) -> None:
    head, get = live.http.head(path), live.http.get(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == get.headers["content-length"] and get.content


def test_head_of_a_job_that_runs_and_of_its_events(live: Live) -> None:
    job_id = live.submit()["id"]
    assert live.http.head(f"/v1/jobs/{job_id}").status_code == 200
    events = live.http.head(f"/v1/jobs/{job_id}/events")
    assert (events.status_code, events.content) == (200, b"") and events.headers["content-type"].startswith("text/event-stream")
    assert live.http.head("/v1/jobs/x").status_code == 404


@pytest.mark.parametrize(
    ("path", "allow"),
    [("/v1/jobs", "GET, HEAD, OPTIONS, POST"), ("/v1/jobs/x", "DELETE, GET, HEAD, OPTIONS"), ("/v1/jobs/x/cancel", "OPTIONS, POST")],
)
def test_every_method_of_a_path_is_named(live: Live, path: str, allow: str) -> None:
    options, patch = live.http.options(path), live.http.patch(path)
    assert (options.status_code, options.headers["allow"]) == (204, allow)
    problem(patch, 405, "method_not_allowed")
    assert patch.headers["allow"] == allow
    problem(live.http.options("/no-such-thing"), 404, "not_found")


def test_the_page_of_the_documentation_needs_no_other_host(live: Live) -> None:
    page = live.http.get("/docs").text
    loaded = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert loaded and not [address for address in loaded if "//" in address]
    for address in loaded:
        assert live.http.get(address).status_code == 200


# Health and failures


def test_health(live: Live) -> None:
    assert live.http.get("/healthz").json() == {"status": "ok"}
    ready = live.http.get("/readyz")
    assert (ready.status_code, ready.json()) == (200, {"status": "ok", "reasons": []})
    live.worker.records.worker_gone(live.worker.name)
    live.images.down = True
    ready = live.http.get("/readyz")
    assert ready.status_code == 503 and len(ready.json()["reasons"]) == 2
    live.redis.connected = False
    ready = live.http.get("/readyz")
    assert ready.status_code == 503 and any("broker" in reason for reason in ready.json()["reasons"])
    assert live.http.get("/healthz").status_code == 200


def test_a_broker_that_is_down(live: Live) -> None:
    live.redis.connected = False
    for answer in (live.http.post("/v1/jobs", json={"prompt": "a cat"}), live.http.get("/v1/jobs"), live.http.get("/v1/jobs/x/events")):
        problem(answer, 503, "broker_unavailable")


def test_a_store_that_is_down(live: Live) -> None:
    live.images.down = True
    problem(live.http.post("/v1/jobs", json={"prompt": "a cat"}), 503, "store_unavailable")
    live.images.down = False
    assert live.http.get("/v1/jobs").json()["jobs"] == []


def test_what_nobody_expected_is_logged_and_kept_from_the_client(
    live: Live, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken() -> None:
        raise RuntimeError("an inner secret")

    monkeypatch.setattr(live.client, "models", broken)
    with caplog.at_level(logging.ERROR):
        answer = live.http.get("/v1/models")
    problem(answer, 500, "internal_error")
    assert "secret" not in answer.text and "Traceback" not in answer.text
    assert any(record.name.startswith("latentline") and record.exc_info for record in caplog.records)


def test_a_tenant_over_its_cap_is_told_when_to_come_back(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live.client, "settings", Settings(tenant_cap=10))
    live.submit(num_inference_steps=9, guidance_scale=1.0)
    answer = live.http.post("/v1/jobs", json={"prompt": "a cat", "num_inference_steps": 9})
    problem(answer, 429, "tenant_quota_exceeded")
    assert answer.headers["retry-after"] == "5"
    assert "retry-after" not in live.http.get("/v1/jobs/no-such-job").headers


def test_a_model_whose_workers_are_silent_is_not_offered(live: Live) -> None:
    live.worker.redis.delete(routing.announced_at_key())
    answer = live.http.post("/v1/jobs", json={"prompt": "a cat"})
    problem(answer, 503, "no_worker")
    assert answer.headers["retry-after"] == "5"
    assert live.http.get("/v1/models").json() == {"models": []}


def test_the_client_is_closed_with_the_application(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[AsyncClient] = []

    async def close(self: AsyncClient) -> None:
        closed.append(self)

    monkeypatch.setattr(AsyncClient, "close", close)
    app = create_app()

    async def life() -> AsyncClient:
        async with app.router.lifespan_context(app):
            assert not closed
            opened: AsyncClient = app.state.client
            return opened

    assert [asyncio.run(life())] == closed


# OpenAPI


def references(node: Any) -> Iterator[str]:
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    if isinstance(node, dict) and isinstance(node.get("$ref"), str):
        yield node["$ref"]
    for child in children:
        yield from references(child)


def test_the_document_shows_the_request_and_the_errors(live: Live) -> None:
    document = live.http.get("/openapi.json").json()
    submit = document["paths"]["/v1/jobs"]["post"]
    schema = submit["requestBody"]["content"]["application/json"]["schema"]
    if "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    assert schema["required"] == ["prompt"] and "guidance_scale" in schema["properties"]
    assert {"202", "409", "413", "415", "422", "503"} <= set(submit["responses"])
    assert "404" in document["paths"]["/v1/jobs/{job_id}"]["get"]["responses"]


def test_every_reference_of_the_document_leads_somewhere(live: Live) -> None:
    document = live.http.get("/openapi.json").json()
    for reference in references(document):
        place = document
        for part in reference.removeprefix("#/").split("/"):
            assert part in place, reference
            place = place[part]


def test_the_document_knows_one_shape_of_errors(live: Live) -> None:
    assert "HTTPValidationError" not in live.http.get("/openapi.json").json()["components"]["schemas"]


def test_the_document_types_callbacks_events_and_headers(live: Live) -> None:
    document = live.http.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    schemas = document["components"]["schemas"]
    assert set(document["webhooks"]) == {"job.running", "job.succeeded", "job.failed", "job.cancelled"}
    told = document["webhooks"]["job.succeeded"]["post"]
    assert {one["name"] for one in told["parameters"]} == {"webhook-id", "webhook-timestamp", "webhook-signature"}
    assert told["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/CallbackMessage")
    assert {"url", "url_expires_at", "sha256"} <= set(schemas["CallbackImage"]["properties"]) and "warnings" in schemas["CallbackData"][
        "required"
    ]
    streams = [
        answer["content"]["text/event-stream"]
        for path in document["paths"].values()
        for operation in path.values()
        for answer in operation["responses"].values()
        if "text/event-stream" in answer.get("content", {})
    ]
    assert streams and all(stream["x-event-data"]["$ref"].endswith("/JobEventData") for stream in streams)
    submit, read = document["paths"]["/v1/jobs"]["post"], document["paths"]["/v1/jobs/{job_id}"]["get"]
    assert "Location" in submit["responses"]["202"]["headers"] and "Retry-After" in submit["responses"]["429"]["headers"]
    assert "ETag" in read["responses"]["200"]["headers"] and "ETag" in read["responses"]["304"]["headers"]


def test_what_is_sent_is_what_the_document_says(live: Live) -> None:
    """Every event of a job, and its answer, against the schemas."""
    document = live.http.get("/openapi.json").json()
    job_id = live.submit(preview_every=1)["id"]
    live.worker.run_all()
    events = sse(live.http.get(f"/v1/jobs/{job_id}/events").text)

    def check(name: str, value: Any) -> None:
        schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
        jsonschema.Draft202012Validator(schema).validate(value)

    known = set(document["components"]["schemas"]["JobEventData"]["properties"])
    for _, event, data in events:
        if event.startswith("job."):
            check("JobEventData", data)
            assert set(data) <= known, event
    check("JobAnswer", live.http.get(f"/v1/jobs/{job_id}").json())
    check("JobPage", live.http.get("/v1/jobs").json())


# Long polls, deletion, pictures and other origins


def test_a_long_poll_is_answered_when_the_job_ends(live: Live) -> None:
    job_id = live.submit()["id"]
    timer = threading.Timer(0.3, live.worker.run_all)
    timer.start()
    job = live.http.get(f"/v1/jobs/{job_id}", params={"wait": 30}).json()
    timer.join()
    assert job["status"] == "succeeded" and job["images"]
    assert live.http.get(f"/v1/jobs/{job_id}", params={"wait": 30}).json() == job, "a job that has ended is answered at once"


def test_a_long_poll_ends_without_the_job(live: Live) -> None:
    job_id = live.submit()["id"]
    assert live.http.get(f"/v1/jobs/{job_id}", params={"wait": 0.2}).json()["status"] == "queued"
    for wait in (-1, 61, "x"):
        assert problem(live.http.get(f"/v1/jobs/{job_id}", params={"wait": wait}), 422, "invalid_request")["field"] == "wait"
    problem(live.http.get("/v1/jobs/absent", params={"wait": 5}), 404, "job_not_found")


def test_a_deleted_job_is_gone_and_its_key_is_free(live: Live) -> None:
    body = {"prompt": "a cat", "idempotency_key": "k"}
    job_id = live.http.post("/v1/jobs", json=body).json()["id"]
    assert "cancel it first" in problem(live.http.delete(f"/v1/jobs/{job_id}"), 409, "job_not_ended")["message"]
    live.worker.run_all()
    answer = live.http.delete(f"/v1/jobs/{job_id}")
    assert (answer.status_code, answer.content) == (204, b"")
    problem(live.http.get(f"/v1/jobs/{job_id}"), 404, "job_not_found")
    problem(live.http.delete(f"/v1/jobs/{job_id}"), 404, "job_not_found")
    problem(live.http.get(f"/v1/jobs/{job_id}/events"), 404, "job_not_found")
    assert live.http.get("/v1/jobs").json()["jobs"] == [] == live.http.get("/v1/jobs", params={"status": "succeeded"}).json()["jobs"]
    assert live.worker.records.expired() == [f"default/{job_id}"], "its pictures are due for deletion"
    assert live.http.post("/v1/jobs", json=body).json()["id"] != job_id


def picture(live: Live) -> tuple[str, bytes]:
    """The path of a picture, and its bytes."""
    job_id = live.submit()["id"]
    live.worker.run_all()
    (data,) = live.images.objects.values()
    return f"/v1/jobs/{job_id}/images/0", data


def test_a_picture_comes_through_the_api(live: Live) -> None:
    path, data = picture(live)
    answer = live.http.get(path)
    assert (answer.status_code, answer.content, answer.headers["content-type"]) == (200, data, "image/png")
    assert answer.headers["cache-control"].startswith("private, max-age=") and answer.headers["x-content-type-options"] == "nosniff"
    assert live.http.get(path, headers={"If-None-Match": answer.headers["etag"]}).status_code == 304
    head = live.http.head(path)
    assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", str(len(data)))
    for number, status in (("1", 404), ("-1", 404)):
        problem(live.http.get(path[:-1] + number), status, "picture_not_found")
    problem(live.http.get(path[:-1] + "x"), 422, "invalid_request")
    problem(live.http.get("/v1/jobs/absent/images/0"), 404, "job_not_found")
    live.images.down = True
    problem(live.http.get(path), 503, "store_unavailable")


@pytest.mark.parametrize(
    ("asked", "status", "first", "last"),
    [
        ("bytes=0-9", 206, 0, 9),
        ("bytes=10-", 206, 10, -1),
        ("bytes=-7", 206, -7, -1),
        ("bytes=5-999999", 206, 5, -1),
        ("bytes=999999-", 416, 0, 0),
        ("bytes=-0", 416, 0, 0),
        ("bytes=9-5", 200, 0, -1),
        ("bytes=-", 200, 0, -1),
        ("bytes=0-1,4-5", 200, 0, -1),
        ("lines=0-1", 200, 0, -1),
    ],
)
def test_parts_of_a_picture(live: Live, asked: str, status: int, first: int, last: int) -> None:
    path, data = picture(live)
    answer = live.http.get(path, headers={"Range": asked})
    assert answer.status_code == status
    if status == 416:
        assert answer.headers["content-range"] == f"bytes */{len(data)}"
        return
    start, end = first % len(data), last % len(data)
    assert answer.content == data[start : end + 1]
    assert answer.headers.get("content-range") == (f"bytes {start}-{end}/{len(data)}" if status == 206 else None)
    assert live.http.get(path, headers={"Range": asked, "If-Range": '"other"'}).content == data


def test_only_pages_of_the_listed_origins_may_call() -> None:
    app = create_app(Settings(auth="none", cors_origins="https://app.example,http://localhost:3000"))

    def call(method: str, path: str, **headers: str) -> httpx.Response:
        async def ask() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
                return await client.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})

        return asyncio.run(ask())

    asked = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "content-type"}
    allowed = call("OPTIONS", "/v1/jobs", Origin="https://app.example", **asked)
    assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == "https://app.example"
    assert call("OPTIONS", "/v1/jobs", Origin="https://other.example", **asked).status_code == 400
    answer = call("GET", "/healthz", Origin="http://localhost:3000")
    assert answer.headers["access-control-allow-origin"] == "http://localhost:3000"
    assert "ETag" in answer.headers["access-control-expose-headers"]
    assert "access-control-allow-origin" not in call("GET", "/healthz", Origin="https://other.example").headers
    assert call("OPTIONS", "/v1/jobs").headers["allow"] == "GET, HEAD, OPTIONS, POST"


@pytest.mark.parametrize(
    "origins", ["*", "app.example", "https://app.example/", "https://*.example", "https://a.example, https://b.example"]
)
def test_origins_that_no_browser_sends_are_refused(origins: str) -> None:
    with pytest.raises(ValidationError, match="origins separated by commas"):
        Settings(cors_origins=origins)
