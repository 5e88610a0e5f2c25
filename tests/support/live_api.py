"""The HTTP API on a loopback port: a real server over fakeredis and the fake worker."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import fakeredis
import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from latentline import AsyncClient, Settings, records
from latentline.api.app import create_app
from latentline.api.metrics import ApiMetrics
from latentline.api.protocol import PatientProtocol
from latentline.keys import NewKey
from latentline.testing import FakeImages, FakeWorker
from latentline.tracing.export import Traces

Told = list[tuple[str | None, str, dict[str, Any]]]  # id, type and data of server-sent events


@dataclass
class Live:
    """A running API and what stands behind it."""

    http: httpx.Client
    client: AsyncClient
    redis: fakeredis.FakeServer
    images: FakeImages
    worker: FakeWorker
    app: FastAPI
    server: uvicorn.Server

    def submit(self, **fields: Any) -> dict[str, Any]:
        answer = self.http.post("/v1/jobs", json={"prompt": "a cat", "num_inference_steps": 2, **fields})
        assert answer.status_code == 202, answer.text
        job: dict[str, Any] = answer.json()
        return job


def new_key(live: Live, *scopes: str, tenant: str = "ann", **limits: int) -> str:
    """A new API key; without scopes it may submit and read."""
    new = NewKey.parse(tenant=tenant, scopes=scopes or ("submit", "read"), limits=limits)
    text, _ = records.run(live.worker.redis, records.create_key(new))
    return text


@contextlib.contextmanager
def live_api(
    monkeypatch: pytest.MonkeyPatch,
    settings: Settings | None = None,
    metrics: ApiMetrics | None = None,
    traces: Traces | None = None,
) -> Iterator[Live]:
    redis, images = fakeredis.FakeServer(), FakeImages()
    monkeypatch.setattr("latentline.operations.Images", lambda settings: images)
    monkeypatch.setattr("latentline.async_client.connect_async", lambda url: fakeredis.FakeAsyncRedis(server=redis, decode_responses=True))
    worker = FakeWorker(fakeredis.FakeRedis(server=redis, decode_responses=True), images)
    worker.announce()
    client = AsyncClient(settings)
    app = create_app(client=client, metrics=metrics, traces=traces)
    with serving(app) as (http, server):
        yield Live(http, client, redis, images, worker, app, server)
        redis.connected = True  # whatever a test did to it


@contextlib.contextmanager
def serving(app: FastAPI) -> Iterator[tuple[httpx.Client, uvicorn.Server]]:
    """An application that is served on a loopback port: a client for it, and its server."""
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, ws="none", http=PatientProtocol))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    assert thread.is_alive()
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=30, trust_env=False) as http:
            yield http, server
    finally:
        _end(server, thread, listener)


def _end(server: uvicorn.Server, thread: threading.Thread, listener: socket.socket) -> None:
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive()
    listener.close()


def problem(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The error of an answer, in the one shape that all errors have."""
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/json"), answer.text
    assert set(answer.json()) == {"error"}
    error: dict[str, Any] = answer.json()["error"]
    assert error["code"] == code and error["message"]
    assert set(error) - {"field", "allowed"} == {"code", "message"}
    return error


def sse(text: str) -> Told:
    """``(id, event, data)`` of each server-sent event."""
    found: Told = []
    for block in text.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if "event" in fields:
            found.append((fields.get("id"), fields["event"], json.loads(fields["data"])))
    return found
