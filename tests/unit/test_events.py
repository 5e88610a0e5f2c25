"""Event streams over HTTP, of one job and of many: nothing lost, nothing twice, and a clean end."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import redis
from support.live_api import Live, Told, live_api, new_key, problem, sse

from latentline import Settings, event_reader, records, routing
from latentline.api import events as api_events
from latentline.api import streams as api_streams
from latentline.api import tokens
from latentline.api.cursors import MAX_JOBS, Cursor, GroupCursor
from latentline.api.estimates import Estimates
from latentline.api.groups import Groups
from latentline.api.places import Places
from latentline.api.streams import Streams
from latentline.errors import InvalidRequest
from latentline.jobs import JobEvent, Phase
from latentline.keys import NewKey
from latentline.listener import GONE, POSITION
from latentline.models import StepCost, Working
from latentline.records import Created
from latentline.testing import MODEL


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Iterator[Live]:
    with live_api(monkeypatch) as running:
        yield running


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Live]:
    """An API that asks for keys."""
    monkeypatch.setattr(Streams, "check_s", 0.05)
    with live_api(monkeypatch, Settings(auth="keys")) as running:
        yield running


def first_of(lines: Iterator[str], start: str) -> str:
    """What follows ``start`` on the first line that begins with it."""
    return next(line for line in lines if line.startswith(start)).removeprefix(start)


# One job


def test_events_tell_the_whole_story_and_end(live: Live) -> None:
    job_id = live.submit()["id"]
    live.worker.run_all()
    answer = live.http.get(f"/v1/jobs/{job_id}/events")
    *story, end = sse(answer.text)
    assert end == (None, "end", {"type": "end"}) and answer.text.startswith("retry: ")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert [kind for _, kind, _ in story] == ["job.queued", "job.running", *["job.progress"] * 3, "job.succeeded"]
    assert all(data["type"] == kind and data["job_id"] == job_id for _, kind, data in story)
    assert [data["step"] for _, kind, data in story if kind == "job.progress"] == [1, 2, 2]
    assert story[-1][2]["images"] == live.http.get(f"/v1/jobs/{job_id}").json()["images"]


def test_events_resume_after_the_last_one_seen(live: Live) -> None:
    job_id = live.submit()["id"]
    live.worker.run_all()
    story = sse(live.http.get(f"/v1/jobs/{job_id}/events").text)

    def resume(last: str) -> httpx.Response:
        return live.http.get(f"/v1/jobs/{job_id}/events", headers={"Last-Event-ID": last})

    assert sse(resume(story[2][0]).text) == story[3:]
    assert resume(story[-2][0]).status_code == 204  # an EventSource then stays away
    for malformed in ("x", "1-2-3", "-1", "1-x", "9" * 30):
        assert problem(resume(malformed), 422, "invalid_request")["field"] == "last_event_id"


def test_events_arrive_while_the_job_runs(live: Live) -> None:
    job_id = live.submit()["id"]
    with live.http.stream("GET", f"/v1/jobs/{job_id}/events") as answer:
        lines = answer.iter_lines()
        assert first_of(lines, "event: ") == "job.queued"
        live.worker.run_all()  # only now: what follows has to come over the open answer
        assert [line for line in lines if line.startswith("event: ")][-1] == "event: end"


def test_a_quiet_stream_is_kept_alive(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_events, "KEEP_ALIVE_S", 0.01)
    job_id = live.submit()["id"]
    with live.http.stream("GET", f"/v1/jobs/{job_id}/events") as answer:
        assert any(line.startswith(":") for line in answer.iter_lines())


def test_a_stream_whose_client_goes_away_leaves_nothing(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_events, "KEEP_ALIVE_S", 0.05)
    job_id = live.submit()["id"]
    with live.http.stream("GET", f"/v1/jobs/{job_id}/events") as answer:
        lines = answer.iter_lines()  # kept: the connection closes with it
        assert next(lines)
        assert live.client._events.jobs
    for _ in range(6000):
        if not live.client._events.jobs:
            return
        time.sleep(0.01)
    pytest.fail("somebody still listens")


def test_a_job_that_ends_while_the_stream_opens_still_shows_its_end(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = live.submit()["id"]
    last = sse_first_id(live, job_id)
    redis: Any = live.client._redis  # the seam below everything that decides whether a stream has ended
    read = redis.xread

    async def read_then_end(*args: Any, **kwargs: Any) -> Any:
        found = await read(*args, **kwargs)
        live.worker.run_all()
        return found

    monkeypatch.setattr(redis, "xread", read_then_end)
    story = sse(live.http.get(f"/v1/jobs/{job_id}/events", headers={"Last-Event-ID": last}).text)
    assert [kind for _, kind, _ in story[-2:]] == ["job.succeeded", "end"]


def sse_first_id(live: Live, job_id: str) -> str:
    with live.http.stream("GET", f"/v1/jobs/{job_id}/events") as answer:
        return first_of(answer.iter_lines(), "id: ")


# Many jobs on one stream


def follow(live: Live, *job_ids: str, last: str | None = None, **headers: str) -> httpx.Response:
    given = {**headers, **({"Last-Event-ID": last} if last else {})}
    return live.http.get("/v1/events", params={"jobs": ",".join(job_ids)}, headers=given)


def by_job(story: Told) -> dict[str, list[tuple[str, Any]]]:
    """The type and number of every event of each job, in their order."""
    found: dict[str, list[tuple[str, Any]]] = {}
    for _, kind, data in story:
        if kind not in ("end", POSITION):
            found.setdefault(data["job_id"], []).append((kind, data.get("seq")))
    return found


WHOLE = ["job.queued", "job.running", *["job.progress"] * 3, "job.succeeded"]


def test_one_stream_tells_the_story_of_many_jobs_with_their_pictures(live: Live) -> None:
    ids = [live.submit()["id"] for _ in range(5)]
    with live.http.stream("GET", "/v1/events", params={"jobs": ",".join(ids)}) as answer:
        lines = answer.iter_lines()
        assert next(lines) == f"retry: {api_events.RETRY_MS}" and first_of(lines, "event: ") == "job.queued"
        live.worker.run_all()
        story = sse("\n".join(["event: job.queued", *lines]))
    assert story[-1][1] == "end"
    assert {job_id: [kind for kind, _ in told] for job_id, told in by_job(story).items()} == dict.fromkeys(ids, WHOLE)
    for _, kind, data in story:
        if kind == "job.succeeded":
            assert data["images"] == live.http.get(f"/v1/jobs/{data['job_id']}").json()["images"] and data["images"]


def test_a_stream_of_many_resumes_after_any_event_without_loss_or_repetition(live: Live) -> None:
    ids = [live.submit()["id"] for _ in range(4)]
    live.worker.run_all()
    *story, _ = sse(follow(live, *ids).text)
    for place, (event_id, _, _) in enumerate(story):
        assert event_id and len(event_id) < 30 * len(ids)
        rest = follow(live, *reversed(ids), last=event_id)  # in another order: an id names the jobs
        if place == len(story) - 1:
            assert rest.status_code == 204
        else:
            told, missing = by_job(sse(rest.text)), by_job(story[place + 1 :])
            assert told == missing
    further = live.submit()["id"]
    live.worker.run_all()
    assert by_job(sse(follow(live, *ids, further, last=story[-1][0]).text)).keys() == {further}
    last = live.http.get("/v1/events", params={"jobs": ",".join(ids), "last_event_id": story[-1][0]})
    assert last.status_code == 204, "the id may stand in the URL: a new EventSource cannot send the header"


def test_an_event_that_comes_between_two_resumes_is_told_once(live: Live) -> None:
    ids = [live.submit()["id"] for _ in range(2)]
    with live.http.stream("GET", "/v1/events", params={"jobs": ",".join(ids)}) as answer:
        lines = answer.iter_lines()
        seen = [first_of(lines, "id: ") for _ in ids]
    live.worker.run_all()
    assert [kind for told in by_job(sse(follow(live, *ids, last=seen[-1]).text)).values() for kind, _ in told] == WHOLE[1:] * 2


def test_a_job_that_is_not_there_ends_nothing_of_the_others(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentline.event_reader.BLOCK_MS", 10)
    monkeypatch.setattr("latentline.event_reader.CHECK_S", 0.0)
    there, goes = (live.submit()["id"] for _ in range(2))
    with live.http.stream("GET", "/v1/events", params={"jobs": f"{there},{goes},no-such-job"}) as answer:
        lines = answer.iter_lines()
        first = [first_of(lines, "event: ") for _ in range(5)]
        assert sorted(first) == [GONE, POSITION, POSITION, "job.queued", "job.queued"]
        live.worker.redis.delete(routing.job_key(goes), routing.events_key(goes))
        last = first_of(lines, "id: ")
        assert first_of(lines, "event: ") == GONE and json.loads(first_of(lines, "data: "))["job_id"] == goes
        live.worker.run(there)
        assert [line for line in lines if line.startswith("event: ")][-2:] == ["event: job.succeeded", "event: end"]
    assert by_job(sse(follow(live, there, goes, "no-such-job", last=last).text)).keys() == {there}, "what is gone is not told again"
    problem(follow(live, "no-such-job", "nor-this"), 404, "job_not_found")


@pytest.mark.parametrize("jobs", ["", ",,", ",".join(f"{i}" for i in range(MAX_JOBS + 1))])
def test_a_stream_has_a_bounded_number_of_jobs(live: Live, jobs: str) -> None:
    error = problem(live.http.get("/v1/events", params={"jobs": jobs}), 422, "invalid_request")
    assert error["field"] == "jobs" and str(MAX_JOBS) in error["allowed"]


@pytest.mark.parametrize("last", ["x", "1700000000000-0", "AAAAAAAA", "AAAAAAAA:1-", ".", "AAAAAAAA:1." * 200, "AAAAAAAA:" + "f" * 16, "ü"])
def test_an_id_that_no_stream_gave_is_refused(live: Live, last: str) -> None:
    job_id = live.submit()["id"]
    answer = live.http.get("/v1/events", params={"jobs": job_id, "last_event_id": last})
    assert problem(answer, 422, "invalid_request")["field"] == "last_event_id"


def test_a_cursor_keeps_every_position() -> None:
    cursor = Cursor()
    events = [JobEvent(id=f"{1700000000000 + i}-{i % 3}", type="job.progress", job_id=f"job {i % 7}", at=0) for i in range(50)]
    text = [cursor.told(event) for event in events][-1]
    again = Cursor.parse(text)
    assert [again.after(f"job {i}") for i in range(8)] == [
        *(next(event.id for event in reversed(events) if event.job_id == f"job {i}") for i in range(7)),
        None,
    ]
    with pytest.raises(InvalidRequest):
        Cursor.parse(text + ".")


def test_the_number_of_streams_is_bounded(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_streams, "MAX_STREAMS", 1)
    job_id = live.submit()["id"]
    with live.http.stream("GET", f"/v1/jobs/{job_id}/events") as answer:
        lines = answer.iter_lines()
        assert next(lines)
        refused = follow(live, job_id)
        problem(refused, 429, "too_many_streams")
        assert refused.headers["retry-after"]
        live.worker.run_all()
        assert list(lines)
    for _ in range(6000):
        if not live.app.state.streams._open:
            break
        time.sleep(0.01)
    assert follow(live, job_id).status_code == 200


# Places in the queue, and estimates


def test_a_stream_tells_places_in_the_queue_and_estimates(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Places, "look_s", 0.01)
    monkeypatch.setattr(Estimates, "life_s", 0.01)
    first, second, third = (live.submit(num_inference_steps=20)["id"] for _ in range(3))
    live.worker.records.heartbeat(live.worker.name, Working(costs={MODEL.id: StepCost(rows=8, step_s=0.4, pixels=64 * 64)}))
    while live.http.get(f"/v1/jobs/{third}").json()["eta_s"] is None:
        pass
    with live.http.stream("GET", "/v1/events", params={"jobs": third}) as answer:
        lines = answer.iter_lines()
        places = told_places(lines)
        assert next(places) == (2, 12.0)
        live.http.post(f"/v1/jobs/{first}/cancel")
        assert next(places) == (1, 10.0)
        live.http.post(f"/v1/jobs/{second}/cancel")
        assert next(places) == (0, 8.0)
        claim = live.worker.records.claim(third, "one", 30)
        assert claim is not None
        live.worker.progress(claim, Phase.DENOISING, 15)
        assert first_of(lines, "event: ") == "job.running" and first_of(lines, "event: ") == "job.progress"
        assert json.loads(first_of(lines, "data: "))["eta_s"] == 2.0
    again = follow(live, first, last=None)
    assert POSITION not in again.text, "a job that has ended has no place"


def test_a_look_at_places_is_bounded_and_jobs_take_turns(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Places, "look_s", 0.01)
    monkeypatch.setattr(Places, "most", 2)
    asked: list[int] = []
    positions = records.positions

    def counted(models: dict[str, str]) -> Any:
        asked.append(len(models))
        return positions(models)

    monkeypatch.setattr(records, "positions", counted)
    first, *others = (live.submit()["id"] for _ in range(6))
    with live.http.stream("GET", "/v1/events", params={"jobs": ",".join(others)}) as answer:
        lines = answer.iter_lines()
        before = [place_of(lines) for _ in others]
        live.http.post(f"/v1/jobs/{first}/cancel")
        after = [place_of(lines) for _ in others]
    assert dict(before) == {job_id: i + 1 for i, job_id in enumerate(others)}
    assert dict(after) == {job_id: i for i, job_id in enumerate(others)}, "each of them had its turn"
    assert set(asked) == {1, 2}


def place_of(lines: Iterator[str]) -> tuple[str, int]:
    first_of(lines, f"event: {POSITION}")
    data = json.loads(first_of(lines, "data: "))
    return data["job_id"], data["queue_position"]


def told_places(lines: Iterator[str]) -> Iterator[tuple[int, float]]:
    """Place and estimate of each event that tells them; those events have no id, so a stream never resumes from them."""
    last = ""
    for line in lines:
        if line == f"event: {POSITION}":
            assert not last.startswith("id: ")
            data = json.loads(first_of(lines, "data: "))
            yield data["queue_position"], data["eta_s"]
        last = line


# The broker is away


@pytest.fixture
def outage(monkeypatch: pytest.MonkeyPatch) -> None:
    """The API tries again, and says that it is there, without pauses that a test would wait for."""
    monkeypatch.setattr(event_reader, "AGAIN_S", 0.01)
    monkeypatch.setattr(api_events, "KEEP_ALIVE_S", 0.02)


@pytest.mark.usefixtures("outage")
def test_a_stream_outlives_an_outage_and_loses_nothing(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    broker: Any = live.client._redis
    read, away, tries = broker.xread, False, 0

    async def cut_off(*args: Any, **kwargs: Any) -> Any:
        nonlocal tries
        if away and kwargs.get("block") is not None:
            tries += 1
            raise redis.ConnectionError("cut off")
        return await read(*args, **kwargs)

    monkeypatch.setattr(event_reader, "BLOCK_MS", 10)
    monkeypatch.setattr(broker, "xread", cut_off)
    ids = [live.submit()["id"] for _ in range(3)]
    with live.http.stream("GET", "/v1/events", params={"jobs": ",".join(ids)}) as answer:
        lines = answer.iter_lines()
        told = read_until(lines, lambda told: len(told) == len(ids))
        away = True
        while tries < 3:
            assert next(lines) is not None  # keep-alive comments
        live.worker.run_all()  # this process alone is cut off
        away = False
        told += sse("\n".join(lines))
    assert told[-1][1] == "end"
    story = [one for one in told if one[1] not in (POSITION, "end")]
    assert by_job(story) == by_job(sse(follow(live, *ids).text)), "nothing is lost, nothing comes twice"


@pytest.mark.usefixtures("outage")
def test_streams_of_a_key_and_by_metadata_outlive_an_outage(guarded: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Groups, "look_s", 0.01)
    ann = new_key(guarded)
    headers = {"Authorization": f"Bearer {ann}"}

    def submit() -> str:
        body = {"prompt": "a cat", "metadata": {"session": "s"}}
        return str(guarded.http.post("/v1/jobs", json=body, headers=headers).raise_for_status().json()["id"])

    first = submit()
    with guarded.http.stream("GET", "/v1/events", params={"metadata.session": "s"}, headers=headers) as answer:
        lines = answer.iter_lines()
        assert [data["job_id"] for _, _, data in read_until(lines, lambda told: len(told) == 1)] == [first]
        guarded.redis.connected = False
        for _ in range(20):
            assert first_of(lines, ": ") == "keep-alive"
        problem(guarded.http.get(f"/v1/jobs/{first}", headers=headers), 503, "broker_unavailable")
        guarded.redis.connected = True
        second = submit()
        guarded.worker.run_all()
        told = read_until(lines, lambda told: sum(kind == "job.succeeded" for _, kind, _ in told) == 2)
        assert {data["job_id"] for _, _, data in told} == {first, second}
        revoke(guarded, headers)
        for _ in lines:  # until the revoked key ends it
            pass


@pytest.mark.usefixtures("outage")
@pytest.mark.parametrize("name", ["live", "guarded"])
def test_an_eventsource_comes_back_until_the_broker_does(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    api: Live = request.getfixturevalue(name)
    headers = {"Authorization": f"Bearer {new_key(api, tenant='default')}"} if name == "guarded" else {}
    monkeypatch.setattr(type(api.client.event_reader), "outage_s", 0.1)
    job_id = str(api.http.post("/v1/jobs", json={"prompt": "a cat"}, headers=headers).json()["id"])
    with api.http.stream("GET", f"/v1/jobs/{job_id}/events", headers=headers) as answer:
        lines = answer.iter_lines()
        ((last, _, _),) = read_until(lines, lambda told: len(told) == 1)
        api.redis.connected = False
        assert not [line for line in lines if "end" in line], "too long an outage ends it, and not as the last event does"
    source = {**headers, "Accept": "text/event-stream"}
    for path in (f"/v1/jobs/{job_id}/events", f"/v1/events?jobs={job_id}", "/v1/events?metadata.session=s"):
        problem(api.http.get(path, headers=headers), 503, "broker_unavailable")
        away = api.http.get(path, headers=source)
        assert (away.status_code, away.text) == (200, f"retry: {api_events.AWAY_MS}\n\n")
        assert away.headers["content-type"].startswith("text/event-stream")
    api.redis.connected = True
    api.worker.run_all()
    story = sse(api.http.get(f"/v1/jobs/{job_id}/events", headers={**source, "Last-Event-ID": str(last)}).text)
    kinds = [kind for _, kind, _ in story]
    assert kinds[0] == "job.running" and kinds[-2:] == ["job.succeeded", "end"]


def test_a_waiting_poll_does_not_wait_for_a_broker_that_is_away(live: Live) -> None:
    job_id = live.submit()["id"]
    threading.Timer(0.1, lambda: setattr(live.redis, "connected", False)).start()
    problem(live.http.get(f"/v1/jobs/{job_id}", params={"wait": 60}), 503, "broker_unavailable")


def read_until(lines: Iterator[str], enough: Callable[[Told], bool]) -> Told:
    """The events of a stream, without places in the queue, until there are enough of them."""
    told: Told = []
    block: list[str] = []
    while not enough(told):
        line = next(lines)
        block.append(line)
        if not line:
            told += [one for one in sse("\n".join(block)) if one[1] != POSITION]
            block = []
    return told


# Tokens, and keys that are revoked


def key(live: Live, tenant: str = "ann", *scopes: str) -> dict[str, str]:
    text, _ = records.run(live.worker.redis, records.create_key(NewKey.parse(tenant=tenant, scopes=scopes or ("submit", "read"))))
    return {"Authorization": f"Bearer {text}"}


def submit(live: Live, headers: dict[str, str]) -> str:
    answer = live.http.post("/v1/jobs", json={"prompt": "a cat", "num_inference_steps": 2}, headers=headers)
    return str(answer.json()["id"])


def token_of(live: Live, headers: dict[str, str]) -> str:
    answer = live.http.post("/v1/events/token", headers=headers)
    assert answer.status_code == 200 and answer.headers["cache-control"] == "no-store", answer.text
    return str(answer.json()["token"])


def test_a_token_opens_the_streams_of_its_tenant_and_nothing_else(guarded: Live) -> None:
    ann, bob, admin = key(guarded), key(guarded, "bob"), key(guarded, "ann", "admin")
    ours, theirs = submit(guarded, ann), submit(guarded, bob)
    guarded.worker.run_all()
    for holder in (ann, admin):  # an administrator's token opens no other tenant's jobs either
        token = token_of(guarded, holder)
        assert token.startswith("llt_") and guarded.http.get(f"/v1/jobs/{ours}/events", params={"token": token}).status_code == 200
        story = sse(guarded.http.get("/v1/events", params={"jobs": f"{ours},{theirs}", "token": token}).text)
        assert {data["job_id"]: kind for _, kind, data in story if kind != "end"} == {ours: "job.succeeded", theirs: GONE}
        problem(guarded.http.get(f"/v1/jobs/{theirs}/events", params={"token": token}), 404, "job_not_found")
        for path in (f"/v1/jobs/{ours}", "/v1/jobs", f"/v1/jobs/{ours}/images/0", "/v1/models"):
            problem(guarded.http.get(path, params={"token": token}), 401, "not_authenticated")
            problem(guarded.http.get(path, headers={"Authorization": f"Bearer {token}"}), 401, "not_authenticated")
        problem(guarded.http.post("/v1/events/token", params={"token": token}), 401, "not_authenticated")
    problem(guarded.http.post("/v1/events/token", headers=key(guarded, "ann", "submit")), 403, "not_allowed")


def test_a_token_that_is_wrong_or_old_opens_nothing(guarded: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    ann, bob = key(guarded), key(guarded, "bob")
    job_id, token = submit(guarded, ann), token_of(guarded, ann)
    parts, other = token.split("_"), token_of(guarded, bob).split("_")
    later = "_".join([*parts[:2], f"{int(parts[2], 16) + 1:08x}", parts[3]])
    mixed = "_".join([*parts[:3], other[3]])
    stranger = "_".join(["llt", "0" * 12, *parts[2:]])
    for wrong in ("", "x", token[:-1], token + "0", later, mixed, stranger, "_".join([*other[:3], parts[3]])):
        problem(guarded.http.get(f"/v1/jobs/{job_id}/events", params={"token": wrong}), 401, "not_authenticated")
    monkeypatch.setattr(tokens, "LIFE_S", -1)
    assert (
        "expired"
        in problem(guarded.http.get(f"/v1/jobs/{job_id}/events", params={"token": token_of(guarded, ann)}), 401, "not_authenticated")[
            "message"
        ]
    )


def revoke(live: Live, headers: dict[str, str]) -> None:
    records.run(live.worker.redis, records.revoke_key(headers["Authorization"].split("_")[1]))


def test_streams_of_a_token_end_when_its_key_is_revoked(guarded: Live) -> None:
    ann = key(guarded)
    job_id, token = submit(guarded, ann), token_of(guarded, ann)
    with guarded.http.stream("GET", "/v1/events", params={"jobs": job_id, "token": token}) as answer:
        lines = answer.iter_lines()
        assert first_of(lines, "event: ") == "job.queued"
        revoke(guarded, ann)
        assert {line for line in lines if line.startswith("event: ")} <= {f"event: {POSITION}"}  # it ends, although the job has not
    problem(guarded.http.get("/v1/events", params={"jobs": job_id, "token": token}), 401, "not_authenticated")


def test_a_long_poll_ends_when_its_key_is_revoked(guarded: Live) -> None:
    ann = key(guarded)
    job_id = submit(guarded, ann)
    guarded.http.timeout = httpx.Timeout(120)
    poll: list[httpx.Response] = []
    waiting = threading.Thread(target=lambda: poll.append(guarded.http.get(f"/v1/jobs/{job_id}", params={"wait": 60}, headers=ann)))
    waiting.start()
    while not guarded.app.state.streams._open and waiting.is_alive():
        time.sleep(0.01)
    revoke(guarded, ann)
    waiting.join()
    problem(poll[0], 401, "not_authenticated")
    assert guarded.worker.redis.hget(routing.job_key(job_id), "status") == "queued"


def test_without_keys_a_token_is_empty_and_not_asked_for(live: Live) -> None:
    assert live.http.post("/v1/events/token").json() == {"token": "", "expires_at": None}
    job_id = live.submit()["id"]
    live.worker.run_all()
    assert live.http.get("/v1/events", params={"jobs": job_id, "token": ""}).status_code == 200


# Jobs by a value in their metadata


def group(live: Live, last: str | None = None, **params: str) -> Any:
    query = {"metadata.session": "abc", **params, **({"last_event_id": last} if last else {})}
    return live.http.stream("GET", "/v1/events", params=query)


def read(lines: Iterator[str], num_ends: int, told: Told | None = None) -> Told:
    """What a stream without an end tells until so many jobs have ended."""
    told = [] if told is None else told
    fields: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(": ")
        fields |= {name: value}
        if not line:
            if "event" in fields:
                if fields["event"] != POSITION:
                    told.append((fields["id"], fields["event"], json.loads(fields["data"])))
                num_ends -= fields["event"] in ("job.succeeded", GONE)
            fields = {}
            if num_ends <= 0:
                break
    return told


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Groups, "look_s", 0.01)


def ours(live: Live, count: int = 1, **metadata: Any) -> list[str]:
    return [live.submit(metadata={"session": "abc", **metadata})["id"] for _ in range(count)]


@pytest.mark.usefixtures("quick")
def test_a_stream_by_metadata_tells_of_the_jobs_before_and_of_those_that_come(live: Live) -> None:
    before = ours(live, 2, name='with "quotes" and ü')
    for other in ({"session": "abcd"}, {"other": "abc"}, {"note": '"session":"abc"'}, {"session": 5}, {}):
        live.submit(metadata=other)
    live.submit(metadata={"session": "abc"}, tenant="another")
    with group(live) as answer:
        lines = answer.iter_lines()
        live.worker.run_all()
        told = read(lines, 2)
        assert {job: [kind for kind, _ in story] for job, story in by_job(told).items()} == dict.fromkeys(before, WHOLE)
        later = ours(live, 3)
        live.worker.run_all()
        told = read(lines, 3)
        assert {job: [kind for kind, _ in story] for job, story in by_job(told).items()} == dict.fromkeys(later, WHOLE)
        assert told[-1][2]["images"]
    with group(live, tenant="another") as answer:
        assert len(by_job(read(answer.iter_lines(), 1))) == 1


@pytest.mark.usefixtures("quick")
def test_a_stream_by_metadata_resumes_after_any_event_without_loss_or_repetition(live: Live) -> None:
    ours(live, 3)
    live.worker.run_all()
    with group(live) as answer:
        lines = answer.iter_lines()
        told = read(lines, 3)
        ours(live, 2)
        live.worker.run_all()
        read(lines, 2, told)
    last = ours(live, 1)  # while nobody listens
    live.worker.run_all()
    for place in range(0, len(told)):
        event_id = told[place][0]
        missing = by_job(told[place + 1 :])
        with group(live, last=event_id) as answer:
            again = by_job(read(answer.iter_lines(), 1 + sum(1 for story in missing.values() if story[-1][0] == "job.succeeded")))
        assert list(again.pop(last[0])) == [(kind, seq) for seq, kind in enumerate(WHOLE, 1)]
        assert again == missing


@pytest.mark.usefixtures("quick")
def test_jobs_beyond_the_places_of_a_stream_follow_when_others_end(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentline.api.groups.MAX_JOBS", 3)
    monkeypatch.setattr("latentline.api.cursors.MAX_JOBS", 3)
    ids = ours(live, 9)
    with group(live) as answer:
        lines = answer.iter_lines()
        live.worker.run_all()
        told = read(lines, 5)
    assert max(len(event_id.split(".")) for event_id, _, _ in told if event_id) <= 1 + 2 * 3
    with group(live, last=told[-1][0]) as answer:
        read(answer.iter_lines(), 4, told)
    assert {job: [kind for kind, _ in story] for job, story in by_job(told).items()} == dict.fromkeys(ids, WHOLE)


def test_jobs_that_ended_long_ago_leave_the_id_of_a_stream() -> None:
    cursor, at_ms = GroupCursor(), 1_700_000_000_000
    for i in range(1000):
        cursor.begin(Created(f"job {i}", at_ms + 500 * i, {}))
        text = cursor.told(JobEvent(id=f"{at_ms + i}-0", type="job.succeeded", job_id=f"job {i}", at=0))
    assert len(text.split(".")) <= 4
    again = GroupCursor.parse(text)
    found = [Created(f"job {i}", at_ms + 500 * i, {}) for i in range(1001)]
    untold = again.untold([one for one in found if one.at_ms >= (again.since_ms or 0)])
    assert untold[-1] == found[-1] and all(again.after(one.job_id) for one in untold[:-1])


@pytest.mark.usefixtures("quick")
def test_a_stream_that_closes_leaves_nothing_of_its_group(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_events, "KEEP_ALIVE_S", 0.05)
    ours(live)
    with group(live) as answer:
        lines = answer.iter_lines()
        assert first_of(lines, "event: ") == "job.queued"
    for _ in range(6000):
        if not live.app.state.groups._tenants and not live.client.event_reader.jobs:
            return
        time.sleep(0.01)
    pytest.fail("somebody still listens")


@pytest.mark.parametrize(
    "query", ["", "jobs=x&metadata.session=abc", "metadata.session=abc&metadata.session=abc", "metadata.a=1&metadata.b=2", "session=abc"]
)
def test_a_stream_is_of_named_jobs_or_of_one_value(live: Live, query: str) -> None:
    assert problem(live.http.get(f"/v1/events?{query}"), 422, "invalid_request")["field"] == "jobs"


@pytest.mark.parametrize("last", ["x", "g1", "g1-2.", "g1-2.x", "g-2", "AAAAAAAA:1", "g1-2" + ".AAAAAAAA:1" * 301, "gg-1"])
def test_an_id_that_no_stream_by_metadata_gave_is_refused(live: Live, last: str) -> None:
    answer = live.http.get("/v1/events", params={"metadata.session": "abc", "last_event_id": last})
    assert problem(answer, 422, "invalid_request")["field"] == "last_event_id"


@pytest.mark.usefixtures("quick")
def test_a_stream_by_metadata_is_of_the_keys_tenant(guarded: Live) -> None:
    ann, bob, admin = key(guarded), key(guarded, "bob"), key(guarded, "ops", "admin")
    body = {"prompt": "a cat", "num_inference_steps": 2, "metadata": {"session": "abc"}}
    ids = {name: guarded.http.post("/v1/jobs", json=body, headers=headers).json()["id"] for name, headers in (("ann", ann), ("bob", bob))}
    guarded.worker.run_all()
    for name, headers, params in (("ann", ann, {}), ("bob", bob, {"tenant": "bob"}), ("bob", admin, {"tenant": "bob"})):
        query = {"metadata.session": "abc", **params}
        with guarded.http.stream("GET", "/v1/events", params=query, headers=headers) as answer:
            assert by_job(read(answer.iter_lines(), 1)).keys() == {ids[name]}
    foreign = guarded.http.get("/v1/events", params={"metadata.session": "abc", "tenant": "bob"}, headers=ann)
    assert problem(foreign, 422, "invalid_request")["field"] == "tenant"
    token = token_of(guarded, ann)
    with guarded.http.stream("GET", "/v1/events", params={"metadata.session": "abc", "token": token}) as answer:
        lines = answer.iter_lines()
        assert by_job(read(lines, 1)).keys() == {ids["ann"]}
        revoke(guarded, ann)
        assert {line for line in lines if line.startswith("event: ")} <= {f"event: {POSITION}"}
