"""API processes on a real broker, which a test starts and stops, and clients that move from one to another."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from latentline_worker.embedded.process import Child, clean_env, free_port

PATIENCE_S = 60.0
# Presigning needs keys and makes no request; no test here uploads or downloads.
STORE = {
    "LATENTLINE_S3_ENDPOINT_URL": "http://127.0.0.1:9",
    "LATENTLINE_S3_ACCESS_KEY_ID": "x",
    "LATENTLINE_S3_SECRET_ACCESS_KEY": "x",
}


class Apis:
    """API processes on loopback ports of their own, all with one broker."""

    def __init__(self, folder: Path, redis_url: str, **env: str) -> None:
        self._folder = folder
        self._env = clean_env(**{"LATENTLINE_REDIS_URL": redis_url, "LATENTLINE_AUTH": "none", **STORE, **env})
        self._running: dict[str, Child] = {}
        self._numbers = itertools.count()

    @property
    def urls(self) -> Sequence[str]:
        """Of those that run; the newest last."""
        return list(self._running)

    def start(self, port: int | None = None) -> str:
        """The URL of another process, once it answers."""
        port = port or free_port()
        url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "latentline.cli", "api", "--port", str(port)]
        child = Child("api", command, self._folder / f"api{next(self._numbers)}.log", self._env)

        def answers() -> bool:
            with contextlib.suppress(httpx.HTTPError):
                return httpx.get(f"{url}/healthz", trust_env=False).status_code == 200
            return False

        child.wait_until(answers, PATIENCE_S)
        self._running[url] = child
        return url

    def stop(self, url: str) -> None:
        """As a rolling restart does: SIGTERM, then wait for the end."""
        self._running.pop(url).stop(timeout_s=30)

    def restart(self, url: str) -> None:
        """Stop a process and start another one at its place."""
        self.stop(url)
        self.start(int(url.rpartition(":")[2]))

    def pid(self, url: str) -> int:
        return self._running[url].process.pid

    def close(self) -> None:
        for url in self.urls:
            self.stop(url)


async def blocks(lines: AsyncIterator[str]) -> AsyncIterator[tuple[str | None, str, dict[str, Any]]]:
    """``(id, event, data)`` of the server-sent events of an answer, each once it is complete."""
    fields: dict[str, str] = {}
    async for line in lines:
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
        elif "event" in fields:
            yield fields.get("id"), fields["event"], json.loads(fields["data"])
            fields = {}
        else:
            fields = {}


class Follower:
    """Follows jobs as an EventSource does: back after a break, on any process that runs, with the last id that it has seen."""

    def __init__(self, apis: Apis, http: httpx.AsyncClient, job_ids: Sequence[str], first: int = 0) -> None:
        self._apis, self._http, self._job_ids = apis, http, job_ids
        self._turn = itertools.count(first)
        self.told: list[tuple[str, int, str]] = []  # job, seq, type
        self.connections: list[str] = []  # the process of each connection
        self.ready = asyncio.Event()  # something was told

    async def run(self) -> None:
        """Until every job has ended."""
        last: str | None = None
        while True:
            url = self._apis.urls[next(self._turn) % len(self._apis.urls)]
            headers = {"Last-Event-ID": last} if last else {}
            with contextlib.suppress(httpx.TransportError):
                async with self._http.stream(
                    "GET", f"{url}/v1/events", params={"jobs": ",".join(self._job_ids)}, headers=headers
                ) as answer:
                    if answer.status_code == 204:
                        return
                    assert answer.status_code == 200, f"{answer.status_code} {await answer.aread()!r}"
                    self.connections.append(url)
                    async for event_id, kind, data in blocks(answer.aiter_lines()):
                        if kind == "end":
                            return
                        if event_id is None:  # a place in the queue
                            continue
                        last = event_id
                        self.told.append((data["job_id"], data["seq"], kind))
                        self.ready.set()
            await asyncio.sleep(0.05)
