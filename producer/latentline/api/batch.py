"""Many jobs in one request: ``POST /v1/jobs/batch``."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel

from latentline.errors import InvalidRequest, LatentlineError
from latentline.operations import Outcome

from .answers import ErrorBody, JobAnswer, answer, errors
from .body import json_object
from .dependencies import Submitting
from .problems import problem_of

MAX_BATCH = 100  # jobs of one request
MAX_BATCH_BYTES = 1024 * 1024  # of its body

router = APIRouter(prefix="/v1", tags=["jobs"])


class BatchItem(BaseModel):
    """What became of one job: the job with status 202, or the error with the status that it would have had alone."""

    status: int
    job: JobAnswer | None = None
    error: ErrorBody | None = None


class BatchAnswer(BaseModel):
    results: list[BatchItem]


_BODY: dict[str, Any] = {
    "type": "object",
    "required": ["jobs"],
    "additionalProperties": False,
    "properties": {
        "jobs": {"type": "array", "minItems": 1, "maxItems": MAX_BATCH, "items": {"$ref": "#/components/schemas/JobRequest"}},
    },
}


@router.post(
    "/jobs/batch",
    response_model=BatchAnswer,
    responses=errors(408, 413, 415, 429),
    openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": _BODY}}}},
)
async def submit_batch(request: Request, jobs: Submitting) -> BatchAnswer:
    """Submit up to 100 jobs. Each is accepted or refused by itself; ``results`` has their outcomes in the same order.

    An item may have an ``idempotency_key`` of its own, so that a batch can be sent again after an answer that was lost. Against the
    key's rate a batch counts as so many submissions, and is refused as a whole (429) where it exceeds it.
    """
    if "idempotency-key" in request.headers:
        raise InvalidRequest("Idempotency-Key", request.headers["idempotency-key"], "none here: each job may have an idempotency_key")
    data = await json_object(request, MAX_BATCH_BYTES)
    items = data.pop("jobs", None)
    if data:
        raise InvalidRequest(str(next(iter(data)))[:80], None, "only the field jobs")
    if not isinstance(items, list) or not 1 <= len(items) <= MAX_BATCH:
        given = f"{len(items)} jobs" if isinstance(items, list) else items
        raise InvalidRequest("jobs", given, f"a list of 1 to {MAX_BATCH} jobs")
    return BatchAnswer(results=[_item(request, outcome) for outcome in await jobs.submit_batch(items)])


def _item(request: Request, outcome: Outcome) -> BatchItem:
    if not isinstance(outcome, LatentlineError):
        return BatchItem(status=202, job=answer(outcome))
    problem = problem_of(request, outcome)
    invalid = problem.invalid
    field, allowed = (invalid.field, invalid.allowed) if invalid else (None, None)
    return BatchItem(status=problem.status, error=ErrorBody(code=problem.code, message=problem.message, field=field, allowed=allowed))
