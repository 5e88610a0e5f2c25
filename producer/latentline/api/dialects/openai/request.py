"""The body of ``images/generations``: what becomes of each field, by one table."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from latentline.api.dialects.common import size_of
from latentline.models import ModelInfo
from latentline.requests import MAX_IMAGES, MAX_LORAS, MAX_SEED, Guidance, Lora, Scheduler, Steps, Submitted, Whole

# Native field -> this dialect's word for it. What stands on the right is all that an error may name.
NAMES = {
    "model": "model", "prompt": "prompt", "negative_prompt": "negative_prompt", "num_images": "n", "width": "size", "height": "size",
    "num_inference_steps": "steps", "guidance_scale": "guidance", "scheduler": "scheduler", "loras": "loras", "seed": "seed",
    "output": "output_format", "output.format": "output_format", "output.quality": "output_compression", "preview_every": "partial_images",
    "metadata": "user", "metadata.user": "user",
}  # fmt: skip

# Fields without a meaning here: the values with which they ask for nothing, and what to do instead.
IGNORED: dict[str, tuple[tuple[Any, ...], str]] = {
    "background": (("auto", "opaque"), "pictures are opaque"),
    "moderation": (("auto",), "nothing is moderated"),
    "quality": (("auto",), "steps decides"),
    "style": ((), "describe it in the prompt"),
    "complexity": ((), "nothing is planned before drawing"),
    "frame_count": ((), "pictures have one frame"),
    "frame_duration_ms": ((), "pictures have one frame"),
    "svg": ((), "pictures are png, webp or jpeg"),
}


class GenerationRequest(Submitted):
    """``POST images/generations``. A field that is null counts as left out."""

    prompt: str
    model: str | None = None
    n: Annotated[int, Field(strict=True, ge=1, le=MAX_IMAGES), Whole] | None = None
    size: str | None = None
    output_format: Literal["png", "webp", "jpeg"] | None = None
    output_compression: Annotated[int, Field(strict=True, ge=0, le=100), Whole] | None = None
    response_format: Literal["b64_json", "url"] | None = None
    stream: Annotated[bool, Field(strict=True)] | None = None
    partial_images: Annotated[int, Field(strict=True, ge=0, le=3), Whole] | None = None
    user: Annotated[str, Field(max_length=1000)] | None = None
    safety_identifier: Annotated[str, Field(max_length=1000)] | None = None
    background: Literal["transparent", "opaque", "auto"] | None = None
    moderation: Literal["low", "auto"] | None = None
    quality: Literal["low", "medium", "high", "xhigh", "max", "auto", "standard", "hd"] | None = None
    style: Literal["vivid", "natural"] | None = None
    complexity: Literal["low", "medium", "high"] | None = None
    frame_count: Annotated[int, Whole] | None = None
    frame_duration_ms: Annotated[int, Whole] | None = None
    svg: dict[str, Any] | None = None
    # latentline's own: clients send them in extra_body.
    seed: Annotated[int, Field(strict=True, ge=0, le=MAX_SEED), Whole] | None = None
    negative_prompt: str | None = None
    steps: Steps | None = None
    guidance: Guidance | None = None
    scheduler: Scheduler | None = None
    loras: Annotated[tuple[Lora, ...], Field(max_length=MAX_LORAS)] | None = None

    @property
    def end_user(self) -> str | None:
        return self.safety_identifier or self.user or None

    @property
    def warnings(self) -> list[str]:
        """What the request asks for and does not get, a sentence each."""
        found = [
            f"{name} was ignored: {instead}"
            for name, (neutral, instead) in IGNORED.items()
            if (value := getattr(self, name)) is not None and value not in neutral
        ]
        if self.partial_images and not self.stream:
            found.append("partial_images was ignored: it needs stream")
        if self.output_compression is not None and self.output_format in (None, "png"):
            found.append("output_compression was ignored: png is always lossless")
        return found

    def native(self, model: str, info: ModelInfo | None) -> dict[str, Any]:
        """The native request.

        Args:
            model: what the request's ``model`` stands for.
            info: of that model, where the request wants partial images: its steps say how far apart they are.
        """
        width, height = size_of(self.size)
        output: dict[str, Any] = {"format": self.output_format or "png"}
        if self.output_compression is not None:
            output["quality"] = max(1, self.output_compression)
        fields = {
            "model": model,
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "width": width,
            "height": height,
            "num_images": self.n,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            "scheduler": self.scheduler,
            "loras": None if self.loras is None else [lora.model_dump() for lora in self.loras],
            "seed": self.seed,
            "output": output,
            "preview_every": self._preview_every(info),
            "metadata": {"user": self.end_user} if self.end_user else None,
        }
        return {name: value for name, value in fields.items() if value is not None}

    def _preview_every(self, info: ModelInfo | None) -> int | None:
        if not self.stream or not self.partial_images:
            return None
        steps = self.steps or (info.default_num_inference_steps if info else 1)
        return max(1, steps // (self.partial_images + 1))
