"""The tools: generate_image, get_image, list_models, cancel_job. Their parameters have the names of the HTTP API's fields."""

from __future__ import annotations

from typing import Annotated, Any

import anyio
import httpx
from mcp.server.mcpserver import Context
from mcp_types import CallToolResult
from pydantic import BaseModel, Field

from latentline.requests import LORA_NAME, MAX_GUIDANCE, MAX_IMAGES, MAX_LORA_SCALE, MAX_LORAS, MAX_PROMPT_CHARS, MAX_SEED, MAX_STEPS

from .remote import ENDED, Remote
from .results import JobResult, cancel_result, job_result

JobId = Annotated[str, Field(pattern=r"^[A-Za-z0-9-]{1,100}$", description="A job's id, as generate_image has told it.")]
Side = Annotated[int | None, Field(description="Pixels; default: the model's own, see list_models.", examples=[512], ge=64, le=2048)]
JobAnswer = Annotated[CallToolResult, JobResult]
Caller = Context[httpx.AsyncClient, Any]


class LoraChoice(BaseModel, extra="forbid"):
    name: Annotated[str, Field(pattern=LORA_NAME)]
    scale: Annotated[float, Field(ge=-MAX_LORA_SCALE, le=MAX_LORA_SCALE)] = 1.0


class ModelAnswer(BaseModel):
    id: str
    default_width: int
    default_height: int
    size_multiple: int
    max_pixels: int
    default_num_inference_steps: int
    default_guidance_scale: float
    default_scheduler: str
    schedulers: list[str]
    loras: list[str]
    negative_prompts: bool


class ModelAnswers(BaseModel):
    models: list[ModelAnswer]


class Tools:
    """The tools over one API.

    Args:
        key: the API key of whoever sends none of their own.
        wait_s: how long a call waits for a picture: less than the host waits for the call.
        max_bytes: of the pictures of one answer.
    """

    def __init__(self, key: str | None, wait_s: float, max_bytes: int) -> None:
        self._key, self.wait_s, self.max_bytes = key, wait_s, max_bytes

    def remote(self, ctx: Caller) -> Remote:
        """The API for one call. Over HTTP a caller's own key counts; over stdio there is only the one of the environment."""
        own = (ctx.headers or {}).get("authorization")
        return Remote(ctx.request_context.lifespan_context, own or (f"Bearer {self._key}" if self._key else None))

    async def generate_image(
        self,
        ctx: Caller,
        prompt: Annotated[
            str, Field(description="What the picture shows.", examples=["a red apple"], min_length=1, max_length=MAX_PROMPT_CHARS)
        ],
        negative_prompt: Annotated[str, Field(description="What it must not show.", max_length=MAX_PROMPT_CHARS)] = "",
        model: Annotated[str | None, Field(description="A model that list_models names.", examples=["latentline-emoji"])] = None,
        width: Side = None,
        height: Side = None,
        num_inference_steps: Annotated[
            int | None, Field(description="More is slower and finer; default: the model's own.", examples=[20], ge=1, le=MAX_STEPS)
        ] = None,
        guidance_scale: Annotated[
            float | None,
            Field(description="How closely it follows the prompt; 1 and below: freely.", examples=[5.0], ge=0, le=MAX_GUIDANCE),
        ] = None,
        scheduler: Annotated[str | None, Field(description="One of the model's own, see list_models.", examples=["euler"])] = None,
        seed: Annotated[int | None, Field(description="The same seed and fields give the same picture.", ge=0, le=MAX_SEED)] = None,
        num_images: Annotated[int, Field(description="Pictures with seeds that count up.", ge=1, le=MAX_IMAGES)] = 1,
        loras: Annotated[
            list[LoraChoice],
            Field(description="Adapters of the model.", examples=[[{"name": "pixelart", "scale": 0.8}]], max_length=MAX_LORAS),
        ] = [],  # noqa: B006 (the schema's default; never changed)
    ) -> JobAnswer:
        """Draw pictures from a text.

        Answers with small pictures and links to the full ones, or, when that takes longer than a call may, with the job's id: the job
        goes on, and get_image gives its pictures. A call that was cut off has made its job all the same: get_image without a job_id
        gives the newest one, so do not ask again. Examples: {"prompt": "a red apple"};
        {"prompt": "a panda", "seed": 7, "num_images": 2, "num_inference_steps": 30}.
        """
        given = {
            "prompt": prompt, "negative_prompt": negative_prompt or None, "model": model, "width": width, "height": height,
            "num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale, "scheduler": scheduler, "seed": seed,
            "num_images": num_images, "loras": [lora.model_dump() for lora in loras] or None,
        }  # fmt: skip
        remote = self.remote(ctx)
        # A host that gives up cancels this call. The job is made all the same, so that what the model then asks for is there.
        with anyio.CancelScope(shield=True):
            job = await remote.submit({name: value for name, value in given.items() if value is not None})
        return await self._answer(ctx, remote, job)

    async def get_image(
        self, ctx: Caller, job_id: Annotated[JobId | None, Field(description="Default: the newest job that generate_image made.")] = None
    ) -> JobAnswer:
        """The pictures of a job that generate_image made; waits for them as generate_image does. Example: {"job_id": "..."}."""
        remote = self.remote(ctx)
        return await self._answer(ctx, remote, await (remote.newest() if job_id is None else remote.job(job_id)))

    async def list_models(self, ctx: Caller) -> ModelAnswers:
        """The models that can be named now, with their sizes, schedulers, adapters and defaults. Example: {}."""
        return ModelAnswers.model_validate({"models": await self.remote(ctx).models()})

    async def cancel_job(self, ctx: Caller, job_id: JobId) -> JobAnswer:
        """End a job whose pictures nobody wants any more. One that has ended stays as it is. Example: {"job_id": "..."}."""
        return cancel_result(await self.remote(ctx).cancel(job_id))

    async def _answer(self, ctx: Caller, remote: Remote, job: dict[str, Any]) -> CallToolResult:
        """A job once it has ended, or as it is when the call has waited for long enough; its steps are told as progress."""
        if job["status"] not in ENDED:
            progress = _Progress(ctx, job)
            job = await remote.follow(job["id"], self.wait_s, progress.show)
            await progress.show(job)  # its last steps may have been told together with its end
        return await job_result(remote, job, self.max_bytes)


class _Progress:
    """The events of a job as progress of the call. The protocol wants each number to be above the one before."""

    def __init__(self, ctx: Caller, job: dict[str, Any]) -> None:
        self._ctx, self._job, self._told = ctx, job, -1

    async def show(self, event: dict[str, Any]) -> None:
        step = event.get("step") if isinstance(event.get("step"), int) else 0
        if step is not None and step > self._told:
            self._told = step
            message = f"job {self._job['id']}: {event.get('phase') or event.get('status') or self._job['status']}"
            await self._ctx.report_progress(step, self._job["num_steps"], message)
