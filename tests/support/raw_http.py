"""One request as bytes, and its answer: what no well-behaved client sends."""

from __future__ import annotations

import http.client
import io
import json
import socket
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)["error"]
        return found


class _Replay:
    """What :class:`http.client.HTTPResponse` reads from instead of a socket."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, _: str) -> io.BytesIO:
        return io.BytesIO(self._data)


def exchange(address: tuple[str, int], sent: bytes, method: str = "GET") -> Answer | None:
    """Send bytes, read until the server closes; the first answer, None where the server just closes."""
    found = b""
    with socket.create_connection(address, timeout=60) as client:
        try:
            client.sendall(sent)
            while piece := client.recv(65536):
                found += piece
        except ConnectionError:  # it closes while this still sends
            pass
    if not found:
        return None
    response = http.client.HTTPResponse(_Replay(found), method=method)  # type: ignore[arg-type]
    response.begin()
    return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())


def request(method: str, target: str | bytes, headers: list[tuple[str, str | bytes]] | None = None, body: bytes = b"") -> bytes:
    """A request of HTTP/1.1 after which the server closes. Text is sent as UTF-8; nothing is checked or quoted."""

    def raw(text: str | bytes) -> bytes:
        return text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text

    given = {name.lower() for name, _ in headers or []}
    lines = [raw(method) + b" " + raw(target) + b" HTTP/1.1", b"Connection: close"]
    if "host" not in given:
        lines.append(b"Host: localhost")
    if body and not given & {"content-length", "transfer-encoding"}:
        lines.append(b"Content-Length: %d" % len(body))
    lines += [raw(name) + b": " + raw(value) for name, value in headers or []]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body
