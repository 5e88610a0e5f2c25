"""Where other threads hand in requests, and which of them are unfinished."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from .failures import raise_if_lost
from .request import Cancelled, Request


class Intake:
    """Requests between the threads that submit them and the engine's thread, which finishes them.

    Every request that was accepted is kept here until the engine says that it is finished, so that none is forgotten when
    the engine fails.
    """

    def __init__(self) -> None:
        self._incoming: list[Request] = []
        self._unfinished: set[Request] = set()  # written by the engine's thread
        self._calls: list[tuple[Callable[[], Any], Future[Any]]] = []
        self._wake = threading.Condition()  # guards what follows and ``_incoming``
        self._closed: str | None = None  # why no request is accepted any more
        self.progress_at = time.monotonic()  # when the engine last finished anything, or work came after a time without

    @property
    def idle(self) -> bool:
        """Every request has been finished."""
        return not (self._unfinished or self._incoming)

    @property
    def pending(self) -> bool:
        """Requests or calls have come that the engine's thread has not taken."""
        return bool(self._incoming or self._calls)

    @property
    def lost(self) -> bool:
        """The engine has failed."""
        return self._closed == "lost"

    def submit(self, request: Request) -> Request:
        """Hand in a request, or end it if none is accepted any more."""
        with self._wake:
            if self._closed:
                request.future.set_exception(Cancelled(self._closed))
                return request
            if self.idle:
                self.progress_at = time.monotonic()  # before the request counts: waiting for work is no stall
            self._incoming.append(request)
            self._wake.notify()
        return request

    def call(self, action: Callable[[], Any]) -> Future[Any]:
        """Let the engine's thread do something between two steps. The future is cancelled if no step comes any more."""
        future: Future[Any] = Future()
        with self._wake:
            if self._closed:
                future.cancel()
            else:
                self._calls.append((action, future))
                self._wake.notify()
        return future

    def do_calls(self) -> None:
        """Do what the engine's thread was asked to do.

        Raises:
            torch.AcceleratorError: the device is lost.
        """
        for action, future in self._take_calls():
            try:
                future.set_result(action())
            except Exception as error:
                raise_if_lost(error)
                future.set_exception(error)

    def _take_calls(self) -> list[tuple[Callable[[], Any], Future[Any]]]:
        with self._wake:
            calls, self._calls = self._calls, []
        return calls

    def close(self, reason: str) -> None:
        """Accept no more requests; the engine's thread stops waiting. An engine that has failed stays so."""
        with self._wake:
            self._closed = "lost" if self.lost else reason
            self._wake.notify()
        for _, future in self._take_calls():
            future.cancel()

    def wait(self) -> bool:
        """Wait for an unfinished request or a call; False once closed."""
        with self._wake:
            self._wake.wait_for(lambda: not self.idle or self._calls or self._closed)
            return self._closed is None

    def take(self) -> list[Request]:
        """The requests that have come; from now on the engine's thread answers for them."""
        with self._wake:
            incoming, self._incoming = self._incoming, []
            self._unfinished.update(incoming)
        return incoming

    def has_of(self, model: str) -> bool:
        """Whether a request of a model is unfinished."""
        return any(request.work.model == model for request in [*self._unfinished, *self._incoming])

    def finished(self, request: Request) -> None:
        self._unfinished.discard(request)

    def fail(self) -> None:
        """The engine has failed: end every unfinished request as lost, and accept no more."""
        self.close("lost")
        for request in [*self._unfinished, *self._incoming]:
            request.future.set_exception(Cancelled("lost"))
