"""What happened to a job: ``/v1/jobs/{id}/timeline``."""

from __future__ import annotations

from fastapi import APIRouter, Response

from latentline.timeline import Timeline

from .answers import errors
from .dependencies import Reading

router = APIRouter(prefix="/v1", tags=["jobs"])


@router.get("/jobs/{job_id}/timeline", response_model=Timeline, responses=errors(404))
async def get_timeline(jobs: Reading, job_id: str, response: Response) -> Timeline:
    """Waiting, claims, phases, every denoise step with how many jobs and rows shared it, checkpoints, callbacks.

    At most 64 KiB: the newest four attempts and eight callbacks. Names of workers and ids of other jobs are for admins.
    """
    response.headers["Cache-Control"] = "no-store"
    return await jobs.timeline(job_id)
