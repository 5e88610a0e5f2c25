"""How long a client may take and how much it may send before a request is understood, and how long it may leave an answer unread."""

from __future__ import annotations

import asyncio
import json

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

HEAD_S = 10.0  # from the connection, or the first byte of a later request, to the end of the request's headers
MAX_HEAD_BYTES = 64 * 1024  # of a request line and headers that come in pieces; one piece is bounded by the socket's reads
UNREAD_S = 30.0  # for which a client may read nothing of an answer that fills its socket


class PatientProtocol(HttpToolsProtocol):
    """uvicorn's protocol with an end to patience. By itself it would hold for ever a connection

    - that sends half of a head, a head without an end, or only line ends;
    - whose request is answered before its body has come, and whose body then never comes;
    - that does not read its answer.
    """

    head_s = HEAD_S
    unread_s = UNREAD_S
    _head_due: asyncio.TimerHandle | None = None
    _read_due: asyncio.TimerHandle | None = None
    _head_bytes = 0
    _body_due = False  # the current request's body has not come in whole

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_head()
        self._forget_reader()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)  # which forgets the limit on idle connections
        if self._head_due is None and (self.cycle is None or self.cycle.response_complete):
            self._expect_head()  # of a later request; or this is what is left of a body whose request was answered
        elif self._head_due is not None and not self._body_due:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self._refuse(431, "head_too_large", f"the head of a request is larger than {MAX_HEAD_BYTES} bytes")

    def on_headers_complete(self) -> None:
        self._forget_head()
        self._body_due = True
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._body_due = False
        super().on_message_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._forget_reader()
        self._read_due = self.loop.call_later(self.unread_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._forget_reader()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "bad_request", "this is not HTTP/1.1")

    def _refuse(self, status: int, code: str, message: str) -> None:
        """Answer what has reached no application, in the shape that all errors have, and close."""
        body = json.dumps({"error": {"code": code, "message": message}}).encode()
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()

    def _expect_head(self) -> None:
        self._head_bytes = 0
        self._head_due = self.loop.call_later(self.head_s, self._too_slow)

    def _forget_head(self) -> None:
        if self._head_due is not None:
            self._head_due.cancel()
            self._head_due = None

    def _forget_reader(self) -> None:
        if self._read_due is not None:
            self._read_due.cancel()
            self._read_due = None

    def _too_slow(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._expect_head()  # the answer to an earlier request is still on its way: the next one's limit begins anew
        else:
            self.transport.close()
