"""A callback receiver on loopback whose status, delay and headers a test sets."""

from __future__ import annotations

import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Receiver:
    """Answers every POST with ``status`` after ``delay_s``; counts what arrived, by message id."""

    def __init__(self) -> None:
        self.status = 204
        self.delay_s = 0.0
        self.headers: dict[str, str] = {}
        self.bodies: list[dict[str, Any]] = []
        self.requests: list[tuple[dict[str, str], bytes]] = []  # headers by their names in small letters, and the body as it came
        self.answered: Counter[str] = Counter()  # webhook-id -> times answered with 2xx
        self.seen: Counter[str] = Counter()  # webhook-id -> times received
        self.arrived = threading.Semaphore(0)  # released once for each request
        self._closing = threading.Event()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver.seen[self.headers["webhook-id"]] += 1
                receiver.bodies.append(json.loads(body))
                receiver.requests.append(({name.lower(): value for name, value in self.headers.items()}, body))
                receiver.arrived.release()
                receiver._closing.wait(receiver.delay_s)
                if 200 <= receiver.status < 300:
                    receiver.answered[self.headers["webhook-id"]] += 1
                try:
                    self.send_response(receiver.status)
                    for name, value in receiver.headers.items():
                        self.send_header(name, value)
                    self.send_header("content-length", "0")
                    self.end_headers()
                except OSError:
                    pass  # the sender has given up

            def log_message(self, *_: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/hook"

    def close(self) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
