"""The server under the API: slow clients, and the socket that it inherits."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import uvicorn

from latentline import Settings
from latentline.api import body, server
from latentline.api.protocol import PatientProtocol

Serve = Callable[[], socket.socket]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Starts the real server on an inherited socket; returns a client's connection to it."""
    running: list[uvicorn.Server] = []
    keep = uvicorn.Server.__init__

    def kept(self: uvicorn.Server, config: uvicorn.Config) -> None:
        keep(self, config)
        running.append(self)

    monkeypatch.setattr(uvicorn.Server, "__init__", kept)
    listener = socket.create_server(("127.0.0.1", 0))
    threads: list[threading.Thread] = []
    clients: list[socket.socket] = []

    def start() -> socket.socket:
        if not threads:
            threads.append(threading.Thread(target=server.serve, args=(Settings(), "", 0, listener.dup().detach(), 1)))
            threads[0].start()
            while not (running and running[0].started) and threads[0].is_alive():
                time.sleep(0.01)
        clients.append(socket.create_connection(listener.getsockname(), timeout=30))
        return clients[-1]

    yield start
    for client in clients:
        client.close()
    running[0].should_exit = True
    threads[0].join(30)
    assert not threads[0].is_alive()
    listener.close()


def answer(client: socket.socket) -> bytes:
    """What comes until the server closes the connection."""
    found = b""
    while piece := client.recv(65536):
        found += piece
    return found


@pytest.mark.parametrize("sent", [b"", b"GET /healthz HT", b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Half: "])
def test_half_a_request_is_not_held_for_ever(serve: Serve, monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(PatientProtocol, "head_s", 0.2)
    client = serve()
    client.sendall(sent)
    assert answer(client) == b""


@pytest.mark.parametrize(
    "after",
    [
        pytest.param(b"\r\n", id="a line end"),
        pytest.param(b"GET /heal", id="half of a request"),
        pytest.param(b"x", id="a part of a body that nobody reads"),
    ],
)
def test_a_connection_without_a_request_is_not_held_for_ever(serve: Serve, monkeypatch: pytest.MonkeyPatch, after: bytes) -> None:
    monkeypatch.setattr(PatientProtocol, "head_s", 0.2)
    client = serve()
    length = 999 if after == b"x" else 0
    client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % length)
    assert client.recv(65536).startswith(b"HTTP/1.1 200")
    client.sendall(after)
    answer(client)  # until the server closes
    client.close()


def test_the_rest_of_a_body_counts_as_no_head(serve: Serve) -> None:
    client = serve()
    client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: keep-alive\r\nContent-Length: 200000\r\n\r\n")
    assert client.recv(65536).startswith(b"HTTP/1.1 200")
    client.sendall(b"x" * 200_000 + b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert answer(client).startswith(b"HTTP/1.1 200")


def test_a_head_without_an_end(serve: Serve) -> None:
    client = serve()
    client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n")
    found = b""
    with contextlib.suppress(ConnectionError):  # the server closes while this sends
        for i in range(500):
            client.sendall(b"X-%d: %s\r\n" % (i, b"y" * 1000))
            time.sleep(0.001)
    with contextlib.suppress(ConnectionError):
        found = answer(client)
    assert not found or (found.startswith(b"HTTP/1.1 431") and b"head_too_large" in found)


def test_what_is_no_http_is_answered_in_the_shape_of_errors(serve: Serve) -> None:
    client = serve()
    client.sendall(b"\x16\x03\x01\x02\x00 no HTTP\r\n\r\n")
    found = answer(client)
    assert found.startswith(b"HTTP/1.1 400") and b'{"error": {"code": "bad_request"' in found


def test_an_answer_that_is_not_read_is_not_held_for_ever(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PatientProtocol, "unread_s", 0.2)
    lost = threading.Event()
    made, gone = PatientProtocol.pause_writing, PatientProtocol.connection_lost
    paused = threading.Event()

    def pause(self: PatientProtocol) -> None:
        paused.set()
        made(self)

    def lose(self: PatientProtocol, exc: Exception | None) -> None:
        gone(self, exc)
        lost.set()

    monkeypatch.setattr(PatientProtocol, "pause_writing", pause)
    monkeypatch.setattr(PatientProtocol, "connection_lost", lose)
    client = serve()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    page = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
    client.sendall(page * 400)  # megabytes of answers
    assert lost.wait(60) and paused.is_set()


def test_a_body_that_does_not_come_is_answered(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "BODY_S", 0.2)
    client = serve()
    client.sendall(b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{")
    found = answer(client)
    assert found.startswith(b"HTTP/1.1 408") and b"request_timeout" in found


def test_connections_of_an_inherited_socket_send_at_once(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    delays: list[int] = []
    made = PatientProtocol.connection_made

    def look(self: PatientProtocol, transport: object) -> None:
        made(self, transport)  # type: ignore[arg-type]
        delays.append(transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))  # type: ignore[attr-defined]

    monkeypatch.setattr(PatientProtocol, "connection_made", look)
    client = serve()
    client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert answer(client).startswith(b"HTTP/1.1 200")
    assert [bool(one) for one in delays] == [True]
