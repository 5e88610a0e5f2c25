"""What no well-behaved client sends. Each case is answered with the right status in the one shape of errors, within bounds;
nothing of it is a 5xx, is logged as a failure, or stays open."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator
from typing import Any

import pytest
from support.live_api import Live, live_api
from support.raw_http import Answer, exchange, request

from latentline import Settings, records
from latentline.keys import NewKey

MAX_ANSWER_BYTES = 1500  # of an error: what the client sent is shortened in it
JSON = ("Content-Type", "application/json")
Headers = list[tuple[str, str | bytes]]


class Log(logging.Handler):
    """Keeps what nobody should see: errors, and anything with a traceback."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR or record.exc_info:
            self.found.append(record.getMessage())


@contextlib.contextmanager
def served(settings: Settings) -> Iterator[Live]:
    """One API for all cases; at their end nothing may be logged as a failure, and nothing be open."""
    log = Log()
    logging.getLogger().addHandler(log)
    try:
        with pytest.MonkeyPatch.context() as patch, live_api(patch, settings) as live:
            yield live
            for _ in range(1000):
                if not (live.server.server_state.connections or live.server.server_state.tasks or live.client._events.jobs):
                    break
                time.sleep(0.01)
            assert not live.server.server_state.connections and not live.server.server_state.tasks and not live.client._events.jobs
    finally:
        logging.getLogger().removeHandler(log)
    assert log.found == []


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with served(Settings(auth="none")) as running:
        yield running


@pytest.fixture(scope="module")
def with_keys() -> Iterator[Live]:
    with served(Settings(auth="keys")) as running:
        yield running


def ask(live: Live, sent: bytes, method: str = "GET") -> Answer | None:
    url = live.http.base_url
    return exchange((url.host, url.port or 80), sent, method)


def refused(answer: Answer | None, status: int, code: str | None = None) -> dict[str, Any]:
    """The error of an answer, in the shape and within the bounds of all errors."""
    assert answer is not None and answer.status == status, answer
    assert answer.headers["content-type"] == "application/json" and len(answer.body) <= MAX_ANSWER_BYTES, answer
    error = answer.error
    assert set(error) in ({"code", "message"}, {"code", "message", "field", "allowed"}), error
    assert "Traceback" not in answer.body.decode() and (code is None or error["code"] == code), error
    return error


# Bodies


def body(**fields: Any) -> bytes:
    return json.dumps({"prompt": "a cat", **fields}).encode()


def raw(field: str, text: str) -> bytes:
    """A submission in which one field has this JSON text."""
    return f'{{"prompt": "a cat", "{field}": {text}}}'.encode()


NOT_JSON: dict[str, bytes] = {
    "empty": b"",
    "blank": b" \n",
    "truncated": b'{"prompt": "a cat"',
    "two objects": b'{"prompt": "a"}{"prompt": "b"}',
    "trailing comma": b'{"prompt": "a cat",}',
    "single quotes": b"{'prompt': 'a cat'}",
    "comment": b'{"prompt": "a cat"} // x',
    "NaN": raw("guidance_scale", "NaN"),
    "Infinity": raw("guidance_scale", "Infinity"),
    "-Infinity": raw("guidance_scale", "-Infinity"),
    "bytes that are no UTF-8": b'{"prompt": "\xff\xfe"}',
    "overlong UTF-8": b'{"prompt": "\xc0\xaf"}',
    "a surrogate in UTF-8": b'{"prompt": "\xed\xa0\x80"}',
    "UTF-16": '{"prompt": "a cat"}'.encode("utf-16"),
    "UTF-32": '{"prompt": "a cat"}'.encode("utf-32"),
    "a byte order mark": b"\xef\xbb\xbf" + body(),
    "a control character in a string": b'{"prompt": "a\ncat"}',
    "a NUL between": b'{"prompt":\x00"a cat"}',
    "nested lists": b"[" * 60_000,
    "nested objects": b'{"a":' * 12_000,
    "closed nested lists": raw("metadata", "[" * 20_000 + "]" * 20_000),
    "a number of 5000 digits": raw("seed", "9" * 5000),
    "an object in a list": b'[{"prompt": "a cat"}]',
    "null": b"null",
    "text": b'"a cat"',
    "a number": b"7",
    "true": b"true",
}

FIELDS: list[tuple[str, bytes]] = [
    ("prompt", b"{}"),
    ("prompt", raw("x", "1").replace(b'"prompt": "a cat", ', b"")),
    *(("prompt", json.dumps({"prompt": value}).encode()) for value in ("", " \t", "\x00", "a\x00b", "\ud800", 7, None, True, ["a"], {})),
    ("prompt", body(prompt="x" * 40_000)),
    ("negative_prompt", body(negative_prompt="x" * 40_000)),
    ("negative_prompt", body(negative_prompt="\udfff")),
    ("negative_prompt", body(negative_prompt=7)),
    ("prompt", b'{"prompt": "a", "prompt": "b"}'),
    ("prompt", b'{"prompt": "a", "\\u0070rompt": "b"}'),
    ("a", raw("metadata", '{"a": 1, "a": 2}')),
    ("promt", body(promt=1)),
    ("__proto__", raw("__proto__", "{}")),
    ("", raw("", "1")),
    ("x" * 50, raw("x" * 5000, "1")),
    *(("width", raw("width", text)) for text in ("65", "63", "0", "-64", "4096", "64.5", "1e999", '"64"', "true", "[]", "{}", "9" * 400)),
    *(("height", raw("height", text)) for text in ("65", "8", "-0.5", '""')),
    *(("num_inference_steps", raw("num_inference_steps", text)) for text in ("0", "-1", "151", "1.5", '"20"', "false", "1e10")),
    *(("guidance_scale", raw("guidance_scale", text)) for text in ("-0.1", "30.1", "1e999", '"5"', "true", "[5]")),
    *(("num_images", raw("num_images", text)) for text in ("0", "-1", "1000", "1.5", "true")),
    *(("seed", raw("seed", text)) for text in ("-1", "4294967296", "1.5", '"7"', "true", "1" + "0" * 300)),
    ("seed", body(seed=2**32 - 1, num_images=2)),
    *(("priority", raw("priority", text)) for text in ("-1", "10", "0.5", '"0"')),
    *(("deadline_s", raw("deadline_s", text)) for text in ("0", "-1", "1e9", '"soon"', "true")),
    *(("preview_every", raw("preview_every", text)) for text in ("-1", "1000", "true")),
    *(("version", raw("version", text)) for text in ("2", "true", '"1"', "null")),
    *(("scheduler", body(scheduler=value)) for value in ("magic", "", "A B", "x" * 65, 7, "euler\n")),
    *(("model", body(model=value)) for value in ("no-such", "", "../models", "a\n", "a b", "x" * 201, "ä", 7, None)),
    *(("tenant", body(tenant=value)) for value in ("", ".", "..", "a/b", "a b", "ä", "a\n", "x" * 101, 7)),
    *(("idempotency_key", body(idempotency_key=value)) for value in ("", "x" * 201, "\ud800", "a\x00", 7)),
    *(("metadata", body(metadata=value)) for value in ([], "a", {"a": {}}, {"a": []}, {"a": "x" * 5000}, {"\ud800": 1}, {"a": "\ud800"})),
    ("metadata", raw("metadata", '{"a": 1e999}')),
    *(("output", body(output=value)) for value in ("png", [], {"format": "gif"}, {"format": 7}, {"quality": 0}, {"quality": 101})),
    *(("output", body(output=value)) for value in ({"quality": "90"}, {"quality": True}, {"compression": 1})),
    *(
        ("callback", body(callback=value))
        for value in (
            "x", [], {}, {"url": 7}, {"url": ""}, {"url": "https://a.example", "events": ["job.eaten"]},
            {"url": "https://a.example", "x": 1},
        )
    ),
    *(
        ("callback.url", body(callback={"url": url}))
        for url in (
            "ftp://a.example", "a.example", "//a.example", "http://", "http://:80", "http://a.example:0", "http://a.example:99999", "http://[",
            "http://user:pass@a.example", "http://a.example/\r\nX: y", " http://a.example", "http://a.example/\x00", "http://127.0.0.1/",
            "http://127.1/", "http://2130706433/", "http://0x7f.1/", "http://localhost/", "http://[::1]/", "http://[::ffff:10.0.0.1]/",
            "http://169.254.169.254/", "http://168.63.129.16/", "http://10.0.0.1/", "http://a.example:22/", "javascript:alert(1)", "file:///etc/passwd",
            "https://a.example/" + "x" * 3000,
        )
    ),
    *(
        ("loras", body(loras=value))
        for value in (
            "x", {}, ["x"], [{}], [{"name": "x"}] * 2, [{"name": f"x{i}"} for i in range(9)], [{"name": "../x"}],
            [{"name": "x", "scale": 11}],
        )
    ),
    ("loras", body(loras=[{"name": "absent"}])),
]  # fmt: skip


@pytest.mark.parametrize("sent", NOT_JSON.values(), ids=NOT_JSON)
def test_a_body_that_is_no_json_object(live: Live, sent: bytes) -> None:
    error = refused(ask(live, request("POST", "/v1/jobs", [JSON, ("Content-Length", str(len(sent)))], sent)), 422, "invalid_request")
    assert error["allowed"] and error["field"] == "body"


@pytest.mark.parametrize(("field", "sent"), FIELDS, ids=lambda value: value[:60] if isinstance(value, bytes) else value[:30])
def test_a_field_that_is_not_acceptable(live: Live, field: str, sent: bytes) -> None:
    error = refused(ask(live, request("POST", "/v1/jobs", [JSON], sent)), 422, "invalid_request")
    assert error["field"].startswith(field) and error["allowed"]
    assert live.worker.take() is None


@pytest.mark.parametrize(
    "sent",
    [
        raw("width", "64.0"), raw("seed", "1e2"), raw("width", "null"), raw("guidance_scale", "0"), raw("metadata", '{"a": null}'),
        body(prompt="\u202eevil\u2066"), body(prompt="👩‍🚀" * 100), body(prompt="a\x1b[2J\x07\r\n"), body(prompt="{{7*7}}${7*7}<script>"),
        body(metadata={"a'; DROP TABLE": "%s%n"}), body(tenant="a-._b"), body(seed=0), body(idempotency_key="\x7f key"),
    ],
    ids=repr,
)  # fmt: skip
def test_what_is_odd_and_allowed(live: Live, sent: bytes) -> None:
    answer = ask(live, request("POST", "/v1/jobs", [JSON], sent))
    assert answer is not None and answer.status == 202, answer
    found = ask(live, request("GET", answer.headers["location"]))
    assert found is not None and json.loads(found.body)["request"]["prompt"] == json.loads(sent)["prompt"]
    live.worker.run_all()


# Heads


CHUNKED: Headers = [JSON, ("Transfer-Encoding", "chunked")]
HEADS: list[tuple[str, Headers, bytes, int]] = [
    ("no content type", [], body(), 415),
    *((kind[:40], [("Content-Type", kind)], body(), 415) for kind in (
        "text/plain", "text/json", "application/jsonp", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x",
        "application/json; charset=utf-16", "application/json;charset=latin-1", "x" * 10_000, "application/json, text/plain", "",
    )),
    *((f"encoding {name}"[:40], [JSON, ("Content-Encoding", name)], body(), 415) for name in ("gzip", "br", "deflate, gzip", "x" * 5000)),
    ("two idempotency keys", [JSON, ("Idempotency-Key", "a"), ("Idempotency-Key", "b")], body(), 422),
    ("an idempotency key that differs", [JSON, ("Idempotency-Key", "b")], body(idempotency_key="a"), 422),
    ("an empty idempotency key", [JSON, ("Idempotency-Key", "")], body(), 422),
    ("a long idempotency key", [JSON, ("Idempotency-Key", "k" * 5000)], body(), 422),
    ("a body over the limit", [JSON], body(prompt="x" * 400_000), 413),
    ("a declared body over the limit", [JSON, ("Content-Length", "999999999999")], b"", 413),
    ("a declared body over all limits", [JSON, ("Content-Length", "9" * 18)], b"", 413),
    ("a length that is no number", [JSON, ("Content-Length", "x")], b"", 400),
    ("a negative length", [JSON, ("Content-Length", "-1")], b"", 400),
    ("a length over 64 bits", [JSON, ("Content-Length", "9" * 40)], b"", 400),
    ("two lengths", [JSON, ("Content-Length", "1"), ("Content-Length", "2")], b"ab", 400),
    ("length and chunks", [*CHUNKED, ("Content-Length", "5")], b"0\r\n\r\n", 400),
    ("chunks of no size", CHUNKED, b"zz\r\n", 400),
    ("chunks of a negative size", CHUNKED, b"-1\r\n", 400),
    ("an unknown transfer encoding", [JSON, ("Transfer-Encoding", "gzip, x")], b"0\r\n\r\n", 400),
    ("a header without a colon", [JSON, ("X", "y\r\nnonsense")], b"", 400),
    ("a folded header", [JSON, ("X", "a\r\n b")], b"", 400),
    ("a NUL in a header", [JSON, ("X", "a\x00b")], b"", 400),
    ("a space in a header's name", [JSON, ("X Y", "a")], b"", 400),
    ("another host", [JSON, ("Host", "evil.example")], body(), 403),
    ("two hosts", [JSON, ("Host", "localhost"), ("Host", "localhost")], body(), 403),
    ("an empty host", [JSON, ("Host", "")], body(), 403),
    ("a host that is none", [JSON, ("Host", "[::")], body(), 403),
    ("a host with a user", [JSON, ("Host", "localhost@evil.example")], body(), 403),
]  # fmt: skip


@pytest.mark.parametrize(("headers", "sent", "status"), [case[1:] for case in HEADS], ids=[case[0] for case in HEADS])
def test_a_submission_with_a_head_that_is_not_acceptable(live: Live, headers: Headers, sent: bytes, status: int) -> None:
    refused(ask(live, request("POST", "/v1/jobs", headers, sent)), status)
    assert live.worker.take() is None


@pytest.mark.parametrize(
    "sent",
    [
        b"\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", b"\x00" * 100,
        b"FOO / HTTP/1.1\r\nHost: localhost\r\n\r\n", b"get /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n", b"*" * 100_000,
        b"GET /\xff HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", b"GET /a b HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"CONNECT evil.example:443 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
    ids=lambda sent: repr(sent[:30]),
)  # fmt: skip
def test_what_is_no_request_for_this_server(live: Live, sent: bytes) -> None:
    answer = ask(live, sent)
    if answer is not None:  # or it is closed without a word, as with only line ends
        refused(answer, answer.status)
        assert answer.status in (400, 404, 405)


# Paths, methods, queries


TARGETS: list[tuple[str, str, int]] = [
    *(("GET", target, 404) for target in (
        "/v1", "/v1/", "/v2/jobs", "/v1/no-such", "//v1/jobs", "/v1//jobs", "/v1/jobs/../../etc/passwd", "/..%2f..%2fetc/passwd", "/v1/%00",
        "/" + "a" * 30_000, "/" + "%61" * 3000, "/v1/jobs/x/images/0/0", "/v1/jobs/a%2fb", "/%ff%fe", "/.env", "/v1/jobs/x/EVENTS",
    )),
    *((method, "/v1/jobs", 405) for method in ("PUT", "PATCH", "DELETE", "TRACE", "PROPFIND")),
    *((method, "/v1/jobs/x", 405) for method in ("PUT", "PATCH", "POST")),
    ("GET", "/v1/jobs/x/cancel", 405), ("DELETE", "/v1/models", 405), ("POST", "/healthz", 405), ("POST", "/v1/jobs/x/images/0", 405),
    *(("GET", f"/v1/jobs?{query}", 422) for query in (
        "limit=0", "limit=201", "limit=-1", "limit=many", "limit=1.5", "limit=1e1", "limit=", "limit=%00", "limit=" + "9" * 5000,
        "status=done", "status=", "status=QUEUED", "status=queued%00", "cursor=%21", "cursor=Zm9v", "cursor=%C3%A9", "cursor=%ff",
        "cursor=" + "a" * 301, "cursor=bnVsbA", "cursor=W10", "cursor=e30", "cursor=WzEsMl0", "cursor=Li4vLi4",
        "created_after=0.5", "created_before=1e3", "created_after=nan", "created_after=soon", "created_before=2026-13-01T00:00:00Z",
    )),
    *(("GET", f"/v1/jobs/x?wait={wait}", 422) for wait in ("-1", "61", "x", "nan", "inf", "-inf", "1e400", "", "0x1", "9" * 400)),
    *(("GET", f"/v1/jobs/x/images/{number}", 422) for number in ("x", "1.5", "0x0", "", "9" * 5000)[:3]),
]  # fmt: skip

IDS = (
    "no-such",
    "%00",
    "%ff",
    "%2e%2e",
    "a%0d%0ab",
    "a%20b",
    "%7b%7d",
    "*",
    "'",
    "%F0%9F%90%B1",
    "%D9%A3",
    "a" * 5000,
    "%1b%5b2J",
    "latentline:x",
)


@pytest.mark.parametrize(("method", "target", "status"), TARGETS, ids=lambda value: str(value)[:40])
def test_a_target_that_is_not_acceptable(live: Live, method: str, target: str, status: int) -> None:
    answer = ask(live, request(method, target), method)
    error = refused(answer, status)
    assert answer is not None and (status != 405 or "OPTIONS" in answer.headers["allow"])
    assert status != 422 or error["allowed"]


@pytest.mark.parametrize("rest", ["GET ", "DELETE ", "POST /cancel", "GET /events", "GET /images/0"])
@pytest.mark.parametrize("job_id", IDS, ids=lambda value: value[:20])
def test_an_id_of_no_job(live: Live, rest: str, job_id: str) -> None:
    method, _, end = rest.partition(" ")
    refused(ask(live, request(method, f"/v1/jobs/{job_id}{end}")), 404, "job_not_found")


# Headers of reads


@pytest.fixture(scope="module")
def ended(live: Live) -> str:
    """The path of a job that has ended with one picture."""
    job_id = live.submit()["id"]
    live.worker.run_all()
    return f"/v1/jobs/{job_id}"


@pytest.mark.parametrize(
    "last", ["x", "1-2-3", "-1", "1-x", "-", "9" * 30, "1-" + "9" * 30, "0x1-0", "\u0663-0", "1 -0", "a" * 10_000, "*", "$", ">", "null"]
)
def test_a_last_event_id_that_no_stream_gave(live: Live, ended: str, last: str) -> None:
    error = refused(ask(live, request("GET", f"{ended}/events", [("Last-Event-ID", last)])), 422, "invalid_request")
    assert error["field"] == "last_event_id" and error["allowed"]


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        ("bytes=0-0", 206), ("bytes=-1", 206), ("bytes=999999-", 416), ("bytes=-0", 416), ("bytes=" + "9" * 18 + "-", 416),
        *((text, 200) for text in (
            "bytes=", "bytes=-", "bytes=x", "bytes=5-1", "bytes=--5", "bytes=0-0,2-2", "bytes=" + "0-0," * 5000,
            "bytes=" + "9" * 5000 + "-",
            "bytes=0-" + "9" * 40, "lines=0-1", "bytes 0-1", "bytes=\u0663-", "bytes=1-2x", "", "=", "bytes=0x0-0x1",
        )),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_ranges_of_a_picture(live: Live, ended: str, asked: str, status: int) -> None:
    answer = ask(live, request("GET", f"{ended}/images/0", [("Range", asked)]))
    assert answer is not None and answer.status == status
    assert status != 206 or len(answer.body) == 1


@pytest.mark.parametrize(
    ("known", "status"),
    [
        ("*", 304), ("W/*", 200), ('"', 200), ('"x', 200), ("x" * 50_000, 200), (",,,", 200), ('"x",' * 5000, 200), (b"\xff\xfe", 200),
        ('W/W/"x"', 200), ("", 200),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_etags_that_a_job_never_had(live: Live, ended: str, known: str | bytes, status: int) -> None:
    answer = ask(live, request("GET", ended, [("If-None-Match", known)]))
    assert answer is not None and answer.status == status and bool(answer.body) == (status == 200)


@pytest.mark.parametrize(
    "name", ["X-Forwarded-Host", "X-Original-URL", "X-HTTP-Method-Override", "Forwarded", "Cookie", "Accept", "Origin", "TE"]
)
def test_headers_that_mean_nothing_here_change_nothing(live: Live, ended: str, name: str) -> None:
    plain, odd = ask(live, request("GET", ended)), ask(live, request("GET", ended, [(name, "DELETE; /v1/models\t" + "x" * 3000)]))
    assert plain is not None and odd is not None and (odd.status, odd.body) == (plain.status, plain.body)


# Keys


@pytest.fixture(scope="module")
def key(with_keys: Live) -> str:
    return records.run(with_keys.worker.redis, records.create_key(NewKey.parse(tenant="ann", scopes=("submit", "read"), limits={})))[0]


CREDENTIALS = (
    "", "Bearer", "Bearer ", "Basic {key}", "Bearer {key}x", "Bearer {key} {key}", "bearer", "{key}", "Bearer {cut}", "Bearer ll_",
    "Bearer ll__", "Bearer ll_*_*", "Bearer {upper}", "Bearer {key}\u00e9", "Bearer " + "x" * 50_000, "Bearer ll_../../x_y",
    "Negotiate {key}", "Bearer,{key}", "Bearer \"{key}\"", "Token {key}", "Bearer {key},",
)  # fmt: skip


@pytest.mark.parametrize("given", CREDENTIALS, ids=lambda value: value[:24])
def test_a_credential_that_opens_nothing(with_keys: Live, key: str, given: str) -> None:
    text = given.format(key=key, cut=key[:-1], upper=key.upper())
    for method, target in (("GET", "/v1/jobs"), ("GET", "/v1/jobs/x"), ("POST", "/v1/jobs")):
        answer = ask(with_keys, request(method, target, [("Authorization", text), JSON], body() if method == "POST" else b""))
        refused(answer, 401, "not_authenticated")
        assert answer is not None and answer.headers["www-authenticate"].startswith("Bearer") and key not in answer.body.decode()


def test_a_key_twice_or_elsewhere_opens_nothing(with_keys: Live, key: str) -> None:
    both: Headers = [("Authorization", f"Bearer {key}")] * 2
    for headers, target in (
        (both, "/v1/jobs"),
        ([("X-Api-Key", key)], "/v1/jobs"),
        ([("Cookie", f"key={key}")], "/v1/jobs"),
        ([], f"/v1/jobs?key={key}"),
    ):
        refused(ask(with_keys, request("GET", target, headers)), 401, "not_authenticated")
    answer = ask(with_keys, request("GET", "/v1/jobs", [("Authorization", f"bEARER {key}")]))
    assert answer is not None and answer.status == 200


def test_there_are_enough_cases() -> None:
    counted = len(NOT_JSON) + len(FIELDS) + len(HEADS) + len(TARGETS) + 5 * len(IDS) + 3 * len(CREDENTIALS)
    assert counted >= 150
