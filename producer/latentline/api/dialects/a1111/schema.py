"""The shapes of answers, for the OpenAPI document."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


class Blamed(BaseModel):
    loc: list[str]
    msg: str
    type: str


class ErrorAnswer(BaseModel):
    error: str
    detail: str | list[Blamed]
    body: str
    errors: str


class Txt2ImgAnswer(BaseModel):
    images: list[str]
    parameters: dict[str, Any]
    info: str
    """JSON as text."""


class State(BaseModel):
    skipped: bool
    interrupted: bool
    stopping_generation: bool
    job: str
    job_count: int
    job_timestamp: str
    job_no: int
    sampling_step: int
    sampling_steps: int


class Progress(BaseModel):
    progress: float
    eta_relative: float
    state: State
    current_image: str | None
    textinfo: str | None


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The errors of a route."""
    return {status: {"model": ErrorAnswer} for status in (*statuses, 401, 403, 422, 500, 503)}
