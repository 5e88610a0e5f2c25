"""API keys: what each opens, and that nothing of one tenant reaches another."""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import click.testing
import fakeredis
import httpx
import pytest
from support.live_api import Live, live_api, new_key, problem

from latentline import AsyncClient, Settings, records, routing
from latentline.api.app import create_app
from latentline.api.auth import check_exposure
from latentline.api.dialects import DIALECTS
from latentline.api.streams import Streams
from latentline.cli import main
from latentline.errors import ConfigurationError, InvalidRequest, KeyNotFound
from latentline.keys import Credential, NewKey, generate
from latentline.testing import TINY_PNG

KEYS = Settings(auth="keys")
TINY_SHA256 = hashlib.sha256(TINY_PNG).hexdigest()  # of every picture here


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Iterator[Live]:
    monkeypatch.setattr(Streams, "check_s", 0.05)
    with live_api(monkeypatch, KEYS) as running:
        yield running


def make(live: Live, tenant: str = "ann", *scopes: str, **limits: int) -> dict[str, str]:
    """The headers of a new key's holder."""
    return {"Authorization": f"Bearer {new_key(live, *scopes, tenant=tenant, **limits)}"}


def prefix_of(headers: dict[str, str]) -> str:
    return headers["Authorization"].split("_")[1]


def submit(live: Live, headers: dict[str, str], **fields: Any) -> dict[str, Any]:
    answer = live.http.post("/v1/jobs", json={"prompt": "a cat", "num_inference_steps": 2, **fields}, headers=headers)
    assert answer.status_code == 202, answer.text
    job: dict[str, Any] = answer.json()
    return job


ROUTES = [
    ("POST", "/v1/jobs"), ("GET", "/v1/jobs"), ("GET", "/v1/jobs/x"), ("POST", "/v1/jobs/x/cancel"), ("GET", "/v1/jobs/x/events"),
    ("GET", "/v1/models"), ("GET", "/v1/loras"), ("DELETE", "/v1/jobs/x"), ("GET", "/v1/jobs/x/images/0"),
    ("GET", "/v1/fleet"), ("POST", "/v1/dead/x/replay"), ("DELETE", "/v1/dead/x"),
    ("GET", "/v1/jobs/x/timeline"),
    ("POST", "/v1/jobs/batch"), ("GET", "/v1/jobs/x/images/0/thumbnail"),
    ("GET", "/v1/events?jobs=x"), ("POST", "/v1/events/token"),
]  # fmt: skip
ADMINS = {route for route in ROUTES if route[1].startswith(("/v1/fleet", "/v1/dead"))}


READS = {(method, path) for method, path in ROUTES if method == "GET"} - ADMINS | {("POST", "/v1/events/token")}


def bare(route: tuple[str, str]) -> tuple[str, str]:
    """A route without its query."""
    return route[0], route[1].partition("?")[0]


# Who gets in


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_needs_a_key_that_is_right(live: Live, method: str, path: str) -> None:
    good = make(live)["Authorization"]
    other = make(live, "bob")["Authorization"]
    mixed = good[: len("Bearer ll_") + 13] + other[len("Bearer ll_") + 13 :]  # the prefix of one, the secret of the other
    for given in (None, "", "Bearer", "Bearer x", good.replace("Bearer", "Basic"), good[:-1], good + "x", mixed, f"Bearer {generate()[0]}"):
        answer = live.http.request(method, path, headers={} if given is None else {"Authorization": given})
        problem(answer, 401, "not_authenticated")
        assert answer.headers["www-authenticate"].startswith("Bearer")
    both = [("Authorization", good), ("Authorization", good)]
    twice = live.http.send(httpx.Request(method, live.http.base_url.join(path), headers=both))
    problem(twice, 401, "not_authenticated")


def test_every_route_of_the_api_is_in_the_table(live: Live) -> None:
    document = live.http.get("/openapi.json").json()
    served = {
        (method.upper(), path.format(job_id="x", number=0, dead_id="x")): operation
        for path, item in document["paths"].items()
        for method, operation in item.items()
    }
    assert served.keys() == {*map(bare, ROUTES), ("GET", "/healthz"), ("GET", "/readyz")}
    assert {scheme["scheme"] for scheme in document["components"]["securitySchemes"].values()} == {"bearer"}
    for route in map(bare, ROUTES):
        assert served[route]["security"] and {"401", "403"} <= served[route]["responses"].keys()


@pytest.mark.parametrize("prefix", DIALECTS)
def test_every_operation_in_the_document_of_a_dialect_asks_for_a_key_where_the_api_does(
    live: Live, monkeypatch: pytest.MonkeyPatch, prefix: str
) -> None:
    def document(live: Live) -> tuple[list[bool], bool]:
        found = live.http.get(f"{prefix}/openapi.json").json()
        asked = ["security" in operation for item in found["paths"].values() for operation in item.values()]
        return asked, "securitySchemes" in found["components"]

    asked, declared = document(live)
    assert asked and all(asked) and declared
    with live_api(monkeypatch, Settings(auth="none")) as without:
        asked, declared = document(without)
    assert asked and not any(asked) and not declared


def test_probes_need_no_key(live: Live) -> None:
    assert live.http.get("/healthz").status_code == live.http.get("/readyz").status_code == 200


@pytest.mark.parametrize(
    ("scope", "allowed"),
    [
        ("read", READS),
        ("submit", set(ROUTES) - READS - ADMINS),
        ("admin", set(ROUTES)),
    ],
)
def test_a_key_opens_what_its_scopes_say(live: Live, scope: str, allowed: set[tuple[str, str]]) -> None:
    headers = make(live, "ann", scope)
    for method, path in ROUTES:
        answer = live.http.request(method, path, headers=headers)
        if (method, path) in allowed:
            assert answer.status_code in (200, 404, 415)
        else:
            problem(answer, 403, "not_allowed")


def test_a_revoked_key_stops_at_the_next_request_and_the_last_one_opens_nothing(live: Live) -> None:
    headers = make(live)
    job = submit(live, headers)
    with live.http.stream("GET", f"/v1/jobs/{job['id']}/events", headers=headers) as stream:
        lines = stream.iter_lines()
        assert any(line.startswith("id: ") for line in lines)
        records.run(live.worker.redis, records.revoke_key(prefix_of(headers)))
        for method, path in ROUTES:
            problem(live.http.request(method, path, headers=headers), 401, "not_authenticated")
            problem(live.http.request(method, path), 401, "not_authenticated")
        problem(live.http.get(f"/v1/jobs/{job['id']}", headers=headers), 401, "not_authenticated")
        assert not [line for line in lines if "cancel" in line]  # it ends, although the job has not
    assert live.worker.redis.hget(routing.job_key(job["id"]), "status") == "queued"


def test_a_stream_of_another_key_goes_on_when_one_is_revoked(live: Live) -> None:
    first, second = make(live), make(live)
    job = submit(live, first)
    with live.http.stream("GET", f"/v1/jobs/{job['id']}/events", headers=second) as stream:
        lines = stream.iter_lines()
        assert any(line.startswith("id: ") for line in lines)
        records.run(live.worker.redis, records.revoke_key(prefix_of(first)))
        live.http.post(f"/v1/jobs/{job['id']}/cancel", headers=second)
        assert "event: job.cancelled" in list(lines)


# What a key may ask for


def test_the_tenant_is_the_keys(live: Live) -> None:
    headers = make(live)
    assert submit(live, headers)["request"]["tenant"] == "ann"
    assert submit(live, headers, tenant="ann")["request"]["tenant"] == "ann"
    error = problem(live.http.post("/v1/jobs", json={"prompt": "a cat", "tenant": "bob"}, headers=headers), 422, "invalid_request")
    assert error["field"] == "tenant" and "bob" in error["message"] and "ann" in error["allowed"]
    for tenant in (None, 7, "", ["ann"]):
        answer = live.http.post("/v1/jobs", json={"prompt": "a cat", "tenant": tenant}, headers=headers)
        assert problem(answer, 422, "invalid_request")["field"] == "tenant"


def test_an_admin_sees_all_tenants_and_others_see_their_own_only(live: Live) -> None:
    ann, bob, admin = make(live), make(live, "bob"), make(live, "ops", "admin")
    jobs = [submit(live, headers)["id"] for headers in (ann, bob, ann, admin)]

    def listed(headers: dict[str, str], **params: Any) -> list[str]:
        return [job["id"] for job in live.http.get("/v1/jobs", headers=headers, params=params).json()["jobs"]]

    assert set(listed(admin)) == set(jobs)
    assert set(listed(ann)) == {jobs[0], jobs[2]} == set(listed(ann, status="queued")) and listed(ann, status="running") == []
    assert listed(bob) == [jobs[1]]
    assert live.http.post(f"/v1/jobs/{jobs[1]}/cancel", headers=admin).json()["status"] == "cancelled"
    assert listed(bob, status="cancelled") == [jobs[1]] and listed(bob, status="queued") == []


def test_an_admin_lists_one_tenant_and_others_may_name_only_their_own(live: Live) -> None:
    ann, bob, admin = make(live), make(live, "bob"), make(live, "ops", "admin")
    jobs = {tenant: submit(live, headers)["id"] for tenant, headers in (("ann", ann), ("bob", bob))}
    for tenant in ("ann", "bob"):
        (job,) = live.http.get("/v1/jobs", params={"tenant": tenant}, headers=admin).json()["jobs"]
        assert job["id"] == jobs[tenant]
    assert len(live.http.get("/v1/jobs", params={"tenant": "ann"}, headers=ann).json()["jobs"]) == 1
    error = problem(live.http.get("/v1/jobs", params={"tenant": "bob"}, headers=ann), 422, "invalid_request")
    assert error["field"] == "tenant"


def test_a_batch_counts_as_so_many_submissions_and_each_job_against_the_caps(live: Live) -> None:
    rated, busy = make(live, "ann", rate=3), make(live, "bob", max_jobs=2)
    body = {"jobs": [{"prompt": "a cat", "num_inference_steps": 2}] * 4}
    answer = live.http.post("/v1/jobs/batch", json=body, headers=rated)
    problem(answer, 429, "rate_exceeded")
    assert int(answer.headers["retry-after"]) >= 1 and live.http.get("/v1/jobs", headers=rated).json()["jobs"] == []
    for _ in range(3):  # none of the batch was counted
        submit(live, rated)
    results = live.http.post("/v1/jobs/batch", json=body, headers=busy).json()["results"]
    assert [one["status"] for one in results] == [202, 202, 429, 429]
    assert results[2]["error"]["code"] == "tenant_quota_exceeded"


def test_caps_of_a_key_answer_429_with_retry_after(live: Live) -> None:
    rated, busy, costly = make(live, "ann", rate=2), make(live, "bob", max_jobs=2), make(live, "cat", max_cost=5)
    for headers, accepted, code in ((rated, 2, "rate_exceeded"), (busy, 2, "tenant_quota_exceeded"), (costly, 1, "tenant_quota_exceeded")):
        for _ in range(accepted):
            submit(live, headers)
        answer = live.http.post("/v1/jobs", json={"prompt": "a cat", "num_inference_steps": 2}, headers=headers)
        problem(answer, 429, code)
        assert 1 <= int(answer.headers["retry-after"]) <= 120
        assert live.http.get("/v1/jobs", headers=headers).status_code == 200  # only submissions are bounded
    submit(live, make(live, "ann"))  # the rate is a key's, not its tenant's
    live.worker.run_all()
    submit(live, busy)
    submit(live, costly)


def test_jobs_of_all_models_count_as_in_flight(live: Live) -> None:
    live.worker.records.announce("other", [live.worker.model.model_copy(update={"id": "other"})])
    headers = make(live, max_jobs=1)
    submit(live, headers, model="other")
    problem(live.http.post("/v1/jobs", json={"prompt": "a cat"}, headers=headers), 429, "tenant_quota_exceeded")


def test_a_priority_above_the_ceiling_is_refused_by_name(live: Live) -> None:
    headers = make(live, top_priority=7)
    assert submit(live, headers)["request"]["priority"] == 7  # the default is brought under the ceiling
    assert submit(live, headers, priority=9)["request"]["priority"] == 9
    error = problem(live.http.post("/v1/jobs", json={"prompt": "a cat", "priority": 6}, headers=headers), 422, "invalid_request")
    assert (error["field"], error["allowed"]) == ("priority", "7 to 9 with this API key (0 is served first)") and "6" in error["message"]
    assert submit(live, make(live, top_priority=3))["request"]["priority"] == 5


# Two tenants


def attempts(
    jobs: dict[str, str], bobs: dict[str, str], etags: list[str], cursor: str, secret: str
) -> list[tuple[str, str, dict[str, Any]]]:
    """What Ann tries on Bob: method, path, options of the request."""
    found: list[tuple[str, str, dict[str, Any]]] = []
    for job_id in jobs.values():
        path = f"/v1/jobs/{job_id}"
        found += [
            ("GET", path, {}),
            ("HEAD", path, {}),
            ("GET", path, {"headers": {"If-None-Match": "*"}}),
            ("GET", path, {"headers": {"If-None-Match": ", ".join(etags)}}),
            ("GET", path, {"headers": {"X-Tenant": "bob"}}),
            ("GET", path, {"params": {"tenant": "bob"}}),
            ("GET", path, {"params": {"wait": "0.1"}}),
            ("GET", f"{path}/images/0", {}),
            ("HEAD", f"{path}/images/0", {}),
            ("GET", f"{path}/timeline", {}),
            ("HEAD", f"{path}/timeline", {}),
            ("GET", f"{path}/images/0/thumbnail", {}),
            ("HEAD", f"{path}/images/1/thumbnail", {"params": {"width": "64"}}),
            ("GET", f"{path}/images/0/thumbnail", {"headers": {"If-None-Match": f'"{TINY_SHA256}-256"'}}),
            ("POST", f"{path}/cancel", {}),
            ("POST", f"{path}/cancel", {"json": {"tenant": "bob"}}),
            ("GET", f"{path}/events", {}),
            ("HEAD", f"{path}/events", {}),
            ("GET", f"{path}/events", {"headers": {"Last-Event-ID": "0-0"}}),
            ("GET", f"{path}/events", {"headers": {"Last-Event-ID": "9999999999999-0"}}),
            ("DELETE", path, {}),
        ]
    one = jobs["succeeded"]
    for odd in (f"bob%2F{one}", f"..%2Fjobs%2F{one}", f"{one}%00", f"{one}%20", one.upper(), "of:bob", "queued", f"{one}:x", f"{one}/"):
        found.append(("GET", f"/v1/jobs/{odd}", {}))
    found += [("GET", f"/v1/jobs/{one}/images/0", {}), ("GET", f"/bob/{one}/1/0.png", {}), ("GET", f"/v1/jobs/bob/{one}/1/0.png", {})]
    for status in (None, "queued", "running", "succeeded", "failed", "cancelled"):
        given = {} if status is None else {"status": status}
        found += [
            ("GET", "/v1/jobs", {"params": {**given, **more}}) for more in ({}, {"cursor": cursor}, {"tenant": "bob"}, {"limit": 200})
        ]
    for more in ({"metadata": "secret:bobs"}, {"model": "latentline-emoji", "metadata": "secret:bobs"}, {"created_after": "2000-01-01"}):
        found += [("GET", "/v1/jobs", {"params": {**more, **tenant}}) for tenant in ({}, {"tenant": "bob"}, {"tenant": "ann"})]
    for tenant in ("bob", "BOB", " bob", "bob\u0000", ["bob"], {"bob": 1}, True, 0, ""):
        found.append(("POST", "/v1/jobs", {"json": {"prompt": "mine", "tenant": tenant}}))
        found.append(("POST", "/v1/jobs/batch", {"json": {"jobs": [{"prompt": "mine", "tenant": tenant}]}}))
    bobs_body = {"prompt": secret, "num_inference_steps": 2, "idempotency_key": "once"}
    mine = {"prompt": "mine", "idempotency_key": "once"}  # Bob's key, another body
    found += [
        ("POST", "/v1/jobs/batch", {"json": {"jobs": [mine, {**bobs_body, "tenant": "bob"}, {**mine, "tenant": "bob"}]}}),
        ("POST", "/v1/jobs/batch", {"json": {"jobs": [mine], "tenant": "bob"}}),
        ("GET", "/v1/jobs/batch", {}),
        ("POST", "/v1/jobs", {"json": mine}),
        ("POST", "/v1/jobs", {"json": {"prompt": "mine"}, "headers": {"Idempotency-Key": "bob:once"}}),
        ("POST", "/v1/jobs", {"json": {"prompt": "mine", "callback": {"url": "https://bob.example/hook"}}}),
        ("POST", "/v1/jobs", {"json": {**bobs_body, "tenant": "bob"}}),
        (
            "POST",
            "/v1/jobs",
            {"content": b'{"prompt": "mine", "tenant": "ann", "tenant": "bob"}', "headers": {"Content-Type": "application/json"}},
        ),
    ]
    found += [("GET", "/v1/jobs", {"headers": bobs | {"Authorization": value}}) for value in (f"Bearer {prefix_of(bobs)}", "Bearer ll_bob")]
    return found


def test_nothing_of_one_tenant_reaches_another(live: Live) -> None:
    secret = "what bob asked for"
    ann, bob = make(live), make(live, "bob")
    jobs = {"succeeded": submit(live, bob, prompt=secret, idempotency_key="once", num_images=2, metadata={"secret": "bobs"})["id"]}
    live.worker.run_all()
    jobs["cancelled"] = submit(live, bob, prompt=secret, callback={"url": "https://bob.example/hook"})["id"]
    live.http.post(f"/v1/jobs/{jobs['cancelled']}/cancel", headers=bob)
    jobs["running"] = submit(live, bob, prompt=secret)["id"]
    assert live.worker.records.claim(jobs["running"], "one", 300)
    jobs["queued"] = submit(live, bob, prompt=secret)["id"]
    etags = [live.http.get(f"/v1/jobs/{job_id}", headers=bob).headers["etag"] for job_id in jobs.values()]
    page = live.http.get("/v1/jobs?limit=1", headers=bob).json()
    told = len(records.run(live.worker.redis, records.callbacks()))

    def state() -> list[Any]:
        kept = [live.worker.redis.hgetall(routing.job_key(job_id)) for job_id in jobs.values()]
        return [*kept, live.worker.redis.hgetall(routing.idempotency_key("bob", "once"))]

    before, crossed = state(), []
    tried = attempts(jobs, bob, etags, page["next_cursor"], secret)
    for method, path, options in tried:
        answer = live.http.request(method, path, **{**options, "headers": ann | options.get("headers", {})})
        leaked = [word for word in (secret, "bob.example", "memory://bob", *jobs.values()) if word in answer.text]
        if path.endswith("/batch") and answer.status_code == 200:
            results = answer.json()["results"]
            made = [one["job"]["request"]["tenant"] for one in results if one["job"]]
            own = set(made) <= {"ann"} and {one["status"] for one in results} <= {202, 409, 422}
        else:  # Ann's own job, with words that she sent herself
            own = answer.status_code == 202 and answer.json()["request"]["tenant"] == "ann"
        if own:
            leaked = [word for word in leaked if word in jobs.values()]
        elif path.startswith("/v1/jobs/") and not path.endswith("/batch") and answer.status_code not in (404, 405, 307):
            leaked.append(f"status {answer.status_code}")
        elif answer.status_code in (404, 405):  # it may name what was asked for, as for any unknown id
            leaked = [word for word in leaked if word not in path]
        elif (
            answer.status_code == 200 and answer.json()["jobs"] and any(job["request"]["tenant"] != "ann" for job in answer.json()["jobs"])
        ):
            leaked.append("a job of another tenant")
        elif answer.status_code not in (200, 307, 401, 422):
            leaked.append(f"status {answer.status_code}")
        if leaked:
            crossed.append((method, path, options, leaked))
    assert len(tried) >= 100 and crossed == []
    assert state() == before
    assert len(records.run(live.worker.redis, records.callbacks())) == told
    again = submit(live, bob, prompt=secret, idempotency_key="once", num_images=2, metadata={"secret": "bobs"})
    assert again["id"] == jobs["succeeded"]  # Bob's idempotency key is still his
    live.worker.run_all()
    owners = {key.split("/")[0] for key in live.images.objects}
    assert owners == {"ann", "bob"} and sum(key.startswith("bob/") for key in live.images.objects) == 3


def test_a_foreign_job_is_answered_exactly_as_an_unknown_one(live: Live) -> None:
    job = submit(live, make(live, "bob"))["id"]
    ann = make(live)
    for method, suffix in (
        ("GET", ""),
        ("POST", "/cancel"),
        ("GET", "/events"),
        ("DELETE", ""),
        ("GET", "/images/0"),
        ("GET", "/timeline"),
        ("GET", "/images/0/thumbnail"),
        ("GET", "?wait=0.1"),
    ):
        foreign, unknown = (live.http.request(method, f"/v1/jobs/{one}{suffix}", headers=ann) for one in (job, "0" * len(job)))
        problem(foreign, 404, "job_not_found")
        assert (
            foreign.text.replace(job, "") == unknown.text.replace("0" * len(job), "") and foreign.headers.keys() == unknown.headers.keys()
        )


# Without keys


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1:8000", "localhost", "LOCALHOST.:80", "store.localhost:8333", "[::1]:8000"])
def test_without_keys_loopback_names_are_served(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    assert asked_as(host) == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "10.0.0.1", "", "[::", "[::2]:80"])
def test_without_keys_other_names_are_refused(host: str) -> None:
    assert asked_as(host) == 403


def asked_as(host: str) -> int:
    async def ask() -> int:
        transport = httpx.ASGITransport(create_app(Settings(auth="none")))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            return (await http.get("/healthz", headers={"Host": host})).status_code

    return asyncio.run(ask())


@pytest.mark.parametrize("host", ["0.0.0.0", "", "::", "10.1.2.3", "api.example"])
def test_without_keys_other_addresses_are_refused_at_start(host: str) -> None:
    with pytest.raises(ConfigurationError, match="LATENTLINE_AUTH=keys"):
        check_exposure(Settings(auth="none"), host, None)
    check_exposure(KEYS, host, None)
    result = click.testing.CliRunner().invoke(main, ["api", "--host", host, "--port", "0"], env={"LATENTLINE_AUTH": "none"})
    assert result.exit_code == 2 and "latentline keys create" in result.stderr


def test_an_inherited_socket_counts_by_its_own_address() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as own, closing(socket.create_server(("", 0))) as every:
        check_exposure(Settings(auth="none"), "", own)
        with pytest.raises(ConfigurationError, match=r"0\.0\.0\.0"):
            check_exposure(Settings(auth="none"), "127.0.0.1", every)
    with closing(socket.socket(socket.AF_UNIX)) as unix, pytest.raises(ConfigurationError, match="not TCP"):
        check_exposure(Settings(auth="none"), "127.0.0.1", unix)


def test_keys_are_needed_unless_the_setting_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LATENTLINE_AUTH")
    assert Settings().auth == "keys" and AsyncClient().settings.auth == "keys"


# What is stored, and the commands


def test_only_a_hash_of_the_key_is_stored() -> None:
    redis = fakeredis.FakeRedis(decode_responses=True)
    text, key = records.run(redis, records.create_key(NewKey.parse(tenant="ann")))
    credential = Credential.parse(text)
    assert credential is not None and key.opens_for(credential) and len(text.split("_", 2)[2]) == 43
    stored = json.dumps([redis.hgetall(routing.api_key_key(key.prefix)), redis.zrange(routing.api_keys_key(), 0, -1)])
    assert text.split("_", 2)[2] not in stored and key.digest in stored
    assert key.digest not in repr(key) and credential.digest not in repr(credential)


def test_a_key_that_cannot_be_read_opens_nothing(live: Live) -> None:
    headers = make(live)
    live.worker.redis.hset(routing.api_key_key(prefix_of(headers)), "limits", "?")
    problem(live.http.get("/v1/jobs", headers=headers), 401, "not_authenticated")


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"tenant": ".."}, "tenant"), ({"tenant": "a/b"}, "tenant"), ({"scopes": ["write"]}, "scopes.0"), ({"scopes": []}, "scopes"),
        ({"limits": {"rate": -1}}, "limits.rate"), ({"limits": {"top_priority": 10}}, "limits.top_priority"), ({"note": "\x1b"}, "note"),
    ],
)  # fmt: skip
def test_a_bad_key_is_refused_by_field(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        NewKey.parse(**{"tenant": "ann", **fields})
    assert refused.value.field == field


def test_keys_are_made_listed_and_revoked_by_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    server = fakeredis.FakeServer()
    monkeypatch.setattr("latentline.cli.broker.connect", lambda url: fakeredis.FakeRedis(server=server, decode_responses=True))

    def call(*args: str, code: int = 0) -> str:
        result = click.testing.CliRunner().invoke(main, ["keys", *args])
        assert result.exit_code == code, result.output
        return result.stderr if code else result.stdout

    text = call("create", "--tenant", "ann", "--scope", "read", "--rate", "5", "--note", "a phone").strip()
    made = json.loads(call("create", "--tenant", "bob", "--json"))
    prefix = text.split("_")[1]
    assert Credential.parse(text) and Credential.parse(made["key"]) and made["scopes"] == ["submit", "read"]
    (line,) = call("list", "--tenant", "ann").splitlines()
    assert line.startswith(prefix) and "rate=5" in line and "a phone" in line and text not in line
    listed = json.loads(call("list", "--json"))["keys"]
    assert [one["tenant"] for one in listed] == ["ann", "bob"] and not [one for one in listed if "digest" in one or "key" in one]
    call("revoke", prefix)
    assert [one["tenant"] for one in json.loads(call("list", "--json"))["keys"]] == ["bob"]
    assert "no key" in call("revoke", prefix, code=2)
    assert "tenant" in call("create", "--tenant", "a b", code=2)
    with pytest.raises(KeyNotFound):
        records.run(fakeredis.FakeRedis(server=server, decode_responses=True), records.revoke_key(prefix))


def test_the_command_line_sends_its_key(live: Live) -> None:
    key = make(live)["Authorization"].removeprefix("Bearer ")

    def call(**env: str) -> click.testing.Result:
        return click.testing.CliRunner().invoke(main, ["models"], env={"LATENTLINE_URL": str(live.http.base_url), **env})

    assert call(LATENTLINE_API_KEY=key).exit_code == 0
    assert call().exit_code == 2 and "API key" in call().stderr
    wrong = call(LATENTLINE_API_KEY="hello")
    assert wrong.exit_code == 2 and "LATENTLINE_API_KEY" in wrong.stderr and "hello" not in wrong.stderr


# Lists of a tenant


def test_a_tenants_page_says_when_more_may_follow(monkeypatch: pytest.MonkeyPatch, live: Live) -> None:
    monkeypatch.setattr("latentline.records.lists.MAX_LOOK", 4)
    headers = make(live)
    first = submit(live, headers)["id"]
    live.worker.run_all()
    waiting = [submit(live, headers)["id"] for _ in range(7)]
    found, cursor, pages = [], None, 0
    while pages == 0 or cursor:
        params = {"status": "succeeded", "limit": 1} | ({"cursor": cursor} if cursor else {})
        page = live.http.get("/v1/jobs", params=params, headers=headers).json()
        found, cursor, pages = found + [job["id"] for job in page["jobs"]], page["next_cursor"], pages + 1
    assert found == [first] and 1 < pages <= len(waiting)


def test_a_tenants_index_forgets_jobs_that_expire(live: Live) -> None:
    job = submit(live, make(live))["id"]
    live.worker.run_all()
    assert live.worker.redis.zrange(routing.tenant_index_key("ann"), 0, -1) == [job]
    live.worker.redis.zadd(routing.expiring_key(), {f"ann/{job}": 0})
    assert live.worker.records.expired() == [f"ann/{job}"]
    assert not live.worker.redis.exists(routing.tenant_index_key("ann"))
