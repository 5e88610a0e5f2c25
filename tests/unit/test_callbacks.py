"""Callbacks: signed, filtered, retried, and never sent to an address that is not global. No packet leaves loopback."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpcore
import pytest

from latentline.errors import ConfigurationError
from latentline.jobs import Callback, ImageRef, JobRecord, JobRequest, Status
from latentline.webhooks import generate_secret, verify
from latentline_worker.callbacks import CallbackSender, Outcome, is_global

SECRET = generate_secret()
PROMPT = "a very private prompt"
NO_PAUSES = (0.0, 0.0, 0.0)


def make_record(url: str, status: Status = Status.SUCCEEDED, **callback: Any) -> JobRecord:
    request = JobRequest.parse({"prompt": PROMPT, "seed": 1, "metadata": {"order": 7}, "callback": {"url": url, **callback}})
    image = ImageRef(key="default/j1/1/0.png", seed=1, width=64, height=64, content_type="image/png", sha256="0" * 64, num_bytes=10)
    return JobRecord(
        id="j1", request=request, status=status, num_steps=20, attempt=1, created_at=1.0, started_at=2.0, finished_at=3.5, images=(image,)
    )


def callback(url: str) -> Callback:
    return Callback(url=url)


class Receiver:
    """A real HTTP receiver on loopback; ``statuses`` are answered in turn, the last one for ever."""

    def __init__(self, *statuses: int, gate: threading.Event | None = None, location: str | None = None) -> None:
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        answers = list(statuses) or [200]
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver.requests.append((self.path, {name.lower(): value for name, value in self.headers.items()}, body))
                if gate is not None:
                    gate.wait(30)
                self.send_response(answers.pop(0) if len(answers) > 1 else answers[0])
                if location:
                    self.send_header("location", location)
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
    """The name service of a test: host -> addresses. A name that is not there does not resolve."""
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
def sender() -> Iterator[CallbackSender]:
    made = CallbackSender(SECRET, allow_private=True, pauses_s=NO_PAUSES)
    yield made
    made.close(5)


def test_a_receiver_can_verify_what_arrives(sender: CallbackSender) -> None:
    with Receiver(204) as receiver:
        record = make_record(receiver.url)
        assert sender.send(callback(receiver.url), "job.succeeded", record) is Outcome.DELIVERED
    [(path, headers, body)] = receiver.requests
    assert path == "/hook?token=t0psecret"
    assert headers["host"] == f"127.0.0.1:{receiver.port}"
    assert headers["content-type"] == "application/json"
    verify(SECRET, headers, body)
    message = json.loads(body)
    assert message["type"] == "job.succeeded"
    assert message["id"] == headers["webhook-id"]
    assert message["timestamp"] == "1970-01-01T00:00:03.500000Z"
    assert message["data"]["id"] == "j1"
    assert message["data"]["status"] == "succeeded"
    assert message["data"]["metadata"] == {"order": 7}
    assert message["data"]["images"][0]["key"] == "default/j1/1/0.png"
    assert PROMPT.encode() not in body


def test_retries_keep_the_id(sender: CallbackSender) -> None:
    with Receiver(500, 503, 200) as receiver:
        assert sender.send(callback(receiver.url), "job.succeeded", make_record(receiver.url)) is Outcome.DELIVERED
    assert len(receiver.requests) == 3
    assert len({headers["webhook-id"] for _, headers, _ in receiver.requests}) == 1


@pytest.mark.parametrize(
    ("status", "tries", "outcome"), [(500, 3, Outcome.FAILED), (404, 3, Outcome.FAILED), (302, 3, Outcome.FAILED), (410, 1, Outcome.GONE)]
)
def test_answers_that_are_no_success(sender: CallbackSender, status: int, tries: int, outcome: Outcome) -> None:
    with Receiver(status) as receiver:
        assert sender.send(callback(receiver.url), "job.failed", make_record(receiver.url, Status.FAILED)) is outcome
    assert len(receiver.requests) == tries


def test_redirects_are_not_followed(sender: CallbackSender) -> None:
    with Receiver(200) as inner, Receiver(307, location=inner.url) as outer:
        assert sender.send(callback(outer.url), "job.succeeded", make_record(outer.url)) is Outcome.FAILED
    assert inner.requests == []


def test_only_the_chosen_events() -> None:
    sender = CallbackSender(SECRET, allow_private=True, pauses_s=NO_PAUSES)
    with Receiver() as receiver:
        record = make_record(receiver.url, events=("job.running", "job.succeeded"))
        sender.notify(record, "job.failed")
        sender.notify(record.model_copy(update={"status": Status.RUNNING}), "job.running")
        sender.notify(record, "job.succeeded")
        sender.close(10)
    assert {json.loads(body)["type"] for *_, body in receiver.requests} == {"job.running", "job.succeeded"}


def test_without_a_callback_nothing_starts(sender: CallbackSender) -> None:
    record = make_record("http://127.0.0.1/")
    sender.notify(record.model_copy(update={"request": record.request.model_copy(update={"callback": None})}), "job.succeeded")
    assert not [thread for thread in threading.enumerate() if thread.name == "callbacks"]


def test_nothing_is_sent_unsigned(caplog: pytest.LogCaptureFixture) -> None:
    backend = Attempts()
    sender = CallbackSender(None, allow_private=True, backend=backend)
    record = make_record("http://127.0.0.1/")
    with caplog.at_level(logging.WARNING):
        assert sender.send(callback("http://127.0.0.1/"), "job.succeeded", record) is Outcome.NOT_CONFIGURED
    sender.close(1)
    assert "LATENTLINE_CALLBACK_SECRET" in caplog.text
    assert backend.made == []


def test_a_malformed_secret_stops_the_start() -> None:
    with pytest.raises(ConfigurationError, match="whsec_"):
        CallbackSender("hunter2", allow_private=False)


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
        "http://224.0.0.1/",
        "http://255.255.255.255/",
        "http://[::1]/",
        "http://[::]/",
        "http://[::ffff:127.0.0.1]/",
        "http://[::ffff:a9fe:a9fe]/",
        "http://[64:ff9b::7f00:1]/",
        "http://[64:ff9b:1::1]/",
        "http://[2002:7f00:1::]/",
        "http://[fe80::1]/",
        "http://[fc00::1]/",
        "http://[fec0::1]/",
        "http://[ff02::1]/",
        "https://inside.example/",
        "https://half-inside.example/",
        "https://half-inside-6.example/",
    ],
)
def test_private_addresses_get_no_packet(names: dict[str, list[str]], url: str) -> None:
    names["inside.example"] = ["10.1.2.3"]
    names["half-inside.example"] = ["93.184.215.14", "10.1.2.3"]
    names["half-inside-6.example"] = ["93.184.215.14", "::1"]
    backend = Attempts()
    sender = CallbackSender(SECRET, allow_private=False, pauses_s=NO_PAUSES, backend=backend)
    try:
        assert sender.send(callback(url), "job.succeeded", make_record(url)) is Outcome.REFUSED
    finally:
        sender.close(5)
    assert backend.made == []


def test_the_connection_goes_to_the_address_that_was_checked(names: dict[str, list[str]]) -> None:
    names["shop.example"] = ["93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c"]
    with Receiver() as receiver:
        backend = Attempts(forward_to=receiver.port, dead=frozenset({"93.184.215.14"}))
        sender = CallbackSender(SECRET, allow_private=False, pauses_s=NO_PAUSES, backend=backend)
        url = "http://shop.example:8080/hook"
        assert sender.send(callback(url), "job.succeeded", make_record(url)) is Outcome.DELIVERED
        sender.close(5)
    # Literal addresses reach the connector, so nothing is left to resolve; the second is tried when the first is dead.
    assert backend.made == [("93.184.215.14", 8080), ("2606:2800:21f:cb07:6820:80da:af6b:8b2c", 8080)]
    assert names["asked"] == ["shop.example"]
    assert receiver.requests[0][1]["host"] == "shop.example:8080"


def test_a_name_that_changes_between_tries_is_checked_again(names: dict[str, list[str]]) -> None:
    names["rebind.example"] = ["93.184.215.14"]

    class Rebinding(Attempts):
        async def connect_tcp(self, *args: Any, **kwargs: Any) -> httpcore.AsyncNetworkStream:
            names["rebind.example"] = ["127.0.0.1"]
            return await super().connect_tcp(*args, **kwargs)

    backend = Rebinding()
    sender = CallbackSender(SECRET, allow_private=False, pauses_s=NO_PAUSES, backend=backend)
    url = "http://rebind.example/"
    assert sender.send(callback(url), "job.succeeded", make_record(url)) is Outcome.REFUSED
    sender.close(5)
    assert backend.made == [("93.184.215.14", 80)]


def test_tls_asks_for_the_host_by_name(names: dict[str, list[str]]) -> None:
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

    sender = CallbackSender(SECRET, allow_private=False, pauses_s=(0.0,), backend=Opens())
    url = "https://shop.example/"
    assert sender.send(callback(url), "job.succeeded", make_record(url)) is Outcome.FAILED
    sender.close(5)
    assert asked == ["shop.example"]


def test_proxies_of_the_environment_are_not_used(sender: CallbackSender, monkeypatch: pytest.MonkeyPatch) -> None:
    with Receiver() as proxy, Receiver() as receiver:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        monkeypatch.setenv("ALL_PROXY", proxy.url)
        assert sender.send(callback(receiver.url), "job.succeeded", make_record(receiver.url)) is Outcome.DELIVERED
    assert proxy.requests == []


def test_a_name_that_does_not_resolve_fails(names: dict[str, list[str]], sender: CallbackSender) -> None:
    assert sender.send(callback("http://nowhere.example/"), "job.succeeded", make_record("http://nowhere.example/")) is Outcome.FAILED
    assert names["asked"] == ["nowhere.example"] * 3


def test_a_receiver_that_never_answers_is_given_up() -> None:
    gate = threading.Event()
    with Receiver(gate=gate) as receiver:
        sender = CallbackSender(SECRET, allow_private=True, pauses_s=(0.0,), timeout_s=0.2)
        assert sender.send(callback(receiver.url), "job.succeeded", make_record(receiver.url)) is Outcome.FAILED
        sender.close(5)
        gate.set()


def test_delivery_never_waits_and_the_queue_has_an_end(caplog: pytest.LogCaptureFixture) -> None:
    gate = threading.Event()
    with Receiver(gate=gate) as receiver:
        sender = CallbackSender(SECRET, allow_private=True, pauses_s=(0.0,), max_pending=3)
        record = make_record(receiver.url)
        with caplog.at_level(logging.INFO):
            for _ in range(5):
                sender.notify(record, "job.succeeded")  # the gate is shut: waiting here would hang the test
            gate.set()
            sender.close(10)
        assert caplog.text.count("dropped") == 2
        assert caplog.text.count("delivered") == 3
        assert sender.send(callback(receiver.url), "job.succeeded", record) is Outcome.DROPPED


def test_close_gives_up_what_hangs() -> None:
    gate = threading.Event()
    with Receiver(gate=gate) as receiver:
        sender = CallbackSender(SECRET, allow_private=True)
        sender.notify(make_record(receiver.url), "job.succeeded")
        sender.close(0.05)
        gate.set()
    assert not [thread for thread in threading.enumerate() if thread.name == "callbacks"]


def test_the_log_shows_neither_prompt_nor_url(sender: CallbackSender, caplog: pytest.LogCaptureFixture) -> None:
    with Receiver(500) as receiver, caplog.at_level(logging.INFO):
        sender.send(callback(receiver.url), "job.succeeded", make_record(receiver.url))
    assert "job.succeeded of job j1: failed (status 500)" in caplog.text
    assert PROMPT not in caplog.text
    assert "t0psecret" not in caplog.text


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.215.14", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_global_addresses(address: str) -> None:
    assert is_global(address)


def test_one_bad_receiver_does_not_hold_up_another(sender: CallbackSender) -> None:
    gate = threading.Event()
    with Receiver(gate=gate) as slow, Receiver() as quick:
        sender.notify(make_record(slow.url), "job.succeeded")
        assert sender.send(callback(quick.url), "job.succeeded", make_record(quick.url)) is Outcome.DELIVERED
        gate.set()


def test_usable_from_a_thread_with_its_own_loop(sender: CallbackSender) -> None:
    async def inside() -> Outcome:
        with Receiver() as receiver:
            return await asyncio.to_thread(sender.send, callback(receiver.url), "job.succeeded", make_record(receiver.url))

    assert asyncio.run(inside()) is Outcome.DELIVERED
