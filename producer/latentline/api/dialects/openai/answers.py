"""What OpenAI's clients read: results, the events of a stream, and errors in their words."""

from __future__ import annotations

import base64
import json
import re
from typing import Any

from starlette.responses import JSONResponse

from latentline.api.problems import Problem
from latentline.api.service import JobService
from latentline.jobs import JobRecord, Status

from .request import GenerationRequest

# Code of a problem -> type and code of the error. Everything else is named by its own code.
ERRORS = {
    "not_authenticated": ("invalid_request_error", "invalid_api_key"),
    "not_allowed": ("invalid_request_error", "missing_scope"),
    "not_found": ("invalid_request_error", "unknown_url"),
    "method_not_allowed": ("invalid_request_error", "method_not_supported"),
    "job_not_found": ("invalid_request_error", "not_found"),
    "body_too_large": ("invalid_request_error", "request_too_large"),
    "unsupported_media_type": ("invalid_request_error", "unsupported_content_type"),
    "rate_exceeded": ("requests", "rate_limit_exceeded"),
    "tenant_quota_exceeded": ("requests", "rate_limit_exceeded"),
    "broker_unavailable": ("server_error", "service_unavailable"),
    "store_unavailable": ("server_error", "service_unavailable"),
    "no_worker": ("server_error", "service_unavailable"),
    "internal_error": ("server_error", "server_error"),
    "job_failed": ("server_error", "image_generation_failed"),
    "job_cancelled": ("invalid_request_error", "image_generation_cancelled"),
    "wait_timeout": ("server_error", "timeout"),
    "not_implemented": ("invalid_request_error", "unsupported_endpoint"),
}
# What an InvalidRequest allows, as a pattern -> the code. The first that fits counts.
INVALID = (
    (r"a value \(the field is required\)", "missing_required_parameter"),
    (r"only the known fields", "unknown_parameter"),
    (r"at least \d+ character", "string_below_min_length"),
    (r"at most \d+ characters", "string_above_max_length"),
    (r"at least -?\d+$", "integer_below_min_value"),
    (r"at most -?\d+$", "integer_above_max_value"),
    (r"(at least|more than) -?\d+\.", "decimal_below_min_value"),
    (r"at most -?\d+\.", "decimal_above_max_value"),
    (r"(an integer|a string|a finite number|a list|a JSON object)$", "invalid_type"),
)


def error_object(problem: Problem) -> dict[str, Any]:
    """``{"error": {"message", "type", "param", "code"}}``."""
    if problem.invalid is None:
        kind, code = ERRORS.get(problem.code, ("invalid_request_error", problem.code))
        return {"error": {"message": problem.message, "type": kind, "param": None, "code": code}}
    param, allowed = problem.invalid.field, problem.invalid.allowed
    found = (code for pattern, code in INVALID if re.match(pattern, allowed))
    code = "model_not_found" if param == "model" and allowed.startswith("one of: ") else next(found, "invalid_value")
    return {"error": {"message": problem.message, "type": "invalid_request_error", "param": param, "code": code}}


def render(problem: Problem) -> JSONResponse:
    body = error_object(problem)
    status = {"model_not_found": 404}.get(body["error"]["code"], 400) if problem.invalid else problem.status
    return JSONResponse(body, status, headers=problem.headers)


def unfinished(record: JobRecord) -> Problem | None:
    """Why a job has no pictures to give; None when it has. Sending the request again would not help, so clients are told not to."""
    stop = {"x-should-retry": "false", "x-request-id": record.id}
    if record.status is Status.SUCCEEDED:
        return None
    if record.status is Status.CANCELLED:
        return Problem(409, "job_cancelled", f"the job {record.id} was cancelled", stop)
    if record.status is Status.FAILED:
        why = f"{record.error.code}: {record.error.message}" if record.error else "no reason was kept"
        return Problem(500, "job_failed", f"the job {record.id} failed: {why}", stop)
    message = f"the job {record.id} has not ended in time; it goes on: GET images/generations/{record.id}"
    return Problem(504, "wait_timeout", message, stop)


async def result(jobs: JobService, record: JobRecord, asked: GenerationRequest | None) -> dict[str, Any]:
    """The answer for a job that succeeded.

    Args:
        asked: the request; None for a job that is read later, which comes as base64.
    """
    urls = asked is not None and asked.response_format == "url"
    data = [{"url": image.url} if urls else {"b64_json": await _base64(jobs, record, i)} for i, image in enumerate(record.images)]
    answer = {"created": int(record.created_at), "data": data, **_about(record, asked), "id": record.id}
    return answer | {"usage": _USAGE, "seeds": [image.seed for image in record.images]}


def partial_event(record: JobRecord, index: int, picture: str) -> str:
    """A partial image as a server-sent event.

    Args:
        picture: a ``data:`` URL.
    """
    head, _, data = picture.partition(",")
    kind = head.removeprefix("data:image/").partition(";")[0]
    event = {"b64_json": data, "created_at": int(record.created_at), "partial_image_index": index, **_about(record, None)}
    return _sse("image_generation.partial_image", event | {"background": "opaque", "quality": "auto", "output_format": kind})


async def completed_event(jobs: JobService, record: JobRecord, number: int, asked: GenerationRequest) -> str:
    """One picture of a job that succeeded as a server-sent event."""
    event = {"b64_json": await _base64(jobs, record, number), "created_at": int(record.created_at), **_about(record, asked)}
    more = {"background": "opaque", "quality": "auto", "usage": _USAGE, "id": record.id, "seed": record.images[number].seed}
    return _sse("image_generation.completed", event | more)


def error_event(problem: Problem) -> str:
    return _sse("error", error_object(problem))


# Nothing is counted in tokens.
_USAGE = {
    "input_tokens": 0, "output_tokens": 0, "total_tokens": 0, "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}  # fmt: skip


def _about(record: JobRecord, asked: GenerationRequest | None) -> dict[str, Any]:
    request = record.request
    found: dict[str, Any] = {"background": "opaque", "output_format": request.output.format, "size": f"{request.width}x{request.height}"}
    if user := request.metadata.get("user"):
        found["safety_identifier"] = user
    warnings = [*(asked.warnings if asked else ()), *(warning.message for warning in record.warnings)]
    if warnings:
        found["warnings"] = warnings
    return found


async def _base64(jobs: JobService, record: JobRecord, number: int) -> str:
    return base64.b64encode(await jobs.picture(record.images[number])).decode()


def _sse(kind: str, data: dict[str, Any]) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n"
