"""What Replicate's clients read: predictions, models, the events of a stream, and errors as problem details (RFC 9457)."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from latentline.api.problems import Problem
from latentline.api.service import JobService
from latentline.jobs import JobRecord, Status
from latentline.predictions import error_of, picture_url, prediction, version_of

from .request import Input

COG_VERSION = "0.16.0"  # clients look at it to know how to read a schema
EPOCH = datetime.fromtimestamp(0, UTC).isoformat()  # nobody keeps when a model was first served


def render(problem: Problem) -> JSONResponse:
    """``{"title", "detail", "status", "type", "instance"}``; with ``invalid_fields`` where a field is to blame."""
    body: dict[str, Any] = {
        "title": "Input validation failed" if problem.invalid else HTTPStatus(problem.status).phrase,
        "detail": problem.message,
        "status": problem.status,
        "type": f"urn:latentline:error:{problem.code}",
        "instance": None,
    }
    if problem.invalid:
        body["invalid_fields"] = [{"field": problem.invalid.field, "description": f"allowed: {problem.invalid.allowed}"}]
    return JSONResponse(body, problem.status, headers=problem.headers, media_type="application/problem+json")


def page(request: Request, records: list[JobRecord], following: str | None) -> dict[str, Any]:
    """Pictures of a list are URLs of this API: a hundred predictions with their pictures inside would be too much."""
    base = base_of(request)
    results = [prediction(one, base, [picture_url(base, one, i) for i in range(len(one.images))] or None) for one in records]
    return {"previous": None, "next": following and f"{base}/predictions?cursor={following}", "results": results}


async def output_of(request: Request, jobs: JobService, record: JobRecord) -> list[str] | None:
    """The pictures of a job that succeeded, as URLs of this API where that is reached by https, else as ``data:`` URLs.

    Clients send their key to the host of a picture, so it is never the object store's, and they read no http: URLs.
    """
    if record.status is not Status.SUCCEEDED:
        return None
    if request.url.scheme == "https":
        return [picture_url(base_of(request), record, number) for number in range(len(record.images))]
    files = [(image.content_type, await jobs.picture(image)) for image in record.images]
    return [f"data:{kind};base64,{base64.b64encode(data).decode()}" for kind, data in files]


def model_answer(request: Request, name: str, model: str) -> dict[str, Any]:
    owner, _, short = name.partition("/")
    empty = dict.fromkeys(("description", "github_url", "paper_url", "license_url", "cover_image_url", "default_example"))
    about = {"url": f"{base_of(request)}/models/{name}", "owner": owner, "name": short, "visibility": "public", "run_count": 0}
    return {**empty, **about, "latest_version": version_answer(model)}


def version_answer(model: str) -> dict[str, Any]:
    output = {"type": "array", "title": "Output", "items": {"type": "string", "format": "uri"}}
    schemas = {"Input": Input.model_json_schema(), "Output": output}
    document = {"openapi": "3.1.0", "info": {"title": model, "version": "1"}, "paths": {}, "components": {"schemas": schemas}}
    return {"id": version_of(model), "created_at": EPOCH, "cog_version": COG_VERSION, "openapi_schema": document}


def sse(kind: str, event_id: str, data: str) -> str:
    lines = "".join(f"data: {line}\n" for line in data.split("\n"))
    return f"event: {kind}\nid: {event_id}\n{lines}\n"


def last_events(record: JobRecord, output: list[str] | None) -> list[str]:
    """The end of a stream: pictures or the error, then ``done``."""
    events = [sse("output", f"output-{number}", url) for number, url in enumerate(output or [])]
    if record.status is Status.FAILED:
        events.append(sse("error", "error", json.dumps({"detail": error_of(record)})))
    reason = {Status.FAILED: {"reason": "error"}, Status.CANCELLED: {"reason": "canceled"}}.get(record.status, {})
    return [*events, sse("done", "done", json.dumps(reason))]


def base_of(request: Request) -> str:
    """URL of this dialect, as the client reaches it."""
    return f"{request.url.scheme}://{request.url.netloc}{request.scope.get('root_path', '')}"
