"""The HTTP server under the API: uvicorn, with a limit on how long a client may take to send the head of a request."""

from __future__ import annotations

import asyncio
import socket
import sys
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from latentline.settings import Settings

from .app import create_app
from .auth import check_exposure

HEAD_S = 10.0  # from the connection, or the first byte of a later request, to the end of the request's headers


class TimedProtocol(HttpToolsProtocol):
    """uvicorn limits only how long a connection is idle between requests: one that sends half a request would be held for ever."""

    head_s = HEAD_S
    _head_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._head_due is None:  # of a later request; the limit on the first one began with the connection
            self._expect_head()

    def on_headers_complete(self) -> None:
        self._forget_head()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_head()
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        self._head_due = self.loop.call_later(self.head_s, self._too_slow)

    def _forget_head(self) -> None:
        if self._head_due is not None:
            self._head_due.cancel()
            self._head_due = None

    def _too_slow(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._expect_head()  # the answer to an earlier request is still on its way: the next one's limit begins anew
        else:
            self.transport.close()


def serve(settings: Settings, host: str, port: int, fd: int | None, shutdown_s: int) -> None:
    """Serve until the process is told to stop; exits with status 3 if the application does not start.

    Args:
        fd: a listening socket that was inherited, instead of ``host`` and ``port``.
        shutdown_s: seconds that open answers get at the end.

    Raises:
        ConfigurationError: it would serve without keys elsewhere than on loopback.
    """
    listener = None if fd is None else socket.socket(fileno=fd)
    check_exposure(settings, host, listener)
    options: dict[str, Any] = {"access_log": False, "timeout_graceful_shutdown": shutdown_s, "http": TimedProtocol, "ws": "none"}
    server = uvicorn.Server(uvicorn.Config(create_app(settings), host=host, port=port, **options))
    # uvicorn takes every inherited descriptor for a Unix socket, and asyncio then leaves TCP_NODELAY out, which costs 40 ms an
    # answer on a connection that is kept alive. Python finds the true family of a descriptor by itself.
    server.run(None if listener is None else [listener])
    if not server.started:
        sys.exit(3)
