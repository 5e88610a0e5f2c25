"""A TCP proxy on loopback that breaks connections in the ways networks do."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
from collections.abc import Callable
from typing import Literal

# Is told of each chunk and whether it goes towards the target; gives what to pass on, and whether to end the connection then.
Filter = Callable[[bool, bytes], tuple[bytes, bool]]
Mode = Literal["pass", "refuse", "hang", "http403", "http500", "http507"]


class Proxy:
    """Forwards to ``target`` unless ``mode`` says otherwise. Modes apply to new connections, the methods to open ones as well.

    Modes: ``refuse``: nothing listens. ``hang``: connections open and no answer comes. ``http403``, ``http500``, ``http507``:
    every request gets this status.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.mode: Mode = "pass"
        self.delay_s = 0.0  # before each chunk towards the target
        self.filter: Filter = lambda onward, data: (data, False)
        self._listener = self._listen(0)
        self.port: int = self._listener.getsockname()[1]
        self._open: list[tuple[socket.socket, socket.socket | None]] = []
        self._frozen = threading.Event()
        self._closed = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def refuse(self) -> None:
        """Close the listener and all connections, like a service that has ended."""
        self.mode = "refuse"
        self._unlisten()
        self.reset()

    def accept(self) -> None:
        """Accept and forward connections again, on the same port."""
        self._frozen.clear()
        if self.mode == "refuse":
            self._listener = self._listen(self.port)
            threading.Thread(target=self._accept, daemon=True).start()
        self.mode = "pass"

    def reset(self) -> None:
        """End every open connection with RST."""
        for pair in list(self._open):  # the threads that serve them take them out meanwhile
            for end in pair:
                if end is not None:
                    with contextlib.suppress(OSError):
                        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        end.shutdown(socket.SHUT_RDWR)
                    end.close()
        self._open.clear()

    def half_open(self) -> None:
        """Keep the open connections open but pass no data on them; new connections work."""
        self._frozen.set()
        self._frozen = threading.Event()

    def close(self) -> None:
        self._closed.set()
        self._unlisten()
        self.reset()

    def _unlisten(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts, which holds the port otherwise
        self._listener.close()

    @staticmethod
    def _listen(port: int) -> socket.socket:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(128)
        return listener

    def _accept(self) -> None:
        listener = self._listener
        while not self._closed.is_set():
            try:
                near, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(near, self.mode, self._frozen), daemon=True).start()

    def _serve(self, near: socket.socket, mode: Mode, frozen: threading.Event) -> None:
        if mode == "hang":
            self._open.append((near, None))
            return
        if mode.startswith("http"):
            self._answer(near, mode)
            return
        try:
            far = socket.create_connection(("127.0.0.1", self.target), 5)
        except OSError:
            near.close()
            return
        pair = (near, far)
        self._open.append(pair)
        try:
            while not frozen.is_set():
                ready, _, _ = select.select(pair, [], [], 0.2)
                if frozen.is_set():
                    self._closed.wait()  # keep both ends open, silent
                for end in ready:
                    data = end.recv(65536)
                    if not data:
                        return
                    if end is near and self.delay_s:
                        self._closed.wait(self.delay_s)
                    data, cut = self.filter(end is near, data)
                    (far if end is near else near).sendall(data)
                    if cut:
                        for side in pair:
                            side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        return
        except (OSError, ValueError):
            return
        finally:
            near.close()
            far.close()
            with contextlib.suppress(ValueError):
                self._open.remove(pair)

    @staticmethod
    def _answer(near: socket.socket, mode: Mode) -> None:
        """Read one whole request and answer it with the mode's status."""
        status = {"http403": "403 Forbidden", "http500": "500 Internal Server Error", "http507": "507 Insufficient Storage"}[mode]
        with contextlib.suppress(OSError), near:
            near.settimeout(5)
            data = b""
            while b"\r\n\r\n" not in data:
                more = near.recv(65536)
                if not more:
                    return
                data += more
            if b"100-continue" in data.lower():
                near.sendall(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
                return
            head, _, body = data.partition(b"\r\n\r\n")
            length = next((int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")), 0)
            while len(body) < length:
                more = near.recv(65536)
                if not more:
                    break
                body += more
            near.sendall(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
