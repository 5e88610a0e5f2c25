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

from .names import full_name, version_of
from .request import IGNORED, Input

STATUSES = {Status.QUEUED: "starting", Status.RUNNING: "processing", Status.CANCELLED: "canceled"}
COG_VERSION = "0.16.0"  # clients look at it to know how to read a schema
BAR_CHARS = 10
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


def prediction(request: Request, record: JobRecord, output: list[str] | None, status: str | None = None) -> dict[str, Any]:
    """A job as a prediction.

    Args:
        output: URLs of its pictures; None before they are there.
        status: instead of the job's own.
    """

    def moment(seconds: float | None) -> str | None:
        return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat()

    url = f"{_base(request)}/predictions/{record.id}"
    done = record.finished_at is not None and record.started_at is not None
    return {
        "id": record.id,
        "model": full_name(record.request.model),
        "version": version_of(record.request.model),
        "status": status or STATUSES.get(record.status, record.status.value),
        "input": _input(record),
        "output": output,
        "logs": logs(record),
        "error": error_of(record),
        "metrics": {"predict_time": record.finished_at - record.started_at} if done else {},  # type: ignore[operator]
        "created_at": moment(record.created_at),
        "started_at": moment(record.started_at),
        "completed_at": moment(record.finished_at),
        "data_removed": False,
        "source": "api",
        "urls": {"get": url, "cancel": f"{url}/cancel", "stream": f"{url}/stream"},
    }


def page(request: Request, records: list[JobRecord], following: str | None) -> dict[str, Any]:
    """Pictures of a list are URLs of this API: a hundred predictions with their pictures inside would be too much."""
    results = [prediction(request, record, [api_url(request, record, i) for i in range(len(record.images))] or None) for record in records]
    return {"previous": None, "next": following and f"{_base(request)}/predictions?cursor={following}", "results": results}


async def output_of(request: Request, jobs: JobService, record: JobRecord) -> list[str] | None:
    """The pictures of a job that succeeded, as URLs of this API where that is reached by https, else as ``data:`` URLs.

    Clients send their key to the host of a picture, so it is never the object store's, and they read no http: URLs.
    """
    if record.status is not Status.SUCCEEDED:
        return None
    if request.url.scheme == "https":
        return [api_url(request, record, number) for number in range(len(record.images))]
    files = [(image.content_type, await jobs.picture(image)) for image in record.images]
    return [f"data:{kind};base64,{base64.b64encode(data).decode()}" for kind, data in files]


def api_url(request: Request, record: JobRecord, number: int) -> str:
    return f"{request.url.scheme}://{request.url.netloc}/v1/jobs/{record.id}/images/{number}"


def error_of(record: JobRecord) -> str | None:
    return f"{record.error.code}: {record.error.message}" if record.error else None


def logs(record: JobRecord) -> str:
    """The lines of a job's log up to now. Clients read the progress from the last one, written as tqdm writes it."""
    return head(record) + (progress_line(record.step, record.num_steps) if record.step else "")


def head(record: JobRecord) -> str:
    """The first lines of a job's log."""
    ignored = [name for name in str(record.request.metadata.get("ignored", "")).split(",") if name in IGNORED]
    lines = [f"Using seed: {record.request.seed}", *(f"{name} was ignored: {IGNORED[name]}" for name in ignored)]
    return "".join(f"{line}\n" for line in [*lines, *(warning.message for warning in record.warnings)])


def progress_line(step: int, num_steps: int) -> str:
    part = step / max(1, num_steps)
    bar = "█" * round(part * BAR_CHARS)
    return f"{round(part * 100):3}%|{bar:<{BAR_CHARS}}| {step}/{num_steps}\n"


def model_answer(request: Request, name: str, model: str) -> dict[str, Any]:
    owner, _, short = name.partition("/")
    empty = dict.fromkeys(("description", "github_url", "paper_url", "license_url", "cover_image_url", "default_example"))
    about = {"url": f"{_base(request)}/models/{name}", "owner": owner, "name": short, "visibility": "public", "run_count": 0}
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


def _base(request: Request) -> str:
    return f"{request.url.scheme}://{request.url.netloc}{request.scope.get('root_path', '')}"


def _input(record: JobRecord) -> dict[str, Any]:
    native = record.request
    found: dict[str, Any] = {
        "prompt": native.prompt, "width": native.width, "height": native.height, "num_outputs": native.num_images,
        "num_inference_steps": native.num_inference_steps, "guidance_scale": native.guidance_scale, "scheduler": native.scheduler,
        "seed": native.seed, "output_format": native.output.format,
    }  # fmt: skip
    if native.negative_prompt:
        found["negative_prompt"] = native.negative_prompt
    if native.loras:
        found["loras"] = [lora.model_dump() for lora in native.loras]
    return found
