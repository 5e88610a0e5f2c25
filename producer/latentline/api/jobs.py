"""The native dialect: ``/v1/jobs`` and ``/v1/models``."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError
from starlette.routing import Match, Route
from starlette.types import Scope

from latentline.errors import InvalidRequest
from latentline.records import MAX_PAGE, JobFilter
from latentline.requests import MAX_KEY_CHARS, MAX_METADATA_BYTES, allowed_by

from .answers import JobAnswer, JobPage, LoraAnswer, LoraList, ModelList, answer, errors
from .auth import bearer
from .body import json_object
from .conditional import IF_NONE_MATCH, unchanged
from .dependencies import Reading, Submitting
from .polls import poll


def _no_number(text: Any) -> Any:
    """Refuse a number of seconds, which would be read as milliseconds where it is large."""
    try:
        float(text)
    except (TypeError, ValueError):
        return text
    raise ValueError("a date and time such as 2026-11-27T22:00:00Z")


Moment = Annotated[datetime, BeforeValidator(_no_number)]
Entry = Annotated[str, Field(max_length=MAX_METADATA_BYTES, json_schema_extra={"pattern": ":"})]
# Only documented here: the field of the request that it becomes is checked.
IdempotencyKey = Annotated[str | None, Header(json_schema_extra={"minLength": 1, "maxLength": MAX_KEY_CHARS})]

MAX_WAIT_S = 60.0  # of a long poll; proxies often cut a request after a minute
_SECONDS = TypeAdapter(Annotated[float, Field(ge=0, le=MAX_WAIT_S)])
JOB_ID: dict[str, Any] = {"name": "job_id", "in": "path", "required": True, "schema": {"type": "string", "title": "Job Id"}}
WAIT: dict[str, Any] = {
    "name": "wait",
    "in": "query",
    "required": False,
    "schema": {"type": "number", "minimum": 0.0, "maximum": MAX_WAIT_S, "default": 0, "title": "Wait"},
}

router = APIRouter(prefix="/v1", tags=["jobs"])


@router.post(
    "/jobs",
    status_code=202,
    response_model=JobAnswer,
    responses=errors(408, 409, 413, 415, 429),
    openapi_extra={
        "requestBody": {"required": True, "content": {"application/json": {"schema": {"$ref": "#/components/schemas/JobRequest"}}}}
    },
)
async def submit(request: Request, jobs: Submitting, idempotency_key: IdempotencyKey = None) -> JSONResponse:
    """Submit a job. Width, height, steps, guidance scale and scheduler default to the model's own (``GET /v1/models``).

    The same ``Idempotency-Key`` with the same body gives the same job; with another body it is a conflict.
    """
    data = await json_object(request)
    key = _idempotency_key(request, data)  # the parameter documents the header; it holds only one of several
    if key is not None:
        data["idempotency_key"] = key
    record = await jobs.submit(data)
    return JSONResponse(answer(record, jobs.eta_s(record)).model_dump(mode="json"), 202, headers={"Location": f"/v1/jobs/{record.id}"})


@router.get("/jobs", response_model=JobPage, responses=errors())
async def list_jobs(
    jobs: Reading,
    status: Annotated[Literal["queued", "running", "succeeded", "failed", "cancelled"] | None, Query()] = None,
    cursor: Annotated[str | None, Query(max_length=300)] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 50,
    model: Annotated[str | None, Query(max_length=MAX_KEY_CHARS)] = None,
    created_after: Annotated[Moment | None, Query(description="Then or later")] = None,
    created_before: Annotated[Moment | None, Query(description="Earlier than this")] = None,
    metadata: Annotated[list[Entry] | None, Query(description="key:value")] = None,
    tenant: Annotated[str | None, Query(max_length=100)] = None,
) -> JobPage:
    """Jobs, newest first: those of the key's tenant, of all tenants or of ``tenant`` for a key with the scope ``admin``.

    ``metadata=order:17`` finds jobs with that entry; given several times, all have to agree. ``next_cursor`` is the ``cursor`` of the
    next page; a page may be shorter than ``limit``, or empty, although more follow.
    """
    after, before = (None if moment is None else _seconds(moment) for moment in (created_after, created_before))
    where = JobFilter(model=model or "", created_after=after, created_before=before, metadata=tuple(metadata or ()))
    records, following = await jobs.list(status, cursor, limit, tenant, where)
    return JobPage(jobs=[answer(record, jobs.eta_s(record)) for record in records], next_cursor=following)


@router.get(
    "/jobs/{job_id}",
    response_model=JobAnswer,
    openapi_extra={"security": [{bearer.dependency.scheme_name: []}], "parameters": [JOB_ID, WAIT, IF_NONE_MATCH]},
    responses={304: {"description": "Unchanged since the answer with this ETag"}, **errors(404)},
)
async def get_job(request: Request) -> Response:
    """One job; with ``wait``, once it has ended or after so many seconds, whichever comes first.

    The URLs of its images stay the same for half of their life; ``If-None-Match`` with the ETag saves the answer.
    """
    record = await poll(request, request.path_params["job_id"], _wait_s(request))
    eta_s = request.app.state.estimates.eta_s(record)
    body = answer(record, eta_s).model_dump_json().encode()
    etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    headers = {"ETag": etag, "Cache-Control": "no-cache"}
    if not record.status.terminal:
        headers["Retry-After"] = str(ask_again_s(eta_s))
    if unchanged(request, etag):
        return Response(status_code=304, headers=headers)
    return Response(body, media_type="application/json", headers=headers)


class PlainRoute(Route):
    """A route of Starlette's that tells its path to the metrics, as FastAPI's own routes do."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, found = super().matches(scope)
        return match, {**found, "route": self}


# What clients ask for most. FastAPI's own way from a request to a function costs some 0.1 ms of CPU more, so it only documents this one.
POLL = PlainRoute("/v1/jobs/{job_id}", get_job, methods=["GET"], include_in_schema=False)


@router.delete("/jobs/{job_id}", status_code=204, response_class=Response, responses=errors(404, 409))
async def delete_job(jobs: Submitting, job_id: str) -> Response:
    """Forget a job that has ended: it is gone at once, its pictures within seconds. A job that has not ended is cancelled first (409)."""
    await jobs.delete(job_id)
    return Response(status_code=204)


@router.post("/jobs/{job_id}/cancel", response_model=JobAnswer, responses=errors(404))
async def cancel_job(jobs: Submitting, job_id: str) -> JobAnswer:
    """Cancel a job: at once while it is queued, at the next step while it runs. A job that has ended stays as it is."""
    record = await jobs.cancel(job_id)
    return answer(record, jobs.eta_s(record))


@router.get("/models", response_model=ModelList, tags=["models"], responses=errors())
async def list_models(jobs: Reading) -> ModelList:
    """The models that are served now, with their limits and defaults: what a request that leaves a field out gets.

    Of each model `warm` tells how many of its `workers` have it in memory; where it is 0, a job waits until one of them loads it.
    """
    return ModelList(models=list((await jobs.models()).values()))


@router.get("/loras", response_model=LoraList, tags=["models"], responses=errors())
async def list_loras(jobs: Reading) -> LoraList:
    """The LoRA adapters that a request may name, by the model that they belong to."""
    served = (await jobs.models()).values()
    return LoraList(loras=[LoraAnswer(model=model.id, name=name) for model in served for name in model.loras])


def _seconds(moment: datetime) -> float:
    """Unix seconds; a time without a zone is UTC."""
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _idempotency_key(request: Request, data: dict[str, Any]) -> str | None:
    """The key of the header or of the body; raises InvalidRequest where there are two that differ, or two headers."""
    given = request.headers.getlist("idempotency-key")
    if len(given) > 1:
        raise InvalidRequest("Idempotency-Key", ", ".join(given), "one header")
    in_body = data.get("idempotency_key")
    if given and in_body not in (None, given[0]):
        raise InvalidRequest("idempotency_key", in_body, f"the same value as the Idempotency-Key header, {given[0][:80]!r}")
    return given[0] if given else in_body


def _wait_s(request: Request) -> float:
    """The query's ``wait``, 0 without; raises InvalidRequest."""
    given = request.query_params.get("wait")
    if given is None:
        return 0
    try:
        return _SECONDS.validate_python(given)
    except ValidationError as error:
        raise InvalidRequest("wait", given, allowed_by(error.errors()[0])) from None


def ask_again_s(eta_s: float | None) -> int:
    """After how many seconds a poll is worth while: a fifth of what is left, from 1 to 10."""
    return 1 if eta_s is None else min(10, max(1, round(eta_s / 5)))
