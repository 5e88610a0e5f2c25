"""The fleet for administrators: ``/v1/fleet``, and dead letters to be sent again."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel

from latentline.records import Overview

from .answers import JobAnswer, answer, errors
from .dependencies import Administering

router = APIRouter(prefix="/v1", tags=["fleet"])


class ModelOfWorker(BaseModel):
    id: str
    warm: bool
    """Whether it is in memory."""


class WorkerAnswer(BaseModel):
    """A worker that is alive. What is null is not known yet, or of a worker of an earlier version."""

    name: str
    heard_s: float
    models: list[ModelOfWorker]
    device: str | None
    jobs: int | None
    capacity: int | None
    steps_per_s: float | None
    rows_per_step: float | None


class QueueAnswer(BaseModel):
    """Queued jobs of one tenant and model, among the 500 oldest."""

    model: str
    tenant: str
    jobs: int
    oldest_s: float


class LetterAnswer(BaseModel):
    id: str
    kind: str
    reason: str
    age_s: float
    replayable: bool


class FleetAnswer(BaseModel):
    workers: list[WorkerAnswer]
    running: int
    queued: int
    queues: list[QueueAnswer]
    dead_letters: list[LetterAnswer]
    """The newest 50."""
    num_dead_letters: int


@router.get("/fleet", response_model=FleetAnswer, responses=errors())
async def fleet(jobs: Administering) -> FleetAnswer:
    """Workers, queues and dead letters as they are now. Needs the scope ``admin``."""
    return _answer(await jobs.overview())


@router.post("/dead/{dead_id}/replay", status_code=202, response_model=JobAnswer, responses=errors(404, 429))
async def replay(jobs: Administering, dead_id: str) -> JSONResponse:
    """Submit the request of a job that failed permanently again, as a new job, and drop the dead letter."""
    record = await jobs.replay(dead_id)
    return JSONResponse(answer(record).model_dump(mode="json"), 202, headers={"Location": f"/v1/jobs/{record.id}"})


@router.delete("/dead/{dead_id}", status_code=204, response_class=Response, responses=errors(404))
async def drop(jobs: Administering, dead_id: str) -> Response:
    """Forget a dead letter."""
    await jobs.drop_dead_letter(dead_id)
    return Response(status_code=204)


def _answer(found: Overview) -> FleetAnswer:
    workers = []
    for worker in found.workers:
        working = worker.working
        warm = set(working.warm) if working else set(worker.models)
        shown: dict[str, Any] = working.model_dump(exclude={"warm"}) if working else {}
        workers.append(
            WorkerAnswer(
                name=worker.name,
                heard_s=worker.heard_s,
                models=[ModelOfWorker(id=model, warm=model in warm) for model in worker.models],
                **{name: shown.get(name) for name in ("device", "jobs", "capacity", "steps_per_s", "rows_per_step")},
            )
        )
    letters = [
        LetterAnswer(
            id=letter["id"],
            kind=letter["kind"],
            reason=str(letter["reason"])[:500],
            age_s=max(0.0, found.now - float(letter["at"])),
            replayable=letter["kind"] == "job",
        )
        for letter in found.letters
    ]
    return FleetAnswer(
        workers=workers,
        running=found.running,
        queued=found.queued,
        queues=[QueueAnswer(model=one.model, tenant=one.tenant, jobs=one.jobs, oldest_s=one.oldest_s) for one in found.waiting],
        dead_letters=letters,
        num_dead_letters=found.num_letters,
    )
