"""A job as a prediction of Replicate's API: what that dialect answers, and what its webhooks carry."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

from .jobs import JobRecord, Status

OWNER = "latentline"  # of models whose own name has no owner in it

STATUSES = {Status.QUEUED: "starting", Status.RUNNING: "processing", Status.CANCELLED: "canceled"}
BAR_CHARS = 10

IGNORED = {
    "apply_watermark": "pictures carry no watermark",
    "disable_safety_checker": "pictures are not checked",
    "go_fast": "num_inference_steps decides",
}
"""Input without a meaning here -> what the prediction's logs say."""


def full_name(model: str) -> str:
    """``owner/name`` of a model or an alias. Clients allow one slash: any further ones are written as two hyphens."""
    owner, slash, name = model.partition("/")
    return f"{owner}/{name.replace('/', '--')}" if slash else f"{OWNER}/{model}"


def version_of(model: str) -> str:
    """The one version of a model, 64 hexadecimal digits: what a worker has loaded under its name."""
    return hashlib.sha256(model.encode()).hexdigest()


def prediction(record: JobRecord, base: str, output: list[str] | None, status: str | None = None) -> dict[str, Any]:
    """A job as a prediction.

    Args:
        base: URL of the dialect: under it the prediction is read, cancelled and streamed.
        output: URLs of its pictures; None before they are there.
        status: instead of the job's own.
    """
    url = f"{base}/predictions/{record.id}"
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
        "created_at": _moment(record.created_at),
        "started_at": _moment(record.started_at),
        "completed_at": _moment(record.finished_at),
        "data_removed": False,
        "source": "api",
        "urls": {"get": url, "cancel": f"{url}/cancel", "stream": f"{url}/stream"},
    }


def picture_url(base: str, record: JobRecord, number: int) -> str:
    """The API's own URL of a picture, which wants the caller's key; ``base`` as in :func:`prediction`."""
    parts = urlsplit(base)
    return f"{parts.scheme}://{parts.netloc}/v1/jobs/{record.id}/images/{number}"


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


def _moment(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat()


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
