"""MCP's own client, unmodified, against the whole stack: over both transports."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Iterator
from typing import Any

import anyio
import httpx
import pytest
from mcp import Client, MCPError
from mcp_types import ImageContent, ResourceLink
from PIL import Image
from support.jobs import SIDE
from support.mcp_processes import over_http, stdio, using

from latentline_worker.embedded.stack import Stack

PATIENCE_S = 60
SEED = 110


@pytest.fixture(scope="module")
def http_server(stack: Stack) -> Iterator[str]:
    with over_http(stack.url) as address:
        yield address


@pytest.fixture(params=["stdio", "http"])
def server(request: pytest.FixtureRequest, stack: Stack) -> Any:
    return request.getfixturevalue("http_server") if request.param == "http" else stdio(stack.url)


def test_pictures_progress_a_time_out_and_a_cancel(http: httpx.Client, server: Any) -> None:
    async def use(client: Client) -> None:
        await pictures_with_progress(client)
        await a_call_that_is_given_up_and_a_cancel(client, http)

    using(server, "auto", use)


async def pictures_with_progress(client: Client) -> None:
    told: list[float] = []

    async def progress(value: float, total: float | None, message: str | None) -> None:
        assert total == 20
        told.append(value)

    arguments = {"prompt": "a red apple", "num_inference_steps": 20, "num_images": 2, "seed": 3, "loras": [{"name": "one"}]}
    result = await client.call_tool("generate_image", arguments, progress_callback=progress)
    small = [one for one in result.content if isinstance(one, ImageContent)]
    assert len(small) == 2 and {Image.open(io.BytesIO(base64.b64decode(one.data))).size for one in small} == {(SIDE, SIDE)}
    assert len(told) >= 3 and told == sorted(set(told)) and told[-1] == 20
    links = [one for one in result.content if isinstance(one, ResourceLink)]
    for link, picture in zip(links, result.structured_content["pictures"], strict=True):
        (full,) = (await client.read_resource(link.uri)).contents
        by_url = httpx.get(picture["url"]).content  # as a browser opens it, without a key
        assert base64.b64decode(full.blob) == by_url and Image.open(io.BytesIO(by_url)).format == "PNG"  # type: ignore[union-attr]


async def a_call_that_is_given_up_and_a_cancel(client: Client, http: httpx.Client) -> None:
    """The job of a call that timed out goes on, and the model can ask for it; what the model cancels ends."""
    arguments = {"prompt": "a panda", "num_inference_steps": 150, "num_images": 10, "seed": SEED}
    with pytest.raises(MCPError):
        await client.call_tool("generate_image", arguments, read_timeout_seconds=1.0)
    job = await anyio.to_thread.run_sync(given_up, http)
    goes_on, ended = anyio.Event(), []

    async def progress(value: float, total: float | None, message: str | None) -> None:
        if value > job["step"]:
            goes_on.set()

    async def ask() -> None:
        ended.append(await client.call_tool("get_image", {}, progress_callback=progress))

    async with anyio.create_task_group() as calls:
        calls.start_soon(ask)
        await goes_on.wait()
        said = await client.call_tool("cancel_job", {"job_id": job["id"]})
        assert not said.is_error and said.structured_content["job_id"] == job["id"]
    (result,) = ended
    assert result.is_error and result.structured_content["status"] == "cancelled" and "was cancelled" in str(result.content)


def given_up(http: httpx.Client) -> dict[str, Any]:
    """The job of a call that was given up, perhaps before the job was made."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        (job,) = http.get("/v1/jobs", params={"limit": 1}).json()["jobs"]
        if job["request"]["seed"] == SEED and job["status"] in ("queued", "running"):
            assert not job["cancel_requested"]
            return dict(job)
        assert time.monotonic() < deadline
        time.sleep(0.05)
