"""Server-sent events: what happens to jobs, as it happens."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Annotated

from fastapi import APIRouter, Header, Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from latentline.errors import LatentlineError
from latentline.event_reader import Listener

from .answers import errors
from .methods import IS_HEAD
from .service import Reading

KEEP_ALIVE_S = 15.0  # between keep-alive comments on a quiet stream

router = APIRouter(prefix="/v1", tags=["events"])


@router.get(
    "/jobs/{job_id}/events",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}, **errors(404)},
)
async def job_events(
    request: Request, jobs: Reading, job_id: str, last_event_id: Annotated[str | None, Header()] = None
) -> StreamingResponse:
    """The job's events as server-sent events, up to its last one. ``Last-Event-ID`` resumes after an event.

    Only the newest preview is kept, so the ``images`` of a ``job.preview`` event may be empty.
    """
    async with AsyncExitStack() as opened:
        # Opened before the answer starts, so that an error can still be answered with its own status.
        listener = await opened.enter_async_context(jobs.listen(job_id, last_event_id))
        if listener.ended:
            # The client has seen every event. 204 tells an EventSource not to reconnect.
            return StreamingResponse(iter(()), 204)
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        if request.scope.get(IS_HEAD):
            return StreamingResponse(iter(()), media_type="text/event-stream", headers=headers)
        return EventStream(listener, opened.pop_all(), headers)


class EventStream(StreamingResponse):
    """A job's events as server-sent events. It closes the listener when it ends, also when the client closes its connection."""

    def __init__(self, listener: Listener, opened: AsyncExitStack, headers: dict[str, str]) -> None:
        super().__init__(_written(listener), media_type="text/event-stream", headers=headers)
        self._opened = opened

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._opened:
            await super().__call__(scope, receive, send)


async def _written(listener: Listener) -> AsyncIterator[str]:
    try:
        while not listener.ended:
            events = await listener.next(KEEP_ALIVE_S)
            if not events and not listener.ended:
                yield ": keep-alive\n\n"
            for event in events:
                data = {"type": event.type, "job_id": event.job_id, "at": event.at, **event.data}
                yield f"id: {event.id}\nevent: {event.type}\ndata: {json.dumps(data)}\n\n"
    except LatentlineError:
        return  # the client reconnects with Last-Event-ID, and that request is answered with the error
