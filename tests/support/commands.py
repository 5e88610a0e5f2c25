"""The ``latentline`` command against a real API on a loopback port, over fakeredis and the fake worker."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import click.testing
import fakeredis
import pytest
import uvicorn
from fastapi import Request, Response

from latentline import AsyncClient, records
from latentline.api.app import create_app
from latentline.cli import main
from latentline.jobs import JobRequest, resolve
from latentline.testing import FakeImages, FakeWorker


class HttpImages(FakeImages):
    """A store whose URLs can be fetched: the test's server serves them."""

    base = ""
    damaged = False

    def presign(self, key: str) -> str:
        return f"{self.base}/store/{key}"


class Service:
    """An API, its store and a worker that takes jobs while ``working``."""

    def __init__(self, url: str, images: HttpImages, worker: FakeWorker) -> None:
        self.url, self.images, self.worker = url, images, worker
        self.asked: list[tuple[str, str]] = []  # method and path of each request
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._work)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._end.set()
        if self._thread.ident is not None:
            self._thread.join(30)

    def _work(self) -> None:
        while not self._end.wait(0.01):
            self.worker.run_all()

    def submit(self, **fields: Any) -> str:
        request = JobRequest.parse({"prompt": "a cat", "num_inference_steps": 2, **fields})
        return records.run(self.worker.redis, records.submit([resolve(request)], 600))[0].id


@contextlib.contextmanager
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    """A service at LATENTLINE_URL."""
    redis, images = fakeredis.FakeServer(), HttpImages()
    monkeypatch.setattr("latentline.operations.Images", lambda settings: images)
    monkeypatch.setattr("latentline.async_client.connect_async", lambda url: fakeredis.FakeAsyncRedis(server=redis, decode_responses=True))
    worker = FakeWorker(fakeredis.FakeRedis(server=redis, decode_responses=True), images)
    worker.announce()
    app = create_app(client=AsyncClient())
    service = Service("", images, worker)

    @app.middleware("http")
    async def note_request(request: Request, answer: Any) -> Any:
        service.asked.append((request.method, request.url.path))
        return await answer(request)

    @app.get("/store/{key:path}")
    async def store(key: str) -> Response:
        data = images.objects.get(key)
        return Response(status_code=404) if data is None else Response(data + b"!" * images.damaged, media_type="image/png")

    @app.api_route("/other/v1/{path:path}", methods=["GET", "POST"])
    async def other_json(path: str) -> Any:
        return {"status": "ok"}

    @app.get("/wrong/v1/jobs/x")
    async def other_error() -> Response:
        return Response('{"error": "text"}', status_code=418, media_type="application/json")

    @app.get("/html/v1/models")
    async def something_else() -> Response:
        return Response("<html>", media_type="text/html")

    listener = socket.create_server(("127.0.0.1", 0))
    images.base = f"http://127.0.0.1:{listener.getsockname()[1]}"
    service.url = images.base
    monkeypatch.setenv("LATENTLINE_URL", images.base)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    yield service
    service.stop()
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive()
    listener.close()


def call(*args: str, code: int = 0) -> click.testing.Result:
    """Run the command; its exit status has to be ``code``, and never is there a traceback."""
    result = click.testing.CliRunner().invoke(main, list(args))
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == code, result.output
    return result


def refused(*args: str, code: int = 2) -> str:
    """The one line on stderr of a command that fails."""
    result = call(*args, code=code)
    (line,) = result.stderr.splitlines()
    assert line.startswith("latentline: ")
    return line
