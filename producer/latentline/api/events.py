"""Server-sent events: what happens to one job, or to many on one stream, as it happens."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from latentline.errors import BrokerUnavailable, InvalidRequest, LatentlineError
from latentline.jobs import JobEvent
from latentline.listener import POSITION, Listener

from .answers import ImageAnswer, errors
from .cursors import MAX_JOBS, Cursor, GroupCursor
from .dependencies import Listening, Reading
from .methods import IS_HEAD
from .service import JobService
from .tokens import make_token

KEEP_ALIVE_S = 15.0  # between keep-alive comments on a quiet stream
RETRY_MS = 1000  # after which an EventSource comes back when its connection breaks
AWAY_MS = 3000  # the same while the broker is away
NOT_KEPT = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
EVENT_STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}},
    204: {"description": "Every event of every job was told before"},
}


class StreamRoute(APIRoute):
    """A route whose answer lets an EventSource come back while the broker is away.

    An EventSource takes any other status than 200 for the end (WHATWG HTML, 9.2.3), so it gets a stream that ends at once and says when
    to come back. It asks for ``text/event-stream``; other clients get the error, 503.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                return await handler(request)
            except BrokerUnavailable:
                if "text/event-stream" not in request.headers.get("accept", ""):
                    raise
                return Response(f"retry: {AWAY_MS}\n\n", media_type="text/event-stream", headers=NOT_KEPT)

        return handle


router = APIRouter(prefix="/v1", tags=["events"], route_class=StreamRoute)


class TokenAnswer(BaseModel):
    token: str
    expires_at: datetime | None


@router.get("/jobs/{job_id}/events", response_class=StreamingResponse, responses=EVENT_STREAM | errors(404, 429))
async def job_events(
    request: Request,
    jobs: Listening,
    job_id: str,
    last_event_id: Annotated[str | None, Header()] = None,
    last: Annotated[str | None, Query(alias="last_event_id")] = None,
) -> StreamingResponse:
    """The job's events as server-sent events, up to its last one, then ``end``. ``Last-Event-ID`` resumes after an event.

    Only the newest preview is kept, so the ``images`` of a ``job.preview`` event may be empty. ``token`` stands for an API key.
    """
    async with AsyncExitStack() as opened:
        # Opened before the answer starts, so that an error can still be answered with its own status.
        listener = await opened.enter_async_context(jobs.listen(job_id, last_event_id or last))
        return _stream(request, jobs, listener, opened, lambda event: event.id)


@router.get("/events", response_class=StreamingResponse, responses=EVENT_STREAM | errors(404, 429))
async def events(
    request: Request,
    jobs: Listening,
    ids: Annotated[str | None, Query(alias="jobs", max_length=40 * MAX_JOBS)] = None,
    tenant: Annotated[str | None, Query(max_length=100)] = None,
    last_event_id: Annotated[str | None, Header()] = None,
    last: Annotated[str | None, Query(alias="last_event_id")] = None,
) -> StreamingResponse:
    """The events of many jobs on one stream.

    With ``jobs=ID,ID``: up to the last event of each, then ``end``. A job that is not there gives ``job.gone``.

    With ``metadata.NAME=VALUE``: of all jobs of the key's tenant whose metadata has that text, also of those that are submitted while
    the stream is open, so it has no end. It begins with those among the tenant's newest 2,000 jobs. ``tenant`` is for administrators.

    ``Last-Event-ID`` or ``last_event_id`` resumes after an event, on any process of the API, also with further jobs. ``token`` stands
    for an API key.
    """
    given = [(name.removeprefix("metadata."), value) for name, value in request.query_params.multi_items() if name.startswith("metadata.")]
    if len(given) + (ids is not None) != 1:
        names = ", ".join(sorted(request.query_params.keys()))
        raise InvalidRequest("jobs", names, "one of jobs=ID,ID and metadata.NAME=VALUE, once")
    async with AsyncExitStack() as opened:
        if ids is None:
            ((name, value),) = given
            cursor = GroupCursor.parse(last_event_id or last)
            group = await opened.enter_async_context(jobs.listen_to_group(name, value, cursor, tenant))
            return _stream(request, jobs, group.listener, opened, group.told, endless=True)
        wanted = list(dict.fromkeys(filter(None, ids.split(","))))
        if not 1 <= len(wanted) <= MAX_JOBS:
            raise InvalidRequest("jobs", ids, f"1 to {MAX_JOBS} ids, separated by commas")
        position = Cursor.parse(last_event_id or last)
        after = {job_id: position.after(job_id) for job_id in wanted if not position.gone(job_id)}
        listener = await opened.enter_async_context(jobs.listen_to(after))
        return _stream(request, jobs, listener, opened, position.told)


@router.post("/events/token", response_model=TokenAnswer, responses=errors())
async def token(jobs: Reading) -> JSONResponse:
    """A token with which a stream of the key's tenant is opened in the next ten minutes: ``?token=`` in its URL.

    An EventSource sends no headers, and the key itself must not stand in a URL. Without keys the token is empty, and is not asked for.
    """
    key = jobs.principal.key
    text, expires_at = make_token(key) if key else ("", None)
    ends = datetime.fromtimestamp(expires_at, UTC) if expires_at else None
    answer = TokenAnswer(token=text, expires_at=ends)
    return JSONResponse(answer.model_dump(mode="json"), headers={"Cache-Control": "no-store"})


def _stream(
    request: Request, jobs: JobService, listener: Listener, opened: AsyncExitStack, name: Callable[[JobEvent], str], endless: bool = False
) -> StreamingResponse:
    if listener.ended and not endless:
        # The client has seen every event. 204 tells an EventSource that did not close at `end` not to reconnect.
        return StreamingResponse(iter(()), 204)
    if request.scope.get(IS_HEAD):
        return StreamingResponse(iter(()), media_type="text/event-stream", headers=NOT_KEPT)
    return EventStream(_written(jobs, listener, name, endless), opened.pop_all(), NOT_KEPT)


class EventStream(StreamingResponse):
    """Server-sent events. It closes what was opened for them when it ends, also when the client closes its connection."""

    def __init__(self, text: AsyncIterator[str], opened: AsyncExitStack, headers: dict[str, str]) -> None:
        super().__init__(text, media_type="text/event-stream", headers=headers)
        self._opened = opened

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._opened:
            await super().__call__(scope, receive, send)


async def _written(jobs: JobService, listener: Listener, name: Callable[[JobEvent], str], endless: bool) -> AsyncIterator[str]:
    yield f"retry: {RETRY_MS}\n\n"
    try:
        while endless or not listener.ended:
            events = await listener.next(KEEP_ALIVE_S)
            if not events:
                yield ": keep-alive\n\n"
            if events:
                yield "".join(_block(event, name, jobs) for event in events)
        yield 'event: end\ndata: {"type": "end"}\n\n'
    except LatentlineError:
        return  # the client reconnects with Last-Event-ID, and that request is answered with the error


def _block(event: JobEvent, name: Callable[[JobEvent], str], jobs: JobService) -> str:
    data = _data(event)
    if event.type in (POSITION, "job.progress"):
        data["eta_s"] = jobs.eta_of_event(event)
    named = f"id: {name(event)}\n" if event.type != POSITION else ""  # a place is no step of a stream from which one resumes
    return f"{named}event: {event.type}\ndata: {json.dumps(data)}\n\n"


def _data(event: JobEvent) -> dict[str, Any]:
    data = {"type": event.type, "job_id": event.job_id, "at": event.at, **event.data}
    if event.type == "job.succeeded":
        images = event.data.get("images", ())
        data["images"] = [ImageAnswer.model_validate(image, extra="ignore").model_dump(mode="json") for image in images]
    return data
