"""The body of a prediction: what becomes of each field, by one table."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from latentline.api.dialects.common import parsed
from latentline.errors import InvalidRequest
from latentline.predictions import IGNORED
from latentline.requests import MAX_IMAGES, MAX_LORAS, MAX_SEED, Guidance, Lora, Steps, Submitted, Whole

# Native field -> this dialect's word for it.
NAMES = {
    "model": "version", "prompt": "input.prompt", "negative_prompt": "input.negative_prompt", "num_images": "input.num_outputs",
    "width": "input.width", "height": "input.height", "num_inference_steps": "input.num_inference_steps",
    "guidance_scale": "input.guidance_scale", "scheduler": "input.scheduler", "loras": "input.loras", "seed": "input.seed",
    "output": "input.output_format", "output.format": "input.output_format", "output.quality": "input.output_quality",
    "callback": "webhook", "callback.url": "webhook", "callback.events": "webhook_events_filter",
}  # fmt: skip

SCHEDULERS = {
    "DDIM": "ddim", "DPMSolverMultistep": "dpmpp_2m", "HeunDiscrete": "heun", "KarrasDPM": "dpmpp_2m_karras",
    "K_EULER": "euler", "K_EULER_ANCESTRAL": "euler_ancestral", "PNDM": "pndm",
}  # fmt: skip
"""What models on Replicate call schedulers -> the native name. Native names are accepted too."""

EVENTS = {
    "start": ("job.running",),
    "output": ("job.succeeded",),  # all pictures are there at once
    "logs": (),
    "completed": ("job.succeeded", "job.failed", "job.cancelled"),
}
"""An entry of ``webhook_events_filter`` -> the native events."""


class Input(Submitted):
    """``input`` of a prediction. A field that is null counts as left out."""

    prompt: str
    negative_prompt: str | None = None
    width: Annotated[int, Whole] | None = None
    height: Annotated[int, Whole] | None = None
    num_outputs: Annotated[int, Field(strict=True, ge=1, le=MAX_IMAGES), Whole] | None = None
    num_inference_steps: Steps | None = None
    guidance_scale: Guidance | None = None
    scheduler: str | None = None
    seed: Annotated[int, Field(strict=True, ge=0, le=MAX_SEED), Whole] | None = None
    output_format: Literal["png", "webp", "jpg", "jpeg"] | None = None
    output_quality: Annotated[int, Field(strict=True, ge=0, le=100), Whole] | None = None
    loras: Annotated[tuple[Lora, ...], Field(max_length=MAX_LORAS)] | None = None
    apply_watermark: bool | None = None
    disable_safety_checker: bool | None = None
    go_fast: bool | None = None


class PredictionRequest(Submitted):
    """``POST predictions``, and ``POST models/{owner}/{name}/predictions`` without ``version``."""

    version: Annotated[str, Field(max_length=300)] | None = None
    input: dict[str, Any]
    webhook: Annotated[str, Field(max_length=2000)] | None = None
    webhook_completed: Annotated[str, Field(max_length=2000)] | None = None
    webhook_events_filter: tuple[Literal["start", "output", "logs", "completed"], ...] | None = None
    stream: Annotated[bool, Field(strict=True)] | None = None
    """Every prediction has a stream."""

    def parsed_input(self) -> Input:
        """Raises InvalidRequest for the first field that is not acceptable, as ``input.FIELD``."""
        try:
            return parsed(Input, self.input)
        except InvalidRequest as error:
            raise InvalidRequest(f"input.{error.field}", error.value, error.allowed) from None

    def native(self, asked: Input, model: str, base: str) -> dict[str, Any]:
        """The native request.

        Args:
            base: URL of this dialect, as the client reaches it.
        """
        output: dict[str, Any] = {"format": {"jpg": "jpeg", None: "png"}.get(asked.output_format, asked.output_format)}
        if asked.output_quality is not None:
            output["quality"] = max(1, asked.output_quality)
        fields = {
            "model": model,
            "prompt": asked.prompt,
            "negative_prompt": asked.negative_prompt,
            "width": asked.width,
            "height": asked.height,
            "num_images": asked.num_outputs,
            "num_inference_steps": asked.num_inference_steps,
            "guidance_scale": asked.guidance_scale,
            "scheduler": SCHEDULERS.get(asked.scheduler or "", asked.scheduler),
            "loras": None if asked.loras is None else [lora.model_dump() for lora in asked.loras],
            "seed": asked.seed,
            "output": output,
            "callback": self._callback(base),
            "metadata": {"ignored": ",".join(ignored)} if (ignored := sorted(asked.model_fields_set & IGNORED.keys())) else None,
        }
        return {name: value for name, value in fields.items() if value is not None}

    def _callback(self, base: str) -> dict[str, Any] | None:
        url = self.webhook or self.webhook_completed
        if url is None:
            return None
        wanted: tuple[str, ...] = ("start", "completed") if self.webhook else ("completed",)
        if self.webhook and self.webhook_events_filter is not None:
            wanted = self.webhook_events_filter
        events = sorted({event for name in wanted for event in EVENTS[name]})
        return {"url": url, "events": events, "prediction_base": base} if events else None
