"""Follow one job to its end by its events, with a progress line on stderr."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
from httpx_sse import ServerSentEvent, SSEError, aconnect_sse
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from latentline.terminal import clean, note

from .errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_UNAVAILABLE, fail
from .remote import TIMEOUT_S, Api, check_answer

TERMINAL = frozenset(("succeeded", "failed", "cancelled"))
QUIET_S = 45.0  # a stream says something at least every 15 s: one that is silent for so long is dead
AGAIN_S = 0.5  # between the end of a stream and the next try
UNREACHABLE_S = 60.0  # an API that is away for so long may be restarting; after that it counts as gone

Show = Callable[[str, dict[str, Any]], None]  # the type of an event, and its data


def follow(api: Api, job: dict[str, Any], timeout_s: float | None) -> dict[str, Any]:
    """The job once it has ended. Ctrl-C and a time-out end the command, and the job goes on."""
    job_id = job["id"]
    try:
        with _progress(job) as show:
            asyncio.run(asyncio.wait_for(_until_ended(api, job_id, show), timeout_s))
    except TimeoutError:
        fail(f"job {job_id} has not ended within {timeout_s:g} s; it goes on", EXIT_FAILED, "wait_timeout", job_id=job_id)
    except KeyboardInterrupt:
        fail(
            f"interrupted; job {job_id} goes on (latentline status {job_id}, latentline cancel {job_id})",
            EXIT_INTERRUPTED,
            job_id=job_id,
        )
    return api.job("GET", f"/v1/jobs/{job_id}")


async def _until_ended(api: Api, job_id: str, show: Show) -> None:
    """Return when the job has ended: its last event was seen, or a look at the job says so. A stream that breaks is resumed."""
    last: str | None = None
    answered = time.monotonic()
    async with httpx.AsyncClient(base_url=api.url, headers=api.headers, timeout=httpx.Timeout(TIMEOUT_S, read=QUIET_S)) as http:
        while True:
            try:
                async with aconnect_sse(
                    http, "GET", f"/v1/jobs/{job_id}/events", headers={"Last-Event-ID": last} if last else {}
                ) as source:
                    if source.response.is_client_error:  # a server's error may pass
                        await source.response.aread()
                        check_answer(api.url, source.response)
                    if source.response.status_code == 200:
                        async for event in source.aiter_sse():
                            last, answered = event.id or last, time.monotonic()
                            if _told(event, show):
                                return
                # Ended without the job's last event: it was seen before, or this process of the API stops.
                answer = await http.get(f"/v1/jobs/{job_id}")
                if answer.status_code == 200:
                    answered = time.monotonic()
                    if answer.json()["status"] in TERMINAL:
                        return
            except (SSEError, ValueError, KeyError, TypeError):
                fail(f"{api.url} is not a latentline API (its events have another form)", EXIT_UNAVAILABLE, job_id=job_id)
            except httpx.TransportError:
                pass
            if time.monotonic() - answered > UNREACHABLE_S:
                fail(f"{api.url} does not answer any more; job {job_id} goes on", EXIT_UNAVAILABLE, job_id=job_id)
            await asyncio.sleep(AGAIN_S)


def _told(event: ServerSentEvent, show: Show) -> bool:
    """Show an event; whether it is the job's last one."""
    kind = event.event.removeprefix("job.")
    data = json.loads(event.data) if event.data else {}
    show(kind, data if isinstance(data, dict) else {})
    return kind in TERMINAL


@contextlib.contextmanager
def _progress(job: dict[str, Any]) -> Iterator[Show]:
    """What follows the job on stderr: on a terminal a line that is drawn anew, elsewhere one line when it begins."""
    if not sys.stderr.isatty():
        note(f"{job['id']}  {job['status']}")
        yield lambda kind, data: None
        return
    columns = (  # 74 characters at most: one line on a terminal of 80
        TextColumn("{task.description}", markup=False),
        BarColumn(30),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        left = _left(job)
        bar = progress.add_task(f"{clean(job['status']):<10.10}", total=job["num_steps"], left=left)

        def show(kind: str, data: dict[str, Any]) -> None:
            nonlocal left
            step = data.get("step")
            phase = clean(data.get("phase") or data.get("status") or "")
            if kind in ("position", "progress"):
                left = _left(data)
            progress.update(
                bar,
                description=f"{phase:<10.10}" if phase else None,
                completed=step if isinstance(step, int) else None,
                left="" if kind == "running" else left,
            )

        yield show


def _left(data: dict[str, Any]) -> str:
    """What is before a job, or how long it still takes, where that is known: 14 characters at most."""
    place, eta_s = data.get("queue_position"), data.get("eta_s")
    if isinstance(eta_s, int | float):
        return f"{eta_s:.0f} s left"[:14]
    return f"{place} ahead"[:14] if isinstance(place, int) else ""
