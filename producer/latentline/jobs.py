"""The contract: what a job request, a job record and a job event are, and every limit on them.

All messages are frozen and versioned. A request that breaks a limit raises
:class:`latentline.errors.InvalidRequest`, which names the field, the value and what is allowed.
The state machine is drawn in ``docs/job-states.md``.
"""

from __future__ import annotations

import json
import math
import secrets
from enum import StrEnum
from typing import Annotated, Any, Final, Literal, Self, get_args
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .errors import InvalidRequest

SCHEMA_VERSION: Final = 1

# Limits of a request. A worker's own model may allow less (its record in `models` says so).
MAX_PROMPT_CHARS = 2000
MIN_SIZE_PX = 64
MAX_SIZE_PX = 2048
SIZE_MULTIPLE_PX = 8  # the VAE's reduction: latents must come out whole
MAX_STEPS = 150
MAX_GUIDANCE = 30.0
MAX_IMAGES = 8
MAX_SEED = 2**32 - 1  # the last image's seed is seed + num_images - 1, and stays below 2**32
MAX_METADATA_BYTES = 4096
MAX_KEY_CHARS = 200
MAX_BODY_BYTES = 64 * 1024  # of a submission over HTTP

SchedulerName = Literal[
    "ddim", "ddpm", "pndm", "lms", "euler", "euler_ancestral", "heun", "dpm2", "dpm2_ancestral", "dpmpp_2m", "dpmpp_2m_karras",
    "dpmpp_3m", "dpmpp_2s", "deis", "unipc", "sa_solver", "lcm", "tcd",
]  # fmt: skip
SCHEDULERS: tuple[str, ...] = get_args(SchedulerName)


class Status(StrEnum):
    """Where a job stands; see ``docs/job-states.md``."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def terminal(self) -> bool:
        return self not in (Status.QUEUED, Status.RUNNING)


class Phase(StrEnum):
    """What a running job is doing."""

    ENCODING = "encoding"
    DENOISING = "denoising"
    DECODING = "decoding"
    UPLOADING = "uploading"


class Message(BaseModel):
    """Base of all messages: frozen, unknown fields refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Output(Message):
    """How images are encoded. ``quality`` (1 to 100) counts for webp and jpeg."""

    format: Literal["png", "webp", "jpeg"] = "png"
    quality: Annotated[int, Field(strict=True, ge=1, le=100)] = 90

    @property
    def content_type(self) -> str:
        return f"image/{self.format}"


CallbackEvent = Literal["job.running", "job.succeeded", "job.failed", "job.cancelled"]


class Callback(Message):
    """Where status callbacks go (POST, signed as in Standard Webhooks) and for which events."""

    url: Annotated[str, Field(max_length=2000)]
    events: tuple[CallbackEvent, ...] = ("job.succeeded", "job.failed", "job.cancelled")

    @field_validator("url")
    @classmethod
    def _http_only(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
            # Reading the port is what makes urlsplit check it.
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            usable = False
        if not usable or parts.username or parts.password:
            raise ValueError("an http:// or https:// URL with a host and without credentials")
        return url


class JobRequest(Message):
    """One prompt job. ``seed`` is drawn at submission when absent; image ``i`` uses ``seed + i``."""

    version: Literal[1] = SCHEMA_VERSION
    model: Annotated[str, Field(min_length=1, max_length=MAX_KEY_CHARS, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")] = "latentline-emoji"
    prompt: Annotated[str, Field(min_length=1, max_length=MAX_PROMPT_CHARS)]
    negative_prompt: Annotated[str, Field(max_length=MAX_PROMPT_CHARS)] = ""
    width: Annotated[int, Field(strict=True, ge=MIN_SIZE_PX, le=MAX_SIZE_PX, multiple_of=SIZE_MULTIPLE_PX)] | None = None
    height: Annotated[int, Field(strict=True, ge=MIN_SIZE_PX, le=MAX_SIZE_PX, multiple_of=SIZE_MULTIPLE_PX)] | None = None
    num_inference_steps: Annotated[int, Field(strict=True, ge=1, le=MAX_STEPS)] = 20
    guidance_scale: Annotated[float, Field(ge=0.0, le=MAX_GUIDANCE)] = 5.0
    scheduler: SchedulerName = "dpmpp_2m"
    seed: Annotated[int, Field(strict=True, ge=0, le=MAX_SEED)] = Field(default_factory=lambda: secrets.randbelow(2**31))
    num_images: Annotated[int, Field(strict=True, ge=1, le=MAX_IMAGES)] = 1
    output: Output = Output()
    callback: Callback | None = None
    priority: Annotated[int, Field(strict=True, ge=0, le=9)] = 5
    """0 is served first, 9 last, as Celery's Redis transport does."""
    deadline_s: Annotated[float, Field(gt=0, le=7 * 86400)] | None = None
    """Seconds after submission at which the job fails with ``deadline_exceeded`` unless it has ended."""
    preview_every: Annotated[int, Field(strict=True, ge=0, le=MAX_STEPS)] = 0
    """Network calls between ``job.preview`` events, each with a small picture of the unfinished images; 0 for none."""
    tenant: Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9._-]+$")] = "default"
    metadata: dict[str, str | int | float | bool | None] = Field(default_factory=dict)
    idempotency_key: Annotated[str, Field(min_length=1, max_length=MAX_KEY_CHARS)] | None = None

    @field_validator("prompt")
    @classmethod
    def _not_blank(cls, prompt: str) -> str:
        if not prompt.strip():
            raise ValueError(f"1 to {MAX_PROMPT_CHARS} characters, not all of them blank")
        return prompt

    @field_validator("prompt", "negative_prompt", "idempotency_key")
    @classmethod
    def _encodable(cls, text: str | None) -> str | None:
        if text is None:
            return None
        if "\x00" in text or any(0xD800 <= ord(c) <= 0xDFFF for c in text):
            raise ValueError("text without NUL characters and lone surrogates")
        return text

    @field_validator("metadata")
    @classmethod
    def _small(cls, metadata: dict[str, Any]) -> dict[str, Any]:
        if any(isinstance(v, float) and not math.isfinite(v) for v in metadata.values()):
            raise ValueError("finite numbers")
        # Written out as it is, so that a lone surrogate is found here (UnicodeEncodeError is a ValueError).
        if len(json.dumps(metadata, ensure_ascii=False).encode()) > MAX_METADATA_BYTES:
            raise ValueError(f"at most {MAX_METADATA_BYTES} bytes as JSON")
        return metadata

    @model_validator(mode="after")
    def _last_seed_in_range(self) -> Self:
        if self.seed + self.num_images - 1 > MAX_SEED:
            raise ValueError(f"seed + num_images - 1 at most {MAX_SEED}")
        return self

    @classmethod
    def parse(cls, data: Any) -> JobRequest:
        """Validate a mapping (or keyword arguments as one).

        Raises:
            InvalidRequest: for the first field that is not acceptable.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise invalid_request(error) from None

    @property
    def cost(self) -> int:
        """Network rows that denoising takes: steps x images, twice with guidance."""
        return self.num_inference_steps * self.num_images * (2 if self.guidance_scale > 1 else 1)

    def fingerprint(self) -> str:
        """What must be equal for two submissions under one idempotency key to be the same."""
        data = self.model_dump(mode="json", exclude={"idempotency_key"}, exclude_unset=True)
        return json.dumps(data, sort_keys=True, separators=(",", ":"))


class ImageRef(Message):
    """One result in the object store; ``url`` is presigned whenever the record is read."""

    key: str
    seed: int
    width: int
    height: int
    content_type: str
    sha256: str
    num_bytes: int
    url: str | None = None


class JobError(Message):
    """Why a job failed: a stable code and a message without internals."""

    code: str
    message: str


class JobRecord(Message):
    """The truth about one job. Times are Unix seconds on the Redis server's clock."""

    id: str
    request: JobRequest
    status: Status
    phase: Phase | None = None
    step: int = 0
    num_steps: int
    queue_position: int | None = None
    """0 is next; only while queued."""
    attempt: int = 0
    worker: str | None = None
    cancel_requested: bool = False
    created_at: float
    started_at: float | None = None
    finished_at: float | None = None
    images: tuple[ImageRef, ...] = ()
    error: JobError | None = None
    timings: dict[str, float] = Field(default_factory=dict)
    """Durations in seconds by phase, and ``shared_steps``: denoise steps that ran together with another job's."""


class JobEvent(Message):
    """One entry of a job's event stream; ``id`` is the Redis stream id that ``Last-Event-ID`` resumes from."""

    id: str
    type: Literal["job.queued", "job.running", "job.progress", "job.preview", "job.succeeded", "job.failed", "job.cancelled"]
    job_id: str
    at: float
    data: dict[str, Any] = Field(default_factory=dict)

    @property
    def terminal(self) -> bool:
        return self.type in ("job.succeeded", "job.failed", "job.cancelled")


class ModelInfo(Message):
    """What a worker announces about a model that it serves."""

    id: str
    family: str
    default_width: int
    default_height: int
    size_multiple: int = SIZE_MULTIPLE_PX
    max_pixels: int
    schedulers: tuple[str, ...] = SCHEDULERS

    def size_of(self, request: JobRequest) -> tuple[int, int]:
        """(width, height) that this model makes for a request.

        Raises:
            InvalidRequest: it does not make that size, or does not offer the scheduler.
        """
        width, height = request.width or self.default_width, request.height or self.default_height
        for name, value in (("width", width), ("height", height)):
            if value % self.size_multiple:
                raise InvalidRequest(name, value, f"a multiple of {self.size_multiple} for model {self.id}")
        if width * height > self.max_pixels:
            raise InvalidRequest("width", width, f"width * height at most {self.max_pixels} for model {self.id}")
        if request.scheduler not in self.schedulers:
            raise InvalidRequest("scheduler", request.scheduler, f"one of: {', '.join(self.schedulers)}")
        return width, height


class Claim(Message):
    """A worker's hold on a job: the record, and the fencing token that only the newest holder has."""

    record: JobRecord
    token: int


def invalid_request(error: ValidationError) -> InvalidRequest:
    """The first problem of a pydantic error as a domain error that names field, value and what is allowed."""
    first = error.errors(include_url=False)[0]
    context = first.get("ctx", {})
    kind = first["type"]
    field = ".".join(str(part) for part in first["loc"]) or "request"
    value = first.get("input")
    known = sorted(JobRequest.model_fields)
    phrases: dict[str, str] = {
        "missing": "a value (the field is required)",
        "extra_forbidden": "only the known fields: " + ", ".join(known),
        "greater_than_equal": f"at least {context.get('ge')}",
        "greater_than": f"more than {context.get('gt')}",
        "less_than_equal": f"at most {context.get('le')}",
        "multiple_of": f"a multiple of {context.get('multiple_of')}",
        "string_too_short": f"at least {context.get('min_length')} character(s)",
        "string_too_long": f"at most {context.get('max_length')} characters",
        "string_pattern_mismatch": f"text that matches {context.get('pattern')}",
        "literal_error": f"one of {context.get('expected')}",
        "model_attributes_type": "a JSON object",
        "model_type": "a JSON object",
        "dict_type": "a JSON object",
    }
    if kind == "missing":
        value = None
    if field.startswith("metadata."):  # a union's errors speak of its first branch only
        field = ".".join(field.split(".")[:2])
        phrases[kind] = "text, a finite number, true, false or null"
    allowed = phrases.get(kind) or str(context.get("error") or first["msg"])
    if kind == "value_error" and field == "request":
        field, value = "seed", value.get("seed") if isinstance(value, dict) else None
    return InvalidRequest(field, value, allowed)
