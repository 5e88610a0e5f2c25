"""What clients of the HTTP API see: jobs, pages, models and errors as JSON."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel

from latentline.jobs import JobError, JobRecord, JobWarning, Phase, Status
from latentline.models import ServedModel


class ErrorBody(BaseModel):
    code: str
    message: str
    field: str | None = None
    allowed: str | None = None


class ErrorAnswer(BaseModel):
    error: ErrorBody


class ImageAnswer(BaseModel):
    url: str
    seed: int
    width: int
    height: int
    content_type: str
    sha256: str
    pixels_sha256: str | None


class JobAnswer(BaseModel):
    """A job as clients see it. ``request`` shows the values that were used, also where the client left them to the model."""

    id: str
    status: Status
    phase: Phase | None
    step: int
    num_steps: int
    queue_position: int | None
    eta_s: float | None
    """Seconds until its last step, estimated; null where that is not known."""
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    cancel_requested: bool
    images: list[ImageAnswer]
    error: JobError | None
    warnings: list[JobWarning]
    timings: dict[str, float]
    request: dict[str, Any]


class JobPage(BaseModel):
    jobs: list[JobAnswer]
    next_cursor: str | None


class ModelList(BaseModel):
    models: list[ServedModel]


class LoraAnswer(BaseModel):
    model: str
    name: str


class LoraList(BaseModel):
    loras: list[LoraAnswer]


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The errors of a route, for the OpenAPI document."""
    # Every route declares 422, since FastAPI documents a shape of its own for it otherwise.
    return {status: {"model": ErrorAnswer} for status in (*statuses, 400, 401, 403, 422, 500, 503)}


def answer(record: JobRecord, eta_s: float | None = None) -> JobAnswer:
    """A record as the API shows it."""

    def moment(seconds: float | None) -> datetime | None:
        return None if seconds is None else datetime.fromtimestamp(seconds, UTC)

    return JobAnswer(
        id=record.id,
        status=record.status,
        phase=record.phase,
        step=record.step,
        num_steps=record.num_steps,
        queue_position=record.queue_position,
        eta_s=eta_s,
        created_at=datetime.fromtimestamp(record.created_at, UTC),
        started_at=moment(record.started_at),
        finished_at=moment(record.finished_at),
        cancel_requested=record.cancel_requested,
        images=[ImageAnswer.model_validate(image, from_attributes=True) for image in record.images],
        error=record.error,
        warnings=list(record.warnings),
        timings=record.timings,
        request=record.request.model_dump(mode="json", exclude={"idempotency_key"}),
    )
