"""The shapes of answers, for the OpenAPI document."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


class ErrorObject(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    error: ErrorObject


class Picture(BaseModel):
    b64_json: str | None = None
    url: str | None = None


class Usage(BaseModel):
    """Zero: nothing is counted in tokens."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: dict[str, int]


class ImagesAnswer(BaseModel):
    created: int
    data: list[Picture]
    background: str
    output_format: str
    size: str
    usage: Usage
    id: str
    """Of the job; latentline's own, as ``seeds`` and ``warnings`` are."""
    seeds: list[int]
    warnings: list[str] | None = None
    safety_identifier: str | None = None


class ModelAnswer(BaseModel):
    id: str
    object: str
    created: int
    owned_by: str


class ModelList(BaseModel):
    object: str
    data: list[ModelAnswer]


STREAM: dict[str, Any] = {"text/event-stream": {}}  # OpenAPI 3.1 has no schema for each event of a stream


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The errors of a route."""
    # Every route declares 422, which none answers: FastAPI documents a shape of its own for it otherwise.
    return {status: {"model": ErrorAnswer} for status in (*statuses, 401, 403, 422, 500, 503)}
