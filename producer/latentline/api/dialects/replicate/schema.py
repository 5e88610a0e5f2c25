"""The shapes of answers, for the OpenAPI document."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


class InvalidField(BaseModel):
    field: str
    description: str


class ProblemAnswer(BaseModel):
    title: str
    detail: str
    status: int
    type: str
    instance: str | None = None
    invalid_fields: list[InvalidField] | None = None


class Prediction(BaseModel):
    id: str
    model: str
    version: str
    status: str
    input: dict[str, Any]
    output: list[str] | None
    logs: str
    error: str | None
    metrics: dict[str, float]
    created_at: str
    started_at: str | None
    completed_at: str | None
    data_removed: bool
    source: str
    urls: dict[str, str]


class Page(BaseModel):
    previous: str | None
    next: str | None


class PredictionPage(Page):
    results: list[Prediction]


class VersionAnswer(BaseModel):
    id: str
    created_at: str
    cog_version: str
    openapi_schema: dict[str, Any]


class VersionPage(Page):
    results: list[VersionAnswer]


class ModelAnswer(BaseModel):
    url: str
    owner: str
    name: str
    description: str | None
    visibility: str
    github_url: str | None
    paper_url: str | None
    license_url: str | None
    cover_image_url: str | None
    default_example: dict[str, Any] | None
    run_count: int
    latest_version: VersionAnswer


class ModelPage(Page):
    results: list[ModelAnswer]


class Secret(BaseModel):
    key: str


STREAM: dict[str, Any] = {"text/event-stream": {}}  # OpenAPI 3.1 has no schema for each event of a stream


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The errors of a route."""
    # Every route declares 422: FastAPI documents a shape of its own for it otherwise.
    schema = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/ProblemAnswer"}}}
    return {status: {"model": ProblemAnswer, "content": schema} for status in (*statuses, 401, 403, 422, 500, 503)}
