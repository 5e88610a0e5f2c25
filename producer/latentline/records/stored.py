"""A job's record as it stands in Redis, read."""

from __future__ import annotations

import itertools
import json

from pydantic import TypeAdapter, ValidationError

from latentline.errors import JobNotFound
from latentline.jobs import ImageRef, JobError, JobRecord, JobWarning, Phase, ResolvedRequest, Status

_IMAGES = TypeAdapter(tuple[ImageRef, ...])  # one call for all images of a job: polls read them all the time


def record_of(raw: dict[str, str]) -> JobRecord:
    """A record; raises JobNotFound for one that this version cannot read."""
    try:
        return JobRecord(
            id=raw["id"],
            request=ResolvedRequest.model_validate_json(raw["request"]),
            status=Status(raw["status"]),
            phase=Phase(raw["phase"]) if raw.get("phase") else None,
            step=int(raw.get("step", 0)),
            num_steps=int(raw["num_steps"]),
            cost=int(raw.get("cost", 0)),
            attempt=int(raw.get("attempt", 0)),
            worker=raw.get("worker"),
            cancel_requested=raw.get("cancel_requested") == "1",
            created_at=float(raw["created_at"]),
            started_at=float(raw["started_at"]) if "started_at" in raw else None,
            finished_at=float(raw["finished_at"]) if "finished_at" in raw else None,
            images=_images(raw),
            error=JobError.model_validate_json(raw["error"]) if raw.get("error") else None,
            warnings=tuple(JobWarning.model_validate(warning) for warning in json.loads(raw.get("warnings", "[]"))),
            timings=json.loads(raw.get("timings", "{}")),
            traceparent=raw.get("traceparent", ""),
        )
    except (KeyError, ValueError, ValidationError) as error:
        raise JobNotFound(f"job {raw.get('id')!r} has a record that this version cannot read") from error


def _images(raw: dict[str, str]) -> tuple[ImageRef, ...]:
    """The images of a stored job. Their pixels' digests stand beside them, for readers of version 0.1.0 know no such field."""
    images, pixels = json.loads(raw.get("images", "[]")), json.loads(raw.get("pixels", "[]"))
    return _IMAGES.validate_python([{**image, "pixels_sha256": digest} for image, digest in itertools.zip_longest(images, pixels)])
