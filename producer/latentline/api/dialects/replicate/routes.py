"""The routes of Replicate's API."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Query, Request
from starlette.datastructures import State
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response, StreamingResponse

from latentline.api.body import json_object
from latentline.api.dependencies import Reading, Submitting
from latentline.api.dialects.common import ClientGone, body_of, dialect_application, parsed, problem_answer, submit, wait
from latentline.api.problems import Problem
from latentline.api.service import JobService
from latentline.errors import InvalidRequest, LatentlineError
from latentline.jobs import JobRecord
from latentline.predictions import head, prediction, progress_line
from latentline.settings import Settings

from .answers import base_of, last_events, model_answer, output_of, page, render, sse, version_answer
from .names import find, known_names
from .request import NAMES, PredictionRequest
from .schema import STREAM, ModelAnswer, ModelPage, Prediction, PredictionPage, Secret, VersionAnswer, VersionPage, errors

KEEP_ALIVE_S = 15.0  # between comments on a quiet stream: clients give up one that is silent for 30 s
MAX_WAIT_S = 60  # of Prefer: wait
PAGE_SIZE = 100


def create(state: State, settings: Settings) -> FastAPI:
    """The application of this dialect."""
    router = APIRouter(tags=["predictions"])
    body, made = body_of(PredictionRequest), {201: {"model": Prediction}, **errors(404, 408, 413, 415, 429)}

    @router.post("/predictions", status_code=201, openapi_extra=body, response_model=None, responses=made)
    async def create_prediction(request: Request, jobs: Submitting) -> Response:
        """Make a prediction with a version of a model; with ``Prefer: wait``, answer when it has ended."""
        asked = parsed(PredictionRequest, await json_object(request))
        if asked.version is None:
            raise InvalidRequest("version", None, "a value (the field is required)")
        return await _made(request, jobs, settings, asked, asked.version)

    @router.post("/models/{owner}/{name}/predictions", status_code=201, openapi_extra=body, response_model=None, responses=made)
    async def create_with_model(request: Request, jobs: Submitting, owner: str, name: str) -> Response:
        """Make a prediction with a model."""
        asked = parsed(PredictionRequest, await json_object(request))
        try:
            return await _made(request, jobs, settings, asked, f"{owner}/{name}")
        except InvalidRequest as error:
            if error.field == "version":
                raise HTTPException(404, error.message) from None
            raise

    _add_predictions(router)
    _add_models(router, settings)
    _add_rest(router, settings)
    return dialect_application("latentline: Replicate", state, router, render, [PredictionRequest])


def _add_predictions(router: APIRouter) -> None:
    """What is done with predictions that were made."""

    @router.get("/predictions", response_model=PredictionPage, responses=errors())
    async def list_predictions(
        request: Request, jobs: Reading, cursor: Annotated[str | None, Query(max_length=300)] = None
    ) -> dict[str, Any]:
        """Predictions, newest first, and jobs that other dialects made."""
        return page(request, *await jobs.list(None, cursor, PAGE_SIZE))

    @router.get("/predictions/{prediction_id}", response_model=Prediction, responses=errors(404))
    async def get_prediction(request: Request, jobs: Reading, prediction_id: str) -> dict[str, Any]:
        record = await jobs.get(prediction_id)
        return prediction(record, base_of(request), await output_of(request, jobs, record))

    @router.post("/predictions/{prediction_id}/cancel", response_model=Prediction, responses=errors(404))
    async def cancel_prediction(request: Request, jobs: Submitting, prediction_id: str) -> dict[str, Any]:
        record = await jobs.cancel(prediction_id)
        return prediction(record, base_of(request), await output_of(request, jobs, record))

    @router.get(
        "/predictions/{prediction_id}/stream", response_class=StreamingResponse, responses={200: {"content": STREAM}, **errors(404)}
    )
    async def stream_prediction(request: Request, jobs: Reading, prediction_id: str) -> StreamingResponse:
        """Server-sent events: ``logs`` for each step, ``output`` for each picture, ``error``, and ``done`` at the end."""
        record = await jobs.get(prediction_id)
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(_events(request, jobs, record), media_type="text/event-stream", headers=headers)


def _add_models(router: APIRouter, settings: Settings) -> None:
    @router.get("/models", tags=["models"], response_model=ModelPage, responses=errors())
    async def list_models(request: Request, jobs: Reading) -> dict[str, Any]:
        names = await known_names(jobs, settings)
        return {"previous": None, "next": None, "results": [model_answer(request, name, model) for name, model in names.items()]}

    @router.get("/models/{owner}/{name}", tags=["models"], response_model=ModelAnswer, responses=errors(404))
    async def get_model(request: Request, jobs: Reading, owner: str, name: str) -> dict[str, Any]:
        return model_answer(request, f"{owner}/{name}", await _model(jobs, settings, owner, name))

    @router.get("/models/{owner}/{name}/versions", tags=["models"], response_model=VersionPage, responses=errors(404))
    async def list_versions(jobs: Reading, owner: str, name: str) -> dict[str, Any]:
        """Its one version: what workers have loaded under this name."""
        return {"previous": None, "next": None, "results": [version_answer(await _model(jobs, settings, owner, name))]}

    @router.get("/models/{owner}/{name}/versions/{version}", tags=["models"], response_model=VersionAnswer, responses=errors(404))
    async def get_version(jobs: Reading, owner: str, name: str, version: str) -> dict[str, Any]:
        found = version_answer(await _model(jobs, settings, owner, name))
        if version not in (found["id"], "latest"):
            raise HTTPException(404, f"the version of this model is {found['id']}")
        return found


def _add_rest(router: APIRouter, settings: Settings) -> None:
    @router.get("/webhooks/default/secret", tags=["webhooks"], response_model=Secret, responses=errors(404))
    async def secret(jobs: Reading) -> dict[str, Any]:
        """The secret with which webhooks are signed, where the API serves this machine alone. With keys only deliverers can read it."""
        if key := jobs.principal.key:
            command = f"latentline secrets create {key.tenant}"
            raise HTTPException(
                404, f"the secret of webhooks is shown once, to whoever runs this API and makes it with `{command}`: ask there"
            )
        if settings.callback_secret is None:
            raise HTTPException(404, "webhooks are not signed, and so not sent: LATENTLINE_CALLBACK_SECRET is not set for this API")
        return {"key": settings.callback_secret.get_secret_value().partition(",")[0].strip()}

    @router.post("/files", tags=["files"], status_code=501, response_model=None, responses=errors(501))
    async def files(_: Submitting) -> Response:
        return problem_answer(render, Problem(501, "not_implemented", "files are not there yet: latentline takes no pictures as input"))


async def _model(jobs: JobService, settings: Settings, owner: str, name: str) -> str:
    names = await known_names(jobs, settings)
    model = names.get(f"{owner}/{name}")
    if model is None:
        raise HTTPException(404, f"no model {owner[:80]}/{name[:80]}; there are: {', '.join(names) or 'none'}")
    return model


async def _made(request: Request, jobs: JobService, settings: Settings, asked: PredictionRequest, version: str) -> Response:
    """Submit, and answer with the prediction.

    Raises:
        InvalidRequest: a field; ``version`` for a model or version that is not served.
    """
    wait_s = _wait_s(request)
    names = await known_names(jobs, settings)
    try:
        record = await submit(jobs, asked.native(asked.parsed_input(), find(version, names), base_of(request)), NAMES, settings)
    except InvalidRequest as error:
        if error.field == "version":
            raise InvalidRequest("version", version, f"one of: {', '.join(names)}, or the id of a version of one") from None
        raise
    status = None
    if wait_s:
        try:
            record = await wait(request, jobs, record.id, wait_s)
        except ClientGone:
            return Response(status_code=499)  # nobody reads it; the prediction goes on
        # Clients take any other answer to a wait for the end of the prediction.
        status = None if record.status.terminal else "starting"
    answer = prediction(record, base_of(request), await output_of(request, jobs, record), status)
    return JSONResponse(answer, 201, headers={"Location": answer["urls"]["get"]})


def _wait_s(request: Request) -> int:
    """Seconds of ``Prefer: wait`` or ``Prefer: wait=N``; 0 without."""
    for text in ",".join(request.headers.getlist("prefer")).split(","):
        if found := re.fullmatch(r"\s*wait\s*(?:=\s*(\d{1,4}))?\s*", text):
            seconds = MAX_WAIT_S if found[1] is None else int(found[1])
            if not 1 <= seconds <= MAX_WAIT_S:
                raise InvalidRequest("Prefer", text.strip(), f"wait, or wait=1 to wait={MAX_WAIT_S}")
            return seconds
    return 0


async def _events(request: Request, jobs: JobService, record: JobRecord) -> AsyncIterator[str]:
    """The whole story of a prediction, from its beginning. A client that leaves changes nothing."""
    yield sse("logs", "start", head(record))
    try:
        async with jobs.listen(record.id, None) as listener:
            while not listener.ended:
                events = await listener.next(KEEP_ALIVE_S)
                if not events:
                    yield ": keep-alive\n\n"
                for event in events:
                    if event.type == "job.progress":
                        yield sse("logs", event.id, progress_line(int(event.data["step"]), int(event.data["num_steps"])))
        record = await jobs.get(record.id)
        for text in last_events(record, await output_of(request, jobs, record)):
            yield text
    except LatentlineError as error:
        yield sse("error", "error", f'{{"detail": "{error.code}"}}')
