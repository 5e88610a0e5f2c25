"""What a client may ask for: the request as it is submitted, and every limit on it.

Strict on purpose: an unknown field or value raises :class:`latentline.errors.InvalidRequest`, which names the field, the value
and what is allowed. What is stored afterwards is :class:`latentline.jobs.ResolvedRequest`, which readers of any version accept.
"""

from __future__ import annotations

import hashlib
import json
import math
import secrets
from typing import Annotated, Any, Final, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from .errors import InvalidRequest

SCHEMA_VERSION: Final = 1

# Limits of a request. A model may allow less: its announcement says so.
MAX_PROMPT_CHARS = 32_000
FIRST_PROMPT_CHARS = 2000  # the limit of version 0.1.0
MIN_SIZE_PX = 64
MAX_SIZE_PX = 2048
SIZE_MULTIPLE_PX = 8  # latents must come out whole: the autoencoder of Stable Diffusion makes one of 8 pixels
MAX_STEPS = 150
MAX_GUIDANCE = 30.0
MAX_IMAGES = 10
MAX_LORAS = 8
MAX_LORA_SCALE = 10.0
MODEL_NAME = r"^[A-Za-z0-9][A-Za-z0-9._/-]*$"
LORA_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
MAX_SEED = 2**32 - 1  # the last image's seed is seed + num_images - 1, and stays below 2**32
MAX_METADATA_BYTES = 4096
MAX_JPEG_TEXT_BYTES = 56_000  # of the prompts as JSON in ASCII: a JPEG has 64 KiB for what its file says of itself
MAX_KEY_CHARS = 200
MAX_BODY_BYTES = 256 * 1024  # of a submission over HTTP

DEFAULT_RETENTION_S = 7 * 86400  # how long an ended job's record and images are kept where no setting says otherwise


def _whole(value: Any) -> Any:
    """JSON has one kind of number: 432.0 is the integer 432 to its schema, and so it is here."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = BeforeValidator(_whole)
Side = Annotated[int, Field(strict=True, ge=MIN_SIZE_PX, le=MAX_SIZE_PX, multiple_of=SIZE_MULTIPLE_PX), Whole]
Steps = Annotated[int, Field(strict=True, ge=1, le=MAX_STEPS), Whole]
Guidance = Annotated[float, Field(strict=True, ge=0.0, le=MAX_GUIDANCE)]
Scheduler = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-z0-9_]+$")]
Tenant = Annotated[str, Field(min_length=1, max_length=100, pattern=r"^\.*[A-Za-z0-9_-][A-Za-z0-9._-]*$")]
CallbackEvent = Literal["job.running", "job.succeeded", "job.failed", "job.cancelled"]


class Message(BaseModel):
    """Base of what is stored: frozen, unknown fields are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Submitted(BaseModel):
    """Base of what a client submits: frozen, unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Output(Submitted):
    """How images are encoded. ``quality`` (1 to 100) applies to webp and jpeg."""

    format: Literal["png", "webp", "jpeg"] = "png"
    quality: Annotated[int, Field(strict=True, ge=1, le=100), Whole] = 90


class Callback(Submitted):
    """Where status callbacks go (POST, signed as in Standard Webhooks) and for which events.

    With ``prediction_base``, the URL of an API's ``/replicate/v1``, their body is a prediction as Replicate's API has it, whose own
    URLs stand under this one.
    """

    url: Annotated[str, Field(max_length=2000)]
    events: tuple[CallbackEvent, ...] = ("job.succeeded", "job.failed", "job.cancelled")
    prediction_base: Annotated[str, Field(max_length=2000)] | None = None

    @field_validator("url", "prediction_base")
    @classmethod
    def _http_only(cls, url: str | None) -> str | None:
        if url is None:
            return None
        try:
            parts = urlsplit(url)
            # urlsplit checks the port only when it is read.
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
            # urlsplit drops blanks around a URL and line ends inside of it; what would be sent is another URL then.
            usable = usable and all(" " < character != "\x7f" for character in url)
        except ValueError:
            usable = False
        if not usable or parts.username or parts.password:
            raise ValueError("an http:// or https:// URL with a host, without credentials, blanks and control characters")
        return url


class Lora(Submitted):
    """An adapter of the model (``GET /v1/loras``), and how strongly it acts: 0 not at all, 1 as it was trained."""

    name: Annotated[str, Field(pattern=LORA_NAME)]
    scale: Annotated[float, Field(strict=True, ge=-MAX_LORA_SCALE, le=MAX_LORA_SCALE)] = 1.0


class JobRequest(Submitted):
    """One prompt job, as the client submits it.

    Width, height, steps, guidance scale and scheduler are the model's own defaults where they are left out. ``seed`` is drawn
    at submission when absent; image ``i`` uses ``seed + i``.
    """

    version: Literal[1] = SCHEMA_VERSION
    model: Annotated[str, Field(min_length=1, max_length=MAX_KEY_CHARS, pattern=MODEL_NAME)] = "latentline-emoji"
    prompt: Annotated[str, Field(min_length=1, max_length=MAX_PROMPT_CHARS)]
    negative_prompt: Annotated[str, Field(max_length=MAX_PROMPT_CHARS)] = ""
    width: Side | None = None
    height: Side | None = None
    num_inference_steps: Steps | None = None
    guidance_scale: Guidance | None = None
    scheduler: Scheduler | None = None
    """One of the names that the model announces (``GET /v1/models``)."""
    loras: Annotated[tuple[Lora, ...], Field(max_length=MAX_LORAS)] = ()
    """LoRA adapters for this job alone; jobs with others, or with none, share its batch."""
    seed: Annotated[int, Field(strict=True, ge=0, le=MAX_SEED), Whole] = Field(default_factory=lambda: secrets.randbelow(2**31))
    num_images: Annotated[int, Field(strict=True, ge=1, le=MAX_IMAGES), Whole] = 1
    output: Output = Output()
    callback: Callback | None = None
    priority: Annotated[int, Field(strict=True, ge=0, le=9), Whole] = 5
    """0 is served first, 9 last, as Celery's Redis transport does."""
    deadline_s: Annotated[float, Field(strict=True, gt=0, le=7 * 86400)] | None = None
    """Seconds after submission at which the job fails with ``deadline_exceeded`` unless it has ended."""
    preview_every: Annotated[int, Field(strict=True, ge=0, le=MAX_STEPS), Whole] = 0
    """Network calls between ``job.preview`` events, each with a small picture of the unfinished images; 0 for none."""
    tenant: Tenant = "default"
    """Part of the names of pictures, where ``.`` and ``..`` would be paths."""
    metadata: dict[str, str | int | float | bool | None] = Field(default_factory=dict)
    idempotency_key: Annotated[str, Field(min_length=1, max_length=MAX_KEY_CHARS)] | None = None

    @field_validator("version", mode="before")
    @classmethod
    def _no_truth_value(cls, version: Any) -> Any:
        if isinstance(version, bool):  # True equals 1
            raise ValueError(str(SCHEMA_VERSION))
        return version

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

    @field_validator("output")
    @classmethod
    def _prompts_fit_into_the_file(cls, output: Output, info: ValidationInfo) -> Output:
        texts = [info.data.get(name, "") for name in ("prompt", "negative_prompt")]  # without those that were refused themselves
        if output.format == "jpeg" and len(json.dumps(texts)) > MAX_JPEG_TEXT_BYTES:
            raise ValueError(f"png or webp where the prompts have more than {MAX_JPEG_TEXT_BYTES} bytes as JSON")
        return output

    @field_validator("loras")
    @classmethod
    def _each_once(cls, loras: tuple[Lora, ...]) -> tuple[Lora, ...]:
        if len({lora.name for lora in loras}) < len(loras):
            raise ValueError("each adapter once")
        return loras

    @field_validator("metadata")
    @classmethod
    def _small(cls, metadata: dict[str, Any]) -> dict[str, Any]:
        if any(isinstance(v, float) and not math.isfinite(v) for v in metadata.values()):
            raise ValueError("finite numbers")
        # Encoded without ASCII escapes, so that a lone surrogate raises here (UnicodeEncodeError is a ValueError).
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

    def fingerprint(self, **resolved: Any) -> str:
        """What must be equal for two submissions under one idempotency key to be the same: exactly what the client sent.

        Args:
            resolved: fields to count as if the client had sent them.
        """
        data = self.model_dump(mode="json", exclude={"idempotency_key"}, exclude_unset=True) | resolved
        text = json.dumps(data, sort_keys=True, separators=(",", ":"))
        # It is stored twice beside the record. Of texts that version 0.1.0 can have stored too, as they are.
        long = max(len(self.prompt), len(self.negative_prompt)) > FIRST_PROMPT_CHARS
        return hashlib.sha256(text.encode()).hexdigest() if long else text


def invalid_request(error: ValidationError) -> InvalidRequest:
    """The first problem of a pydantic error as a domain error that names field, value and what is allowed."""
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"]) or "request"
    value = None if first["type"] == "missing" else first.get("input")
    allowed = allowed_by(first)
    if field.startswith("metadata."):  # the errors of a union speak of its first branch only
        field = ".".join(field.split(".")[:2])
        allowed = "text, a finite number, true, false or null"
    if first["type"] == "value_error" and field == "request":
        field, value = "seed", value.get("seed") if isinstance(value, dict) else None
    return InvalidRequest(field, value, allowed)


def _group_of(place: tuple[str | int, ...]) -> type[BaseModel]:
    """What the field at this place belongs to: the request, or a group in it."""
    groups: dict[Any, type[BaseModel]] = {"output": Output, "callback": Callback, "loras": Lora}
    return groups.get(place[0], JobRequest) if len(place) > 1 else JobRequest


def allowed_by(problem: Any) -> str:
    """What would have been accepted, as a phrase: for one of the errors that pydantic lists."""
    context = problem.get("ctx", {})
    if problem["type"].startswith("datetime_"):
        return "a date and time such as 2026-11-27T22:00:00Z"
    phrases = {
        "missing": "a value (the field is required)",
        "extra_forbidden": "only the known fields: " + ", ".join(sorted(_group_of(problem["loc"]).model_fields)),
        "greater_than_equal": f"at least {context.get('ge')}",
        "greater_than": f"more than {context.get('gt')}",
        "less_than_equal": f"at most {context.get('le')}",
        "multiple_of": f"a multiple of {context.get('multiple_of')}",
        "string_too_short": f"at least {context.get('min_length')} character(s)",
        "string_too_long": f"at most {context.get('max_length')} characters",
        "string_pattern_mismatch": f"text that matches {context.get('pattern')}",
        "literal_error": f"one of {context.get('expected')}",
        **dict.fromkeys(("model_attributes_type", "model_type", "dict_type"), "a JSON object"),
        **dict.fromkeys(("int_type", "int_parsing", "int_from_float", "int_parsing_size"), "an integer"),
        **dict.fromkeys(("float_type", "float_parsing", "finite_number"), "a finite number"),
        **dict.fromkeys(("tuple_type", "list_type"), "a list"),
        "string_type": "a string",
        "string_unicode": "a string of valid unicode",
    }
    return phrases.get(problem["type"]) or str(context.get("error") or "another kind of value")
