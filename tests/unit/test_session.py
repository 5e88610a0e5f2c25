"""Sign-in of browsers: what the cookie opens, and for whom."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from support.live_api import Live, live_api, new_key, problem

from latentline import Settings, records
from latentline.api.cookies import COOKIE, PAGE_HEADER

PAGE = {PAGE_HEADER: "1"}


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Iterator[Live]:
    with live_api(monkeypatch, Settings(auth="keys")) as running:
        yield running


@pytest.fixture
def browser(live: Live) -> Iterator[httpx.Client]:
    """A client that keeps cookies, signed in as a tenant that may submit and read."""
    with httpx.Client(base_url=live.http.base_url, trust_env=False, timeout=30) as client:
        assert client.post("/session", json={"key": new_key(live)}).status_code == 200
        yield client


def test_a_session_opens_what_its_key_opens(live: Live, browser: httpx.Client) -> None:
    assert browser.get("/session").json() == {"keys": True, "tenant": "ann", "scopes": ["submit", "read"]}
    job = browser.post("/v1/jobs", json={"prompt": "a cat"}, headers=PAGE)
    assert job.status_code == 202 and browser.get(f"/v1/jobs/{job.json()['id']}").status_code == 200
    problem(browser.get("/v1/fleet"), 403, "not_allowed")
    with httpx.Client(base_url=live.http.base_url, trust_env=False) as other:
        other.post("/session", json={"key": new_key(live, tenant="bob")})
        assert other.get("/v1/jobs").json()["jobs"] == []
        problem(other.get(f"/v1/jobs/{job.json()['id']}"), 404, "job_not_found")


def test_the_cookie_is_kept_from_scripts_and_other_sites(live: Live) -> None:
    set_cookie = live.http.post("/session", json={"key": new_key(live)}).headers["set-cookie"]
    assert {"HttpOnly", "SameSite=strict", "Path=/"} <= {part.strip() for part in set_cookie.split(";")}


def test_a_change_needs_the_pages_header_and_its_own_site(browser: httpx.Client) -> None:
    body = {"prompt": "a cat"}
    problem(browser.post("/v1/jobs", json=body), 403, "not_allowed")
    problem(browser.post("/v1/jobs", json=body, headers={**PAGE, "Sec-Fetch-Site": "cross-site"}), 403, "not_allowed")
    problem(browser.get("/v1/jobs", headers={"Sec-Fetch-Site": "same-site"}), 403, "not_allowed")
    assert browser.post("/v1/jobs", json=body, headers={**PAGE, "Sec-Fetch-Site": "same-origin"}).status_code == 202


def test_sign_out_and_revocation_end_a_session(live: Live, browser: httpx.Client) -> None:
    prefix = browser.cookies[COOKIE].split("_")[1]
    records.run(live.worker.redis, records.revoke_key(prefix))
    problem(browser.get("/session"), 401, "not_authenticated")
    browser.post("/session", json={"key": new_key(live)})
    assert browser.get("/session").status_code == 200
    assert browser.delete("/session").status_code == 204 and COOKIE not in browser.cookies
    problem(browser.get("/session"), 401, "not_authenticated")


@pytest.mark.parametrize("body", [{}, {"key": None}, {"key": 5}, {"key": "ll_x"}, {"key": "ll_000000000000_" + "a" * 43}])
def test_what_is_no_key_is_refused(live: Live, body: dict[str, object]) -> None:
    answer = live.http.post("/session", json=body)
    problem(answer, 401, "not_authenticated")
    assert "set-cookie" not in answer.headers


def test_other_fields_of_a_sign_in_are_refused(live: Live) -> None:
    assert problem(live.http.post("/session", json={"key": "x", "name": "y"}), 422, "invalid_request")["field"] == "name"


def test_without_keys_everybody_is_signed_in(monkeypatch: pytest.MonkeyPatch) -> None:
    with live_api(monkeypatch, Settings(auth="none")) as live:
        for answer in (live.http.get("/session"), live.http.post("/session", json={})):
            assert answer.json() == {"keys": False, "tenant": None, "scopes": ["submit", "read", "admin"]}
        assert live.http.delete("/session").status_code == 204
