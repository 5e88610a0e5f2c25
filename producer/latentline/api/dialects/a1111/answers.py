"""What clients of the web UI's API read: results with their ``info``, progress, and errors."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime
from typing import Any

from starlette.responses import JSONResponse

from latentline import __version__
from latentline.api.problems import Problem
from latentline.api.service import JobService
from latentline.infotext import parameters_text, sampler_name
from latentline.jobs import JobRecord, Status


def render(problem: Problem) -> JSONResponse:
    """As the web UI answers: a list of fields for a body that is not acceptable, else the name of the error and its text."""
    headers = dict(problem.headers)
    if "WWW-Authenticate" in headers:
        headers["WWW-Authenticate"] = 'Basic realm="latentline"'
    if problem.invalid:
        blamed = {"loc": ["body", problem.invalid.field], "msg": problem.message, "type": "value_error"}
        return JSONResponse({"error": problem.code, "detail": [blamed], "body": "", "errors": problem.message}, 422, headers)
    return JSONResponse({"error": problem.code, "detail": problem.message, "body": "", "errors": problem.message}, problem.status, headers)


def unfinished(record: JobRecord) -> Problem | None:
    """Why a job has no answer; None when it has one. A cancelled job has: it was interrupted."""
    if record.status in (Status.SUCCEEDED, Status.CANCELLED):
        return None
    if record.status is Status.FAILED:
        why = f"{record.error.code}: {record.error.message}" if record.error else "no reason was kept"
        return Problem(500, "job_failed", f"the job {record.id} failed: {why}")
    return Problem(504, "wait_timeout", f"the job {record.id} has not ended in time; it goes on")


async def result(
    jobs: JobService, record: JobRecord, parameters: dict[str, Any], ignored: list[str], previews: list[str], send_images: bool
) -> dict[str, Any]:
    """The answer to ``txt2img``.

    Args:
        parameters: the body of the request, which is given back.
        ignored: what it asked for and did not get.
        previews: the newest unfinished images, as ``data:`` URLs: what an interrupted job has.
    """
    images = [base64.b64encode(await jobs.picture(image)).decode() for image in record.images if send_images]
    if record.status is Status.CANCELLED and send_images:
        images = [preview.partition(",")[2] for preview in previews]
    return {"images": images, "parameters": parameters, "info": json.dumps(_info(record, ignored))}


def _info(record: JobRecord, ignored: list[str]) -> dict[str, Any]:
    request, seeds = record.request, [record.request.seed + i for i in range(record.request.num_images)]
    width, height = request.width or 0, request.height or 0
    return {
        "prompt": request.prompt,
        "all_prompts": [request.prompt] * len(seeds),
        "negative_prompt": request.negative_prompt,
        "all_negative_prompts": [request.negative_prompt] * len(seeds),
        "seed": request.seed,
        "all_seeds": seeds,
        "subseed": request.seed,
        "all_subseeds": seeds,
        "subseed_strength": 0,
        "width": width,
        "height": height,
        "sampler_name": sampler_name(request.scheduler),
        "cfg_scale": request.guidance_scale,
        "steps": request.num_inference_steps,
        "batch_size": request.num_images,
        "sd_model_name": request.model,
        "sd_model_hash": None,
        "index_of_first_image": 0,
        "infotexts": [parameters_text(record, seed, width, height) for seed in seeds],
        "job_timestamp": datetime.fromtimestamp(record.created_at, UTC).strftime("%Y%m%d%H%M%S"),
        "version": f"latentline {__version__}",
        "job_id": record.id,
        "interrupted": record.status is Status.CANCELLED,
        "ignored": ignored,
        "warnings": [warning.message for warning in record.warnings],
    }


def progress(record: JobRecord | None, job_count: int, current_image: str | None, now: float) -> dict[str, Any]:
    """The answer to ``progress``.

    Args:
        record: the current job; None where there is none.
        job_count: jobs that have not ended.
        current_image: a ``data:`` URL of the unfinished image.
    """
    share = record.step / record.num_steps if record else 0.0
    spent_s = now - record.started_at if record and record.started_at else 0.0
    return {
        "progress": share,
        "eta_relative": spent_s / share - spent_s if share else 0.0,
        "state": {
            "skipped": False,
            "interrupted": bool(record and record.cancel_requested),
            "stopping_generation": False,
            "job": record.id if record else "",
            "job_count": job_count,
            "job_timestamp": datetime.fromtimestamp(record.created_at if record else 0, UTC).strftime("%Y%m%d%H%M%S"),
            "job_no": 0,
            "sampling_step": record.step if record else 0,
            "sampling_steps": record.num_steps if record else 0,
        },
        "current_image": current_image.partition(",")[2] if current_image else None,
        "textinfo": record.phase if record else None,
    }
