"""Callbacks: signed, retried by schedule, and never sent to an address that is not global. No packet leaves loopback."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import fakeredis
import httpcore
import pytest
import redis
import standardwebhooks

from latentline import records, routing
from latentline.addresses import CallbackRule, is_global, parse_networks, parse_ports
from latentline.callbacks import CallbackMessage
from latentline.errors import ConfigurationError, JobNotFound, WebhookError
from latentline.images import Images
from latentline.jobs import ImageRef, JobError, JobRequest, Status, resolve
from latentline.records import Records, run
from latentline.settings import Settings
from latentline.webhooks import generate_secret, verify
from latentline_worker.callbacks import deliverer as deliverer_module
from latentline_worker.callbacks.deliverer import MAX_BODY_BYTES, MAX_PER_HOST, SCHEDULE_S, TIMEOUT_S, Deliverer
from latentline_worker.callbacks.message import Links

SECRET = generate_secret()
PROMPT = "a very private prompt"
PATIENCE_S = 30  # how long a test waits for a signal before it fails; no test measures time
IMAGE = ImageRef(key="default/j1/1/0.png", seed=1, width=64, height=64, content_type="image/png", sha256="0" * 64, num_bytes=10)


ANY_PORT = parse_ports("1-65535")
LOOPBACK = CallbackRule(parse_networks("127.0.0.0/8, ::1"), ANY_PORT)
GLOBAL = CallbackRule()


class Outbox(Records):
    """The real outbox on fakeredis; remembers for how long callbacks were locked and put off."""

    def __init__(self) -> None:
        self.client: redis.Redis = fakeredis.FakeRedis(decode_responses=True)
        super().__init__(self.client, retention_s=600)
        self.delays_s: list[float] = []
        self.put_back_s: list[float] = []
        self.locks_s: list[float] = []

    def take_callback(self, callback_id: str, lock_s: float) -> dict[str, Any] | None:
        self.locks_s.append(lock_s)
        return super().take_callback(callback_id, lock_s)

    def settle_callback(self, callback_id: str, tries: int, entry: dict[str, Any], status: str, delay_s: float = 0.0) -> None:
        self.delays_s.append(delay_s)
        super().settle_callback(callback_id, tries, entry, status, delay_s)

    def put_back_callback(self, callback_id: str, tries: int, delay_s: float) -> None:
        self.put_back_s.append(delay_s)
        super().put_back_callback(callback_id, tries, delay_s)

    def job(self, url: str, events: Sequence[str] | None = None) -> str:
        chosen = {"events": events} if events else {}
        request = JobRequest.parse({"prompt": PROMPT, "seed": 1, "metadata": {"order": 7}, "callback": {"url": url, **chosen}})
        return run(self.client, records.submit([resolve(request)], 600))[0].id

    def end(self, job_id: str, status: Status = Status.SUCCEEDED, images: Sequence[ImageRef] = (IMAGE,)) -> str:
        """Claim and settle; the id of the callback that reports it."""
        claim = self.claim(job_id, "cpu@test", 30)
        assert claim is not None
        error = JobError(code="internal_error", message="it broke") if status is Status.FAILED else None
        self.settle(job_id, claim.token, status, images=images if status is Status.SUCCEEDED else (), error=error)
        return f"msg_{job_id}_{status.value}"

    def ended(self, url: str, status: Status = Status.SUCCEEDED, images: Sequence[ImageRef] = (IMAGE,)) -> str:
        return self.end(self.job(url), status, images)

    def with_url(self, url: str) -> str:
        """A callback to a URL that would be refused at submission; the id of the callback."""
        callback_id = self.ended("http://placeholder.example/")
        self.client.hset(routing.callback_key(callback_id), "url", url)
        return callback_id

    def look(self, callback_id: str) -> dict[str, Any]:
        (found,) = [one for one in run(self.client, records.callbacks()) if one["id"] == callback_id]
        return found

    def make_due(self, callback_id: str) -> None:
        self.client.hset(routing.callback_key(callback_id), "due", 0)


class Receiver:
    """A real HTTP receiver on loopback; ``statuses`` are answered in turn, the last one from then on."""

    def __init__(self, *statuses: int, gate: threading.Event | None = None, headers: Mapping[str, str] | None = None) -> None:
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.arrived = threading.Semaphore(0)
        answers = list(statuses) or [200]
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver.requests.append((self.path, {name.lower(): value for name, value in self.headers.items()}, body))
                receiver.arrived.release()
                if gate is not None:
                    gate.wait(PATIENCE_S)
                self.send_response(answers.pop(0) if len(answers) > 1 else answers[0])
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    def __enter__(self) -> Receiver:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook?token=t0psecret"


class RawReceiver:
    """Takes one connection, reads the request, and sends these bytes: at once, or one by one without end."""

    def __init__(self, answer: bytes, *, trickle: bool = False) -> None:
        self._answer, self._trickle = answer, trickle
        self._closing = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/"
        self._thread = threading.Thread(target=self._serve)

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        with connection:
            connection.recv(65536)
            try:
                connection.sendall(self._answer)
                while self._trickle and not self._closing.wait(0.01):
                    connection.sendall(b"x")
            except OSError:
                return  # the sender has given up
            self._closing.wait(PATIENCE_S)

    def __enter__(self) -> RawReceiver:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()
        self._listener.close()


class Attempts(httpcore.AsyncNetworkBackend):
    """Records where a connection would go, and makes none; or makes it to loopback."""

    def __init__(self, forward_to: int | None = None, dead: frozenset[str] = frozenset()) -> None:
        self.made: list[tuple[str, int]] = []
        self._forward_to, self._dead, self._real = forward_to, dead, httpcore.AnyIOBackend()

    async def connect_tcp(
        self, host: str, port: int, timeout: float | None = None, local_address: str | None = None, socket_options: Any = None
    ) -> httpcore.AsyncNetworkStream:
        self.made.append((host, port))
        if self._forward_to is None or host in self._dead:
            raise httpcore.ConnectError("recorded, not made")
        return await self._real.connect_tcp("127.0.0.1", self._forward_to, timeout)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """The name service of a test: host -> addresses. Other names do not resolve."""
    table: dict[str, list[str]] = {}
    real = socket.getaddrinfo

    def resolve(host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        found = table.get(name, [name])
        table.setdefault("asked", []).append(name)
        try:
            return [answer for address in found for answer in real(address, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)]
        except socket.gaierror:
            raise socket.gaierror(socket.EAI_NONAME, "no such name in this test") from None

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return table


@pytest.fixture
def outbox() -> Iterator[Outbox]:
    made = Outbox()
    yield made
    made.client.close()


@pytest.fixture
def deliverer(outbox: Outbox) -> Deliverer:
    return Deliverer(outbox, [SECRET], rule=LOOPBACK)


def test_a_receiver_can_verify_what_arrives(outbox: Outbox, deliverer: Deliverer) -> None:
    job_id = outbox.job("http://placeholder.example/")
    with Receiver(204) as receiver:
        outbox.client.hset(routing.job_key(job_id), "callback_url", receiver.url)
        callback_id = outbox.end(job_id)
        deliverer.deliver(callback_id)
    [(path, headers, body)] = receiver.requests
    assert path == "/hook?token=t0psecret"
    assert headers["host"] == f"127.0.0.1:{receiver.port}"
    assert headers["content-type"] == "application/json"
    verify(SECRET, headers, body)
    message = json.loads(body)
    assert message["type"] == "job.succeeded"
    assert message["id"] == headers["webhook-id"] == callback_id
    assert datetime.fromisoformat(message["timestamp"]).utcoffset() == timedelta(0)
    assert message["data"]["id"] == job_id
    assert message["data"]["status"] == "succeeded"
    assert message["data"]["metadata"] == {"order": 7}
    assert message["data"]["images"][0]["key"] == "default/j1/1/0.png"
    assert PROMPT.encode() not in body
    found = outbox.look(callback_id)
    assert (found["status"], found["tries"]) == ("delivered", 1)
    assert [(entry["try"], entry["result"]) for entry in found["log"]] == [(1, "status 204")]
    assert outbox.client.zscore(routing.due_callbacks_key(), callback_id) is None


def test_each_try_carries_urls_of_its_own_with_the_end_of_their_life(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    signed: list[str] = []

    def sign(_: Images, key: str) -> str:
        signed.append(key)
        return f"https://store.example/{key}?number={len(signed)}"

    monkeypatch.setattr(Images, "sign", sign)
    links = Links.of(Settings(s3_access_key_id="id", s3_secret_access_key="secret", presign_ttl_s=120))
    before = datetime.now(UTC)
    with Receiver(500, 200) as receiver:
        callback_id = outbox.ended(receiver.url)
        for _ in range(2):
            Deliverer(outbox, [SECRET], LOOPBACK, links=links).deliver(callback_id)
            outbox.make_due(callback_id)
    tried = [json.loads(body)["data"]["images"][0] for *_, body in receiver.requests]
    urls = [image["url"] for image in tried]
    assert [url.partition("?")[0] for url in urls] == ["https://store.example/default/j1/1/0.png"] * 2 and urls[0] != urls[1]
    until = datetime.fromisoformat(tried[0]["url_expires_at"])
    assert before + timedelta(seconds=118) <= until <= datetime.now(UTC) + timedelta(seconds=120)
    assert CallbackMessage.model_validate_json(receiver.requests[1][2]).data.images[0].url == urls[1]


def test_without_keys_of_the_store_a_callback_carries_no_urls(
    outbox: Outbox, deliverer: Deliverer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert Links.of(Settings()) is None
    assert "LATENTLINE_S3" in caplog.text
    with Receiver() as receiver:
        deliverer.deliver(outbox.ended(receiver.url))
    (image,) = json.loads(receiver.requests[0][2])["data"]["images"]
    assert (image["url"], image["url_expires_at"]) == (None, None) and image["key"]


def test_keys_that_cannot_sign_any_more_put_the_callback_off(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    links = Links.of(Settings(s3_access_key_id="id", s3_secret_access_key="secret"))

    def fail(_: Images, key: str) -> str:
        raise ConfigurationError("URLs cannot be presigned")

    monkeypatch.setattr(Images, "sign", fail)
    with Receiver() as receiver:
        callback_id = outbox.ended(receiver.url)
        Deliverer(outbox, [SECRET], LOOPBACK, links=links).deliver(callback_id)
    assert receiver.requests == [] and outbox.look(callback_id)["status"] == "pending"


def test_a_delivered_callback_is_not_sent_twice(outbox: Outbox, deliverer: Deliverer) -> None:
    with Receiver() as receiver:
        callback_id = outbox.ended(receiver.url)
        deliverer.deliver(callback_id)
        outbox.make_due(callback_id)
        deliverer.deliver(callback_id)
    assert len(receiver.requests) == 1


def test_a_callback_in_other_hands_or_not_due_or_unknown_is_left_alone(outbox: Outbox, deliverer: Deliverer) -> None:
    with Receiver() as receiver:
        callback_id = outbox.ended(receiver.url)
        assert outbox.take_callback(callback_id, 60) is not None
        deliverer.deliver(callback_id)
        deliverer.deliver("msg_nobody_succeeded")
    assert receiver.requests == []
    assert outbox.look(callback_id)["tries"] == 1


def test_a_callback_of_a_lost_deliverer_is_tried_by_another(outbox: Outbox, deliverer: Deliverer) -> None:
    with Receiver() as receiver:
        callback_id = outbox.ended(receiver.url)
        assert outbox.take_callback(callback_id, 0) is not None  # and never heard of again; its lock runs out at once
        deliverer.deliver(callback_id)
    assert len(receiver.requests) == 1
    assert (outbox.look(callback_id)["status"], outbox.look(callback_id)["tries"]) == ("delivered", 2)


@pytest.mark.parametrize("timeout_s", [TIMEOUT_S, 100.0])
def test_the_lock_outlasts_a_try_and_what_follows_it(outbox: Outbox, timeout_s: float) -> None:
    """Else a second deliverer would send a callback that the first is still sending."""
    with Receiver() as receiver:
        Deliverer(outbox, [SECRET], rule=LOOPBACK, timeout_s=timeout_s).deliver(outbox.ended(receiver.url))
    # The outcome is written within one call to the broker, which takes 5 s at most.
    assert outbox.locks_s[-1] >= timeout_s + 5


def test_a_job_that_failed_tells_its_error(outbox: Outbox, deliverer: Deliverer) -> None:
    with Receiver() as receiver:
        deliverer.deliver(outbox.ended(receiver.url, Status.FAILED))
    message = json.loads(receiver.requests[0][2])
    assert message["type"] == "job.failed"
    assert message["data"]["error"] == {"code": "internal_error", "message": "it broke"}


def test_only_the_chosen_events_are_told(outbox: Outbox, deliverer: Deliverer) -> None:
    with Receiver() as receiver:
        failed = outbox.job(receiver.url, events=("job.running", "job.succeeded"))
        outbox.end(failed, Status.FAILED)
        outbox.end(outbox.job(receiver.url, events=("job.failed",)))
        for one in run(outbox.client, records.callbacks()):
            deliverer.deliver(one["id"])
    assert [json.loads(body)["id"] for *_, body in receiver.requests] == [f"msg_{failed}_running_1"]


def test_a_job_without_a_callback_writes_none(outbox: Outbox) -> None:
    job_id = run(outbox.client, records.submit([resolve(JobRequest.parse({"prompt": PROMPT}))], 600))[0].id
    outbox.end(job_id)
    assert run(outbox.client, records.callbacks()) == []


def test_seq_orders_the_events_and_each_body_is_the_record_at_its_event(outbox: Outbox, deliverer: Deliverer) -> None:
    with Receiver() as receiver:
        job_id = outbox.job(receiver.url, events=("job.running", "job.succeeded"))
        ended = outbox.end(job_id)
        deliverer.deliver(ended)  # out of order, as it may happen on the way
        deliverer.deliver(f"msg_{job_id}_running_1")
    late, early = (json.loads(body) for *_, body in receiver.requests)
    events = {event.type: event.data["seq"] for event in run(outbox.client, records.events(job_id))}
    assert (early["seq"], late["seq"]) == (events["job.running"], events["job.succeeded"])
    assert early["seq"] < late["seq"]
    assert (early["data"]["status"], late["data"]["status"]) == ("running", "succeeded")


def test_every_try_follows_the_schedule_and_the_last_gives_up(outbox: Outbox, deliverer: Deliverer) -> None:
    assert SCHEDULE_S == (0, 5, 5 * 60, 30 * 60, 2 * 3600, 5 * 3600, 10 * 3600, 14 * 3600, 20 * 3600, 24 * 3600)
    with Receiver(500) as receiver:
        callback_id = outbox.ended(receiver.url)
        for num_tries in range(1, len(SCHEDULE_S)):
            deliverer.deliver(callback_id)
            found = outbox.look(callback_id)
            assert (found["status"], found["tries"]) == ("pending", num_tries)
            assert SCHEDULE_S[num_tries] * 0.8 <= outbox.delays_s[-1] <= SCHEDULE_S[num_tries] * 1.2
            deliverer.deliver(callback_id)  # not due yet: nothing happens
            assert outbox.look(callback_id)["tries"] == num_tries
            outbox.make_due(callback_id)
        deliverer.deliver(callback_id)
    assert len(receiver.requests) == len(SCHEDULE_S)
    found = outbox.look(callback_id)
    assert (found["status"], found["tries"]) == ("failed", len(SCHEDULE_S))
    assert [entry["try"] for entry in found["log"]] == list(range(1, len(SCHEDULE_S) + 1))
    assert {entry["result"] for entry in found["log"]} == {"status 500"}
    assert outbox.client.zcard(routing.due_callbacks_key()) == 0


def test_pauses_are_varied(outbox: Outbox, deliverer: Deliverer) -> None:
    with Receiver(500) as receiver:
        for _ in range(5):
            deliverer.deliver(outbox.ended(receiver.url))
    assert len(set(outbox.delays_s)) > 1


def test_the_outbox_knows_when_the_next_try_is_due(outbox: Outbox, deliverer: Deliverer) -> None:
    with Receiver(500) as receiver:
        callback_id = outbox.ended(receiver.url)
        before = time.time()
        deliverer.deliver(callback_id)
        after = time.time()
    due = outbox.look(callback_id)["due"]
    assert before <= due - outbox.delays_s[0] <= after
    assert outbox.client.zscore(routing.due_callbacks_key(), callback_id) == pytest.approx(due, abs=0.001)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308, 300, 304, 400, 404, 429, 500, 503])
def test_whatever_is_no_2xx_is_tried_again(outbox: Outbox, deliverer: Deliverer, status: int) -> None:
    with Receiver(status) as receiver:
        callback_id = outbox.ended(receiver.url)
        deliverer.deliver(callback_id)
    found = outbox.look(callback_id)
    assert (found["status"], found["log"][-1]["result"]) == ("pending", f"status {status}")


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
def test_every_2xx_is_a_delivery(outbox: Outbox, deliverer: Deliverer, status: int) -> None:
    with Receiver(status) as receiver:
        callback_id = outbox.ended(receiver.url)
        deliverer.deliver(callback_id)
    assert outbox.look(callback_id)["status"] == "delivered"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(outbox: Outbox, deliverer: Deliverer, status: int) -> None:
    with Receiver(200) as inner, Receiver(status, headers={"location": inner.url}) as outer:
        callback_id = outbox.ended(outer.url)
        deliverer.deliver(callback_id)
    assert inner.requests == []
    assert outbox.look(callback_id)["status"] == "pending"


@pytest.mark.parametrize("name", ["Retry-After", "retry-after"])
@pytest.mark.parametrize(("value", "delay_s"), [("120", 120.0), (" 7200 ", 7200.0), ("99999999", 86400.0), ("9" * 400, 86400.0)])
def test_a_receiver_may_ask_for_a_longer_pause(outbox: Outbox, deliverer: Deliverer, name: str, value: str, delay_s: float) -> None:
    with Receiver(503, headers={name: value}) as receiver:
        deliverer.deliver(outbox.ended(receiver.url))
    assert outbox.delays_s == [delay_s]


@pytest.mark.parametrize("name", ["Retry-After", "retry-after"])
@pytest.mark.parametrize(("ahead_s", "delay_s"), [(3600, 3600.0), (40 * 86400, 86400.0)])
def test_a_receiver_may_name_a_date(
    outbox: Outbox, deliverer: Deliverer, monkeypatch: pytest.MonkeyPatch, name: str, ahead_s: int, delay_s: float
) -> None:
    moment = datetime(2030, 1, 1, tzinfo=UTC)

    class Frozen(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return moment

    monkeypatch.setattr(deliverer_module, "datetime", Frozen)
    with Receiver(503, headers={name: format_datetime(moment + timedelta(seconds=ahead_s), usegmt=True)}) as receiver:
        deliverer.deliver(outbox.ended(receiver.url))
    assert outbox.delays_s == [delay_s]


@pytest.mark.parametrize(
    "value",
    [
        "soon",
        "",
        "-5",
        "1e9",
        "nan",
        "Wed, 21 Oct 2015 07:28:00 GMT",
        "Mon, 01 Jan 2035 00:00:00 -0000",
        "Mon, 01 Jan 99999999999999999999 00:00:00 GMT",
        "Mon, 01 Jan 2035 00:00:00 +99999999999999999999",
    ],
)
def test_a_retry_after_that_is_past_or_garbage_leaves_the_schedule_alone(outbox: Outbox, deliverer: Deliverer, value: str) -> None:
    with Receiver(503, headers={"retry-after": value}) as receiver:
        callback_id = outbox.ended(receiver.url)
        deliverer.deliver(callback_id)
    assert 4 <= outbox.delays_s[0] <= 6
    assert outbox.look(callback_id)["log"][-1]["result"] == "status 503"


def test_a_garbage_retry_after_does_not_spoil_a_delivery(outbox: Outbox, deliverer: Deliverer) -> None:
    with Receiver(200, headers={"retry-after": "Mon, 01 Jan 99999999999999999999 00:00:00 GMT"}) as receiver:
        callback_id = outbox.ended(receiver.url)
        deliverer.deliver(callback_id)
    assert outbox.look(callback_id)["status"] == "delivered"


def test_after_gone_nothing_more_goes_to_that_url(outbox: Outbox, deliverer: Deliverer) -> None:
    with Receiver(410, 200) as receiver:
        first, second = outbox.ended(receiver.url), outbox.ended(receiver.url)
        elsewhere = outbox.ended(receiver.url.replace("/hook", "/other"))
        deliverer.deliver(first)
        deliverer.deliver(second)
        assert len(receiver.requests) == 1
        deliverer.deliver(elsewhere)
        assert [outbox.look(one)["status"] for one in (first, second, elsewhere)] == ["gone", "gone", "delivered"]
        assert "410" in outbox.look(second)["log"][-1]["result"]
        # An operator who sends one again means that the receiver is back.
        assert run(outbox.client, records.replay_callback(first))
        deliverer.deliver(first)
        third = outbox.ended(receiver.url)
        deliverer.deliver(third)
    assert [outbox.look(one)["status"] for one in (first, third)] == ["delivered", "delivered"]


def test_nothing_is_sent_unsigned(outbox: Outbox) -> None:
    backend = Attempts()
    callback_id = outbox.ended("http://127.0.0.1/")
    Deliverer(outbox, [], rule=LOOPBACK, backend=backend).deliver(callback_id)
    found = outbox.look(callback_id)
    assert found["status"] == "failed"
    assert "LATENTLINE_CALLBACK_SECRET" in found["log"][-1]["result"]
    assert backend.made == []


@pytest.mark.parametrize("secrets", [["hunter2"], [SECRET, "whsec_c2hvcnQ="]])
def test_a_malformed_secret_stops_the_start(outbox: Outbox, secrets: list[str]) -> None:
    with pytest.raises(ConfigurationError, match="whsec_"):
        Deliverer(outbox, secrets, rule=GLOBAL)


def test_two_secrets_give_two_signatures_and_either_verifies(outbox: Outbox) -> None:
    old, new = generate_secret(), generate_secret()
    with Receiver() as receiver:
        Deliverer(outbox, [new, old], rule=LOOPBACK).deliver(outbox.ended(receiver.url))
    [(_, headers, body)] = receiver.requests
    assert len(set(headers["webhook-signature"].split(" "))) == 2
    for secret in (old, new):
        verify(secret, headers, body)
        assert standardwebhooks.Webhook(secret).verify(body, headers)["type"] == "job.succeeded"
    with pytest.raises(WebhookError):
        verify(generate_secret(), headers, body)
    with pytest.raises(standardwebhooks.WebhookVerificationError):
        standardwebhooks.Webhook(generate_secret()).verify(body, headers)


def test_retries_keep_id_and_body_and_take_a_fresh_timestamp(outbox: Outbox, deliverer: Deliverer, monkeypatch: pytest.MonkeyPatch) -> None:
    base = int(time.time())
    with Receiver(500, 503, 200) as receiver:
        callback_id = outbox.ended(receiver.url)
        for shift_s in (-100, 0, 100):
            monkeypatch.setattr(deliverer_module, "time", SimpleNamespace(time=lambda moment=base + shift_s: float(moment)))
            outbox.make_due(callback_id)
            deliverer.deliver(callback_id)
    assert [headers["webhook-id"] for _, headers, _ in receiver.requests] == [callback_id] * 3
    assert [int(headers["webhook-timestamp"]) - base for _, headers, _ in receiver.requests] == [-100, 0, 100]
    assert len({headers["webhook-signature"] for _, headers, _ in receiver.requests}) == 3
    assert len({body for *_, body in receiver.requests}) == 1
    for _, headers, body in receiver.requests:
        verify(SECRET, headers, body)
    assert outbox.look(callback_id)["status"] == "delivered"


def test_one_host_gets_a_few_tries_at_a_time_and_the_others_wait_without_losing_one(
    outbox: Outbox, deliverer: Deliverer, names: dict[str, list[str]]
) -> None:
    names["other.example"] = ["127.0.0.1"]
    gate = threading.Event()
    with Receiver(gate=gate) as slow, Receiver() as quick, ThreadPoolExecutor(MAX_PER_HOST) as pool:
        inside = [outbox.ended(slow.url) for _ in range(MAX_PER_HOST)]
        waiting = outbox.ended(slow.url.replace("/hook", "/another-path"))
        elsewhere = outbox.ended(f"http://other.example:{quick.port}/")
        try:
            tries = [pool.submit(deliverer.deliver, one) for one in inside]
            assert all(slow.arrived.acquire(timeout=PATIENCE_S) for _ in inside)
            deliverer.deliver(waiting)
            assert (outbox.look(waiting)["status"], outbox.look(waiting)["tries"], outbox.look(waiting)["log"]) == ("pending", 0, [])
            assert len(outbox.put_back_s) == 1 and 0.5 <= outbox.put_back_s[0] <= 1.5
            deliverer.deliver(elsewhere)  # the slow host holds up nobody else
            assert outbox.look(elsewhere)["status"] == "delivered"
        finally:
            gate.set()
        for one in tries:
            one.result(PATIENCE_S)
        outbox.make_due(waiting)
        deliverer.deliver(waiting)
    assert {outbox.look(one)["status"] for one in [*inside, waiting]} == {"delivered"}
    assert outbox.look(waiting)["tries"] == 1


def test_a_failed_try_gives_its_place_back(outbox: Outbox, deliverer: Deliverer) -> None:
    with Receiver(500) as receiver:
        for _ in range(MAX_PER_HOST + 2):
            deliverer.deliver(outbox.ended(receiver.url))
    assert len(receiver.requests) == MAX_PER_HOST + 2
    assert outbox.put_back_s == []


def test_a_body_beyond_the_cap_is_not_sent_and_not_tried_again(outbox: Outbox, deliverer: Deliverer) -> None:
    with Receiver() as receiver:
        callback_id = outbox.ended(receiver.url, images=[IMAGE.model_copy(update={"key": "k" * MAX_BODY_BYTES})])
        deliverer.deliver(callback_id)
    assert receiver.requests == []
    found = outbox.look(callback_id)
    assert (found["status"], found["tries"]) == ("failed", 1)
    assert str(MAX_BODY_BYTES) in found["log"][-1]["result"]


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/",
        "http://127.1/",
        "http://2130706433/",
        "http://0x7f.0.0.1/",
        "http://0.0.0.0/",
        "http://10.0.0.1/",
        "http://172.16.0.1/",
        "http://192.168.1.1/",
        "http://169.254.169.254/latest/meta-data/",
        "http://100.64.0.1/",
        "http://192.0.0.192/",
        "http://192.88.99.1/",
        "http://198.18.0.1/",
        "http://224.0.0.1/",
        "http://240.0.0.1/",
        "http://255.255.255.255/",
        "http://[::1]/",
        "http://[::]/",
        "http://[::127.0.0.1]/",
        "http://[::ffff:127.0.0.1]/",
        "http://[::ffff:a9fe:a9fe]/",
        "http://[64:ff9b::7f00:1]/",
        "http://[64:ff9b::a9fe:a9fe]/",
        "http://[64:ff9b:1::1]/",
        "http://[2002:7f00:1::]/",
        "http://[2002:a9fe:a9fe::]/",
        "http://[2001:0:7f00:1::]/",
        "http://[fe80::1]/",
        "http://[fc00::1]/",
        "http://[fec0::1]/",
        "http://[ff02::1]/",
        "https://localhost/",
        "https://inside.example/",
        "https://half-inside.example/",
        "https://half-inside-6.example/",
        "https://half-inside-mapped.example/",
    ],
)
def test_private_addresses_get_no_packet(outbox: Outbox, names: dict[str, list[str]], url: str) -> None:
    names["localhost"] = ["127.0.0.1", "::1"]
    names["inside.example"] = ["10.1.2.3"]
    names["half-inside.example"] = ["93.184.215.14", "10.1.2.3"]
    names["half-inside-6.example"] = ["93.184.215.14", "::1"]
    names["half-inside-mapped.example"] = ["93.184.215.14", "::ffff:10.1.2.3"]
    backend = Attempts()
    callback_id = outbox.ended(url)
    Deliverer(outbox, [SECRET], rule=GLOBAL, backend=backend).deliver(callback_id)
    assert backend.made == []
    found = outbox.look(callback_id)
    assert (found["status"], found["tries"]) == ("refused", 1)
    assert "not global" in found["log"][-1]["result"]


@pytest.mark.parametrize(
    "url",
    [
        "http://0177.0.0.1/",  # octal
        "http://１２７.０.０.１/",  # wide digits
        "http://127。0。0。1/",  # ideographic full stops
        "http://[fe80::1%25lo]/",
        "http://[v1.fe80]/",
        "http://☃.example/",
        "http://.../",
        "http://a%2eb@127.0.0.1/",
        "http://127.0.0.1%00.example/",
        "http://a.example\r\nx-injected: yes/",
        "http://a.example:80\\@127.0.0.1/",
    ],
)
def test_a_host_in_disguise_gets_no_packet_and_ends_in_the_log(outbox: Outbox, names: dict[str, list[str]], url: str) -> None:
    backend = Attempts()
    callback_id = outbox.with_url(url)
    Deliverer(outbox, [SECRET], rule=GLOBAL, backend=backend).deliver(callback_id)
    assert backend.made == []
    found = outbox.look(callback_id)
    assert found["status"] in ("refused", "pending", "failed")
    assert len(found["log"]) == 1


@pytest.mark.parametrize("path", ["a\r\nx-injected: yes\r\n\r\n", "a\nx-injected: yes", "a\x00b", "a\tb", "\x7f"])
def test_a_url_cannot_bring_headers_of_its_own(outbox: Outbox, deliverer: Deliverer, path: str) -> None:
    with Receiver() as receiver:
        callback_id = outbox.with_url(f"http://127.0.0.1:{receiver.port}/{path}")
        deliverer.deliver(callback_id)
    assert not any("x-injected" in headers for _, headers, _ in receiver.requests)
    found = outbox.look(callback_id)
    assert found["status"] in ("pending", "failed", "delivered")
    assert len(found["log"]) == 1


def test_encoded_line_ends_stay_encoded(outbox: Outbox, deliverer: Deliverer) -> None:
    with Receiver() as receiver:
        deliverer.deliver(outbox.ended(f"http://127.0.0.1:{receiver.port}/%0d%0ax-injected:%20yes"))
    [(path, headers, _)] = receiver.requests
    assert path == "/%0d%0ax-injected:%20yes"
    assert "x-injected" not in headers


def test_loopback_is_refused_by_a_real_connection_unless_allowed(outbox: Outbox) -> None:
    with Receiver() as receiver:
        callback_id = outbox.ended(receiver.url)
        Deliverer(outbox, [SECRET], rule=GLOBAL).deliver(callback_id)
    assert receiver.requests == []
    assert outbox.look(callback_id)["status"] == "refused"


def test_the_connection_goes_to_the_address_that_was_checked(outbox: Outbox, names: dict[str, list[str]]) -> None:
    names["shop.example"] = ["93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c"]
    with Receiver() as receiver:
        backend = Attempts(forward_to=receiver.port, dead=frozenset({"93.184.215.14"}))
        callback_id = outbox.ended("http://shop.example:8080/hook")
        Deliverer(outbox, [SECRET], rule=GLOBAL, backend=backend).deliver(callback_id)
    assert outbox.look(callback_id)["status"] == "delivered"
    # Literal addresses reach the connector, so nothing is left to resolve; the second is tried when the first is dead.
    assert backend.made == [("93.184.215.14", 8080), ("2606:2800:21f:cb07:6820:80da:af6b:8b2c", 8080)]
    assert names["asked"] == ["shop.example"]
    assert receiver.requests[0][1]["host"] == "shop.example:8080"


def test_international_names_reach_dns_and_the_receiver_in_ascii(outbox: Outbox, names: dict[str, list[str]]) -> None:
    names["xn--bcher-kva.example"] = ["93.184.215.14"]
    with Receiver() as receiver:
        backend = Attempts(forward_to=receiver.port)
        callback_id = outbox.ended("http://bücher.example/ä?ü=1")
        Deliverer(outbox, [SECRET], rule=GLOBAL, backend=backend).deliver(callback_id)
    [(path, headers, body)] = receiver.requests
    assert (names["asked"], backend.made) == (["xn--bcher-kva.example"], [("93.184.215.14", 80)])
    assert (path, headers["host"]) == ("/%C3%A4?%C3%BC=1", "xn--bcher-kva.example")
    verify(SECRET, headers, body)
    assert outbox.look(callback_id)["status"] == "delivered"


def test_an_international_name_of_a_private_address_gets_no_packet(outbox: Outbox, names: dict[str, list[str]]) -> None:
    names["xn--bcher-kva.example"] = ["192.168.0.1"]
    backend = Attempts()
    callback_id = outbox.ended("http://bücher.example/")
    Deliverer(outbox, [SECRET], rule=GLOBAL, backend=backend).deliver(callback_id)
    assert (outbox.look(callback_id)["status"], backend.made) == ("refused", [])


def test_a_name_that_changes_between_tries_is_checked_again(outbox: Outbox, names: dict[str, list[str]]) -> None:
    names["rebind.example"] = ["93.184.215.14"]

    class Rebinding(Attempts):
        async def connect_tcp(self, *args: Any, **kwargs: Any) -> httpcore.AsyncNetworkStream:
            names["rebind.example"] = ["127.0.0.1"]
            return await super().connect_tcp(*args, **kwargs)

    backend = Rebinding()
    deliverer = Deliverer(outbox, [SECRET], rule=GLOBAL, backend=backend)
    callback_id = outbox.ended("http://rebind.example/")
    deliverer.deliver(callback_id)
    assert outbox.look(callback_id)["status"] == "pending"
    outbox.make_due(callback_id)
    deliverer.deliver(callback_id)
    assert outbox.look(callback_id)["status"] == "refused"
    assert backend.made == [("93.184.215.14", 80)]


def test_tls_asks_for_the_host_by_name(outbox: Outbox, names: dict[str, list[str]]) -> None:
    names["shop.example"] = ["93.184.215.14"]
    asked: list[str | None] = []

    class Stream(httpcore.AsyncNetworkStream):
        async def start_tls(self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None) -> Any:
            asked.append(server_hostname)
            raise httpcore.ConnectError("enough seen")

        async def aclose(self) -> None:
            pass

    class Opens(Attempts):
        async def connect_tcp(self, *args: Any, **kwargs: Any) -> httpcore.AsyncNetworkStream:
            return Stream()

    callback_id = outbox.ended("https://shop.example/")
    Deliverer(outbox, [SECRET], rule=GLOBAL, backend=Opens()).deliver(callback_id)
    assert outbox.look(callback_id)["status"] == "pending"
    assert asked == ["shop.example"]


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"])
def test_proxies_of_the_environment_are_not_used(
    outbox: Outbox, deliverer: Deliverer, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    with Receiver() as proxy, Receiver() as receiver:
        monkeypatch.setenv(variable, proxy.url)
        callback_id = outbox.ended(receiver.url)
        deliverer.deliver(callback_id)
    assert proxy.requests == []
    assert outbox.look(callback_id)["status"] == "delivered"


def test_a_name_that_does_not_resolve_is_tried_again(outbox: Outbox, deliverer: Deliverer, names: dict[str, list[str]]) -> None:
    callback_id = outbox.ended("http://nowhere.example/")
    for _ in range(2):
        outbox.make_due(callback_id)
        deliverer.deliver(callback_id)
    assert names["asked"] == ["nowhere.example"] * 2
    found = outbox.look(callback_id)
    assert (found["status"], found["tries"]) == ("pending", 2)
    assert "cannot be resolved" in found["log"][-1]["result"]


def test_a_receiver_that_never_answers_is_given_up_for_now(outbox: Outbox) -> None:
    gate = threading.Event()
    with Receiver(gate=gate) as receiver:
        callback_id = outbox.ended(receiver.url)
        try:
            Deliverer(outbox, [SECRET], rule=LOOPBACK, timeout_s=0.2).deliver(callback_id)
        finally:
            gate.set()
    found = outbox.look(callback_id)
    assert (found["status"], found["log"][-1]["result"]) == ("pending", "no answer within 0.2 s")


def test_a_receiver_that_drips_its_answer_does_not_win_time(outbox: Outbox) -> None:
    with RawReceiver(b"HTTP/1.1 200 OK\r\nx-drip: ", trickle=True) as receiver:
        callback_id = outbox.ended(receiver.url)
        Deliverer(outbox, [SECRET], rule=LOOPBACK, timeout_s=0.2).deliver(callback_id)
    assert outbox.look(callback_id)["log"][-1]["result"] == "no answer within 0.2 s"


def test_of_an_endless_answer_only_the_status_is_read(outbox: Outbox, deliverer: Deliverer) -> None:
    with RawReceiver(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000000000\r\n\r\n", trickle=True) as receiver:
        callback_id = outbox.ended(receiver.url)
        deliverer.deliver(callback_id)
    assert outbox.look(callback_id)["status"] == "delivered"


@pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH_9.9\r\n", b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 100_000, b"\x00" * 100])
def test_an_answer_that_is_no_http_is_a_failed_try(outbox: Outbox, answer: bytes) -> None:
    with RawReceiver(answer) as receiver:
        callback_id = outbox.ended(receiver.url)
        Deliverer(outbox, [SECRET], rule=LOOPBACK, timeout_s=1).deliver(callback_id)
    assert outbox.look(callback_id)["status"] == "pending"


def test_what_an_answer_says_of_itself_is_kept_short(outbox: Outbox, deliverer: Deliverer) -> None:
    with RawReceiver(b"HTTP/1.1 " + b"A" * 5000 + b"\r\n\r\n") as receiver:
        callback_id = outbox.ended(receiver.url)
        deliverer.deliver(callback_id)
    assert len(outbox.look(callback_id)["log"][-1]["result"]) <= 300


def test_nobody_listening_is_a_failed_try(outbox: Outbox, deliverer: Deliverer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    callback_id = outbox.ended(f"http://127.0.0.1:{port}/")
    deliverer.deliver(callback_id)
    assert outbox.look(callback_id)["status"] == "pending"


def test_the_log_shows_neither_prompt_nor_url(outbox: Outbox, deliverer: Deliverer, caplog: pytest.LogCaptureFixture) -> None:
    with Receiver(500) as receiver, caplog.at_level(logging.INFO):
        callback_id = outbox.ended(receiver.url)
        deliverer.deliver(callback_id)
    assert f"callback {callback_id}, try 1: pending (status 500)" in caplog.text
    assert PROMPT not in caplog.text
    assert "t0psecret" not in caplog.text


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "93.184.215.14", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::"]
)
def test_global_addresses(address: str) -> None:
    assert is_global(address)


@pytest.mark.parametrize("address", ["168.63.129.16", "3fff::1", "::ffff:168.63.129.16"])
def test_addresses_that_python_calls_global_and_callbacks_do_not_reach(address: str) -> None:
    assert not is_global(address)


@pytest.mark.parametrize(
    ("url", "goes"), [("http://a.example:8080/", True), ("http://a.example:6379/", False), ("http://a.example:22/", False)]
)
def test_only_some_ports_are_reached(outbox: Outbox, names: dict[str, list[str]], url: str, goes: bool) -> None:
    names["a.example"] = ["93.184.215.14"]
    backend = Attempts()
    callback_id = outbox.ended(url)
    Deliverer(outbox, [SECRET], rule=GLOBAL, backend=backend).deliver(callback_id)
    assert bool(backend.made) == goes
    assert (outbox.look(callback_id)["status"] == "refused") != goes


@pytest.mark.parametrize("text", ["", "0", "443,", "70000", "9-8", "https", "-5"])
def test_ports_that_are_none_are_refused_at_the_start(text: str) -> None:
    with pytest.raises(ValueError, match="ports from 1 to 65535"):
        Settings(callback_ports=text)


def test_a_callback_of_a_record_that_nobody_can_read_ends_instead_of_coming_back(outbox: Outbox, deliverer: Deliverer) -> None:
    with Receiver() as receiver:
        job_id = outbox.job(receiver.url)
        outbox.client.hset(routing.job_key(job_id), "request", '{"version": 2}')
        with pytest.raises(JobNotFound):
            outbox.claim(job_id, "cpu@test", 30)
        deliverer.deliver(f"msg_{job_id}_failed")
    status = outbox.client.hget(routing.callback_key(f"msg_{job_id}_failed"), "status")
    assert status in ("failed", "delivered")
    assert outbox.client.zscore(routing.due_callbacks_key(), f"msg_{job_id}_failed") is None


def test_due_callbacks_are_handed_out_again_and_ended_ones_are_not(outbox: Outbox, deliverer: Deliverer) -> None:
    with Receiver() as receiver:
        delivered, lost = outbox.ended(receiver.url), outbox.ended(receiver.url)
        deliverer.deliver(delivered)
        outbox.client.delete(routing.CALLBACK_QUEUE)  # the messages of both are lost,
        outbox.client.zadd(routing.due_callbacks_key(), {lost: 1})  # and nobody has taken the other for a while
        assert outbox.wake_callbacks() == 1
        assert outbox.wake_callbacks() == 0  # the deliverer has time to take it
    (message,) = outbox.client.lrange(routing.CALLBACK_QUEUE, 0, -1)
    (callback_id,), _, _ = json.loads(json.loads(message)["body"])
    assert callback_id == lost


@pytest.mark.parametrize(
    ("allow", "address", "goes"),
    [
        ("10.1.0.0/16", "10.1.2.3", True),
        ("10.1.0.0/16, fd00::/8", "fd00::5", True),
        ("10.1.0.0/16", "10.2.0.1", False),
        ("10.1.0.0/16", "169.254.169.254", False),
        ("10.1.2.3", "10.1.2.4", False),
        ("", "10.1.2.3", False),
    ],
)
def test_private_receivers_are_allowed_by_network(
    outbox: Outbox, names: dict[str, list[str]], allow: str, address: str, goes: bool
) -> None:
    names["inside.example"] = [address]
    backend = Attempts()
    callback_id = outbox.ended("http://inside.example/hook")
    Deliverer(outbox, [SECRET], rule=CallbackRule(parse_networks(allow)), backend=backend).deliver(callback_id)
    assert [host for host, _ in backend.made] == ([address] if goes else [])


@pytest.mark.parametrize("text", ["10.1.0.0/40", "everything", "10.1.2.3/16"])
def test_an_allow_list_that_is_none_is_refused_at_the_start(text: str) -> None:
    with pytest.raises(ValueError, match="networks or addresses separated by commas"):
        Settings(callback_allow=text)
