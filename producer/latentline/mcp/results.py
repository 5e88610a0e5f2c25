"""What a tool answers about a job: a sentence, small pictures, links to the full ones, and the same as structured content."""

from __future__ import annotations

import base64
from typing import Any

import anyio.to_thread
from mcp_types import CallToolResult, ContentBlock, ImageContent, ResourceLink, TextContent
from pydantic import BaseModel

from .pictures import for_chat
from .remote import ENDED, Remote

ERROR = "latentline/error"
"""In the ``_meta`` of a tool error: its code, as the HTTP API and its dialects have it."""


def refusal(message: str, code: str) -> CallToolResult:
    """A tool error: a sentence for the model, and a code for programs."""
    return CallToolResult(content=[TextContent(text=message)], is_error=True, _meta={ERROR: code})


class Picture(BaseModel):
    seed: int
    width: int
    height: int
    url: str
    """Of the full picture; signed, and valid for a while."""
    resource: str
    """The full picture as a resource of this server."""


class JobResult(BaseModel):
    job_id: str
    status: str
    step: int
    num_steps: int
    queue_position: int | None
    pictures: list[Picture]
    error: str | None


async def job_result(remote: Remote, job: dict[str, Any], max_bytes: int) -> CallToolResult:
    """A job as it is now; with its pictures once it has succeeded, all of them in so many bytes before base64."""
    result = _structured(job)
    content: list[ContentBlock] = [TextContent(text=_sentence(job, result))]
    if job["status"] not in ENDED:
        content.append(ResourceLink(name=f"job {result.job_id}", uri=f"latentline://jobs/{result.job_id}", mime_type="application/json"))
    for number, (picture, image) in enumerate(zip(result.pictures, job["images"], strict=True)):
        data = await remote.picture(result.job_id, number)
        small, kind = await anyio.to_thread.run_sync(for_chat, data, max_bytes // len(result.pictures))
        content.append(ImageContent(data=base64.b64encode(small).decode(), mime_type=kind))
        name = f"picture {number} of job {result.job_id}, full size"
        content.append(ResourceLink(name=name, uri=picture.resource, mime_type=image["content_type"], size=len(data)))
    meta = {ERROR: f"job_{job['status']}"} if job["status"] in ("failed", "cancelled") else None
    return CallToolResult(content=content, structured_content=result.model_dump(), is_error=meta is not None, _meta=meta)


def cancel_result(job: dict[str, Any]) -> CallToolResult:
    result = _structured(job)
    if job["status"] in ENDED:
        said = f"Job {result.job_id} has ended: {result.status}."
    else:
        said = f"Job {result.job_id} ends before its next step."
    return CallToolResult(content=[TextContent(text=said)], structured_content=result.model_dump())


def _structured(job: dict[str, Any]) -> JobResult:
    pictures = [
        Picture(
            seed=image["seed"], width=image["width"], height=image["height"], url=image["url"],
            resource=f"latentline://jobs/{job['id']}/images/{number}.{image['content_type'].removeprefix('image/')}",
        )
        for number, image in enumerate(job["images"])
    ]  # fmt: skip
    error = f"{job['error']['code']}: {job['error']['message']}" if job["error"] else None
    fields = {name: job[name] for name in ("status", "step", "num_steps", "queue_position")}
    return JobResult(job_id=job["id"], pictures=pictures, error=error, **fields)


def _sentence(job: dict[str, Any], result: JobResult) -> str:
    job_id = result.job_id
    if result.status == "succeeded":
        lines = [f"seed {one.seed}, {one.width}x{one.height}, full size: {one.url}" for one in result.pictures]
        warned = [f"Warning: {warning['message']}" for warning in job.get("warnings", [])]
        return "\n".join([f"Job {job_id} succeeded with model {job['request']['model']}.", *lines, *warned])
    if result.status in ENDED:
        return f"Job {job_id} {'failed' if result.status == 'failed' else 'was cancelled'}" + (f": {result.error}" if result.error else ".")
    if result.queue_position is not None:
        where = f"waits at position {result.queue_position} of its queue"
    else:
        where = f"is at step {result.step} of {result.num_steps}"
    return f'Job {job_id} is not ready yet: it {where}. It goes on; get its picture with get_image(job_id="{job_id}").'
