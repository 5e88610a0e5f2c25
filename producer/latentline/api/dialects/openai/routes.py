"""The routes of OpenAI's images API."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from starlette.datastructures import State
from starlette.responses import JSONResponse, Response, StreamingResponse

from latentline.api.body import json_object
from latentline.api.dependencies import Reading, Submitting
from latentline.api.dialects.common import (
    ClientGone,
    body_of,
    dialect_application,
    model_of,
    offered,
    parsed,
    problem_answer,
    sending_of,
    submit,
    wait,
    written,
)
from latentline.api.problems import Problem, problem_of
from latentline.api.service import JobService
from latentline.errors import InvalidRequest, LatentlineError
from latentline.jobs import JobRecord, Sending
from latentline.settings import Settings

from .answers import completed_event, error_event, partial_event, render, result, unfinished
from .request import NAMES, GenerationRequest
from .schema import STREAM, ImagesAnswer, ModelAnswer, ModelList, errors

KEEP_ALIVE_S = 15.0  # between comments on a quiet stream, so that no reader and no proxy takes it for dead


def create(state: State, settings: Settings) -> FastAPI:
    """The application of this dialect."""
    router = APIRouter(tags=["images"])

    @router.post(
        "/images/generations",
        openapi_extra=body_of(GenerationRequest),
        response_model=None,
        responses={200: {"model": ImagesAnswer, "content": STREAM}, **errors(400, 404, 408, 409, 413, 415, 429, 504)},
    )
    async def generate(request: Request, jobs: Submitting) -> Response:
        """Draw pictures and answer with them when they are there; with ``stream``, as server-sent events."""
        data = await json_object(request)
        asked = parsed(GenerationRequest, data)
        model = await model_of(asked.model, jobs, settings)
        info = (await jobs.models()).get(model) if asked.stream and asked.partial_images else None
        sending = sending_of(request, jobs, data, _retry_count(request))
        record = await submit(jobs, asked.native(model, info), NAMES, settings, sending)
        if asked.stream:
            return StreamingResponse(
                _events(request, jobs, record, asked, sending),
                media_type="text/event-stream",
                headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no", "x-request-id": record.id},
            )
        try:
            record = await wait(request, jobs, record.id)
        except ClientGone:
            jobs.client_gone(record.id, sending)
            return Response(status_code=499)  # nobody reads it
        return await _answer(jobs, record, asked, sending)

    @router.get("/images/generations/{job_id}", response_model=None, responses={200: {"model": ImagesAnswer}, **errors(404, 409, 504)})
    async def read(request: Request, jobs: Reading, job_id: str) -> Response:
        """The pictures of a job whose id an earlier answer gave, or one that another dialect made, when they are there."""
        try:
            record = await wait(request, jobs, job_id)
        except ClientGone:
            return Response(status_code=499)  # nobody reads it
        return await _answer(jobs, record, None, None)

    _add_image_inputs(router)
    _add_models(router, settings)
    return dialect_application("latentline: OpenAI images", state, router, render, [GenerationRequest])


def _add_image_inputs(router: APIRouter) -> None:
    @router.post("/images/edits", status_code=501, response_model=None, responses=errors(501))
    @router.post("/images/variations", status_code=501, response_model=None, responses=errors(501))
    async def not_yet(request: Request, jobs: Submitting) -> Response:
        """Not there yet: a clear 501."""
        kind = request.url.path.rsplit("/", 1)[-1]
        message = f"images/{kind} is not there yet: latentline takes no pictures as input"
        return problem_answer(render, Problem(501, "not_implemented", message, {"x-should-retry": "false"}))


def _add_models(router: APIRouter, settings: Settings) -> None:
    @router.get("/models", tags=["models"], response_model=ModelList, responses=errors())
    async def list_models(jobs: Reading) -> dict[str, Any]:
        """Every name that ``model`` may have: the models that workers serve now, and the operator's aliases for them."""
        return {"object": "list", "data": [_model(name) for name in await offered(jobs, settings)]}

    @router.get("/models/{name:path}", tags=["models"], response_model=ModelAnswer, responses=errors(404))
    async def get_model(jobs: Reading, name: str) -> dict[str, Any]:
        names = await offered(jobs, settings)
        if name not in names:
            raise InvalidRequest("model", name, f"one of: {', '.join(names)}")
        return _model(name)


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "latentline"}


def _retry_count(request: Request) -> int:
    """How often the client has sent this request before, as the vendor's own clients say."""
    text = request.headers.get("x-stainless-retry-count", "")
    return int(text) if re.fullmatch(r"\d{1,4}", text) else 0


async def _answer(jobs: JobService, record: JobRecord, asked: GenerationRequest | None, sending: Sending | None) -> Response:
    problem = unfinished(record)
    if problem:
        answer = problem_answer(render, problem)
    else:
        answer = JSONResponse(await result(jobs, record, asked), headers={"x-request-id": record.id})
    answer.background = written(jobs, record.id, sending) if sending and record.status.terminal else None
    return answer


async def _events(request: Request, jobs: JobService, record: JobRecord, asked: GenerationRequest, sending: Sending) -> AsyncIterator[str]:
    """The events of a stream. Where it ends early, the client has gone."""
    told = False
    try:
        async for event in _partial_events(jobs, record, asked):
            yield event
        record = await jobs.get(record.id)
        if problem := unfinished(record):
            yield error_event(problem)
        for number in range(len(record.images)):
            yield await completed_event(jobs, record, number, asked)
        told = True
        await jobs.answer_written(record.id, sending)
    except LatentlineError as error:
        told = True
        yield error_event(problem_of(request, error))
    finally:
        if not told:
            jobs.client_gone(record.id, sending)


async def _partial_events(jobs: JobService, record: JobRecord, asked: GenerationRequest) -> AsyncIterator[str]:
    """Events up to the end of the job: as many partial images as were asked for, and comments while nothing happens."""
    sent = 0
    async with jobs.listen(record.id, None) as listener:
        while not listener.ended:
            events = await listener.next(KEEP_ALIVE_S)
            if not events:
                yield ": keep-alive\n\n"
            for event in events:
                pictures = event.data.get("images") if event.type == "job.preview" else None
                if pictures and sent < (asked.partial_images or 0):
                    for picture in pictures:
                        yield partial_event(record, sent, picture)
                    sent += 1
