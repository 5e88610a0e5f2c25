"""The server under the API: slow clients, and the socket that it inherits."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import uvicorn

from latentline import Settings
from latentline.api import body, server

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
    monkeypatch.setattr(server.TimedProtocol, "head_s", 0.2)
    client = serve()
    client.sendall(sent)
    assert answer(client) == b""


def test_half_of_a_later_request_is_not_held_for_ever_either(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.TimedProtocol, "head_s", 0.2)
    client = serve()
    client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\nGET /heal")
    assert answer(client).startswith(b"HTTP/1.1 200")


def test_a_body_that_does_not_come_is_answered(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "BODY_S", 0.2)
    client = serve()
    client.sendall(b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{")
    found = answer(client)
    assert found.startswith(b"HTTP/1.1 408") and b"request_timeout" in found


def test_connections_of_an_inherited_socket_send_at_once(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    delays: list[int] = []
    made = server.TimedProtocol.connection_made

    def look(self: server.TimedProtocol, transport: object) -> None:
        made(self, transport)  # type: ignore[arg-type]
        delays.append(transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))  # type: ignore[attr-defined]

    monkeypatch.setattr(server.TimedProtocol, "connection_made", look)
    client = serve()
    client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert answer(client).startswith(b"HTTP/1.1 200")
    assert [bool(one) for one in delays] == [True]
