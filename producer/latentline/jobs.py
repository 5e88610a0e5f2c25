"""The contract as it is stored: requests, records and events, and how a submitted request becomes a stored one.

Strict at submission (:mod:`latentline.requests`), tolerant in storage: readers ignore fields that they do not know and keep
unknown enum values as text, because processes of several versions share one broker during an upgrade. Writers leave out
defaults, so a default of a stored field never changes. An addition raises the *level* of the requests that use it (see
:data:`latentline.models.ADDED`) and not ``version``; a reader refuses a version that it does not know.

The state machine is drawn in ``docs/job-states.md``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from pydantic import Field

from .models import LEVEL, SCHEDULERS, UNANNOUNCED, Announcement, ModelInfo, level_of
from .requests import (
    DEFAULT_RETENTION_S,
    MAX_BODY_BYTES,
    MAX_GUIDANCE,
    MAX_IMAGES,
    MAX_KEY_CHARS,
    MAX_METADATA_BYTES,
    MAX_PROMPT_CHARS,
    MAX_SEED,
    MAX_SIZE_PX,
    MAX_STEPS,
    MIN_SIZE_PX,
    SCHEMA_VERSION,
    SIZE_MULTIPLE_PX,
    Callback,
    JobRequest,
    Message,
    Output,
)

__all__ = [
    "DEFAULT_RETENTION_S", "LEVEL", "MAX_BODY_BYTES", "MAX_GUIDANCE", "MAX_IMAGES", "MAX_KEY_CHARS", "MAX_METADATA_BYTES",
    "MAX_PROMPT_CHARS", "MAX_SEED", "MAX_SIZE_PX", "MAX_STEPS", "MIN_SIZE_PX", "SCHEDULERS", "SCHEMA_VERSION", "SIZE_MULTIPLE_PX",
    "Announcement", "Callback", "Claim", "ImageRef", "JobError", "JobEvent", "JobRecord", "JobRequest", "JobWarning", "Message",
    "ModelInfo", "Output", "Phase", "ResolvedRequest", "Sending", "Status", "StoredCallback", "StoredLora", "StoredOutput", "Submission",
    "resolve",
]  # fmt: skip


class _OpenEnum(StrEnum):
    """An enum whose unknown values are kept as text: they come from a newer version."""

    @classmethod
    def _missing_(cls, value: object) -> _OpenEnum | None:
        if not isinstance(value, str):
            return None
        member = str.__new__(cls, value)
        member._name_, member._value_ = value, value
        return member


class Status(_OpenEnum):
    """Where a job stands; see ``docs/job-states.md``."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def terminal(self) -> bool:
        return self in (Status.SUCCEEDED, Status.FAILED, Status.CANCELLED)


class Phase(_OpenEnum):
    """What a running job is doing."""

    ENCODING = "encoding"
    DENOISING = "denoising"
    DECODING = "decoding"
    UPLOADING = "uploading"


class StoredOutput(Message):
    """:class:`latentline.requests.Output` as it is stored."""

    format: str = "png"
    quality: int = 90

    @property
    def content_type(self) -> str:
        return f"image/{self.format}"


class StoredCallback(Message):
    """:class:`latentline.requests.Callback` as it is stored."""

    url: str
    events: tuple[str, ...] = ("job.succeeded", "job.failed", "job.cancelled")
    prediction_base: str | None = None


class StoredLora(Message):
    """:class:`latentline.requests.Lora` as it is stored."""

    name: str
    scale: float = 1.0


class ResolvedRequest(Message):
    """A request as a record holds it: what the client left to the model is filled in. The limits were checked at submission."""

    version: Literal[1]
    model: str
    prompt: str
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    num_inference_steps: int
    guidance_scale: float
    scheduler: str
    loras: tuple[StoredLora, ...] = ()
    seed: int
    num_images: int = 1
    output: StoredOutput = StoredOutput()
    callback: StoredCallback | None = None
    priority: int = 5
    deadline_s: float | None = None
    preview_every: int = 0
    tenant: str = "default"
    metadata: dict[str, Any] = Field(default_factory=dict)
    idempotency_key: str | None = None

    def to_json(self) -> str:
        """As it is stored: without defaults. Fields that the model may decide have none, so they are always there."""
        return self.model_dump_json(exclude_defaults=True)


class ImageRef(Message):
    """One result in the object store; ``url`` is presigned whenever the record is read."""

    key: str
    seed: int
    width: int
    height: int
    content_type: str
    sha256: str
    num_bytes: int
    pixels_sha256: str | None = None
    """Of its decoded pixels, as its file says (:class:`latentline.provenance.Provenance`)."""
    url: str | None = None


class JobError(Message):
    """Why a job failed: a stable code and a message without internals."""

    code: str
    message: str


class JobWarning(Message):
    """What a client should know of a job that was done all the same.

    ``prompt_truncated``: the text encoder read only the first tokens of ``field``.
    """

    code: str
    field: str
    message: str


class JobRecord(Message):
    """The truth about one job. Times are Unix seconds on the Redis server's clock."""

    id: str
    request: ResolvedRequest
    status: Status
    phase: Phase | None = None
    step: int = 0
    num_steps: int
    queue_position: int | None = None
    """0 is next; only while queued."""
    cost: int = 0
    """Network rows that denoising takes."""
    attempt: int = 0
    worker: str | None = None
    cancel_requested: bool = False
    created_at: float
    started_at: float | None = None
    finished_at: float | None = None
    images: tuple[ImageRef, ...] = ()
    error: JobError | None = None
    warnings: tuple[JobWarning, ...] = ()
    timings: dict[str, float] = Field(default_factory=dict)
    """Durations in seconds by phase, and ``shared_steps``: denoise steps that ran together with another job's."""
    traceparent: str = ""
    """Of the span in which it was submitted (W3C trace context), where there was one."""


class JobEvent(Message):
    """One entry of a job's event stream; ``id`` is the Redis stream id that ``Last-Event-ID`` resumes from.

    Types: job.queued, job.running, job.progress, job.preview, job.succeeded, job.failed, job.cancelled; newer workers may
    write others. The ``images`` of a job.preview may be empty: only the newest preview is kept.
    """

    id: str
    type: str
    job_id: str
    at: float
    data: dict[str, Any] = Field(default_factory=dict)

    @property
    def terminal(self) -> bool:
        return self.type in ("job.succeeded", "job.failed", "job.cancelled")


class Claim(Message):
    """A worker's hold on a job: the record, and the fencing token that only the newest holder has."""

    record: JobRecord
    token: int

    @property
    def deadline_in_s(self) -> float | None:
        """Seconds from the claim to the job's deadline, both on the broker's clock; None for a job without one."""
        record = self.record
        if not record.request.deadline_s or record.started_at is None:
            return None
        return record.created_at + record.request.deadline_s - record.started_at


@dataclass(frozen=True)
class Sending:
    """One sending of a request by a client that waits for its answer, and sends the request again when it gets none."""

    digest: str
    """Of the API key and the body: the same for every sending of a request, and for equal requests."""
    count: int
    """How often the client has sent it before."""


@dataclass(frozen=True)
class Submission:
    """A request as it is written to the broker, with what the broker needs to know of it."""

    request: ResolvedRequest
    cost: int
    """Network rows that denoising takes: steps x images x rows per image."""
    level: int
    """The lowest level (:data:`latentline.models.LEVEL`) of a worker that can do it."""
    level_field: str
    """The field that asks for that level; empty at level 1."""
    fingerprint: str
    """What the client sent (:meth:`JobRequest.fingerprint`)."""
    sized_fingerprint: str
    """The same with the size resolved: what version 0.1.0 compares."""
    sending: Sending | None = None
    """Of a client that may send the same request again for the same job."""
    traceparent: str = ""
    """Of the span in which it is submitted; empty without one."""


def resolve(request: JobRequest, info: ModelInfo | None = None) -> Submission:
    """Fill in what the client left to the model.

    Args:
        info: what the model's workers announce; without it, the contract's own defaults, and the size stays open.

    Raises:
        InvalidRequest: the model does not make that size, or does not have the scheduler.
    """
    model = info or UNANNOUNCED
    width, height = info.size_of(request) if info else (request.width, request.height)
    chosen = {name: value for name, value in request.model_dump().items() if value is not None}
    resolved = ResolvedRequest.model_validate(
        {
            "num_inference_steps": model.default_num_inference_steps,
            "guidance_scale": model.default_guidance_scale,
            "scheduler": model.first_scheduler,
            **chosen,
            "width": width,
            "height": height,
        }
    )
    level, field = level_of(resolved)
    return Submission(
        resolved,
        cost=resolved.num_inference_steps * resolved.num_images * model.rows(resolved.guidance_scale),
        level=level,
        level_field=field,
        fingerprint=request.fingerprint(),
        sized_fingerprint=request.fingerprint(width=width, height=height),
    )
