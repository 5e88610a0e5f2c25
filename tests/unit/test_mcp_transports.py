"""The MCP server as a process, over both transports and in both protocol versions: the unmodified client, a real API, the fake worker."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from mcp import Client, MCPError
from mcp_types import ImageContent, ResourceLink
from support.live_api import Live, live_api
from support.mcp_processes import over_http, stdio, using

from latentline.testing import TINY_PNG

PAGE = (Path(__file__).parents[2] / "docs" / "mcp.md").read_text()
CONFIGURATIONS = [json.loads(text) for text in re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)]


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with pytest.MonkeyPatch.context() as monkeypatch, live_api(monkeypatch) as live:
        yield live


@pytest.fixture(scope="module")
def http_server(live: Live) -> Iterator[str]:
    """The address of the server over streamable HTTP."""
    with over_http(str(live.http.base_url)) as address:
        yield address


@pytest.fixture(params=["stdio", "http"])
def server(request: pytest.FixtureRequest, live: Live) -> Any:
    if request.param == "http":
        return request.getfixturevalue("http_server")
    return stdio(str(live.http.base_url), CONFIGURATIONS[0]["mcpServers"]["latentline"]["args"])


def working(live: Live) -> threading.Thread:
    """The fake worker runs the next job, in a thread."""

    def work() -> None:
        while not live.worker.run_all():
            pass

    thread = threading.Thread(target=work)
    thread.start()
    return thread


@pytest.mark.parametrize(("mode", "version"), [("legacy", "2025-11-25"), ("auto", "2026-07-28")])
def test_a_picture_with_progress(live: Live, server: Any, mode: str, version: str) -> None:
    async def use(client: Client) -> None:
        assert client.protocol_version == version
        assert {tool.name for tool in (await client.list_tools()).tools} == {"generate_image", "get_image", "list_models", "cancel_job"}
        models = await client.call_tool("list_models", {})
        assert "latentline-emoji" in [model["id"] for model in models.structured_content["models"]]
        told: list[float] = []

        async def progress(value: float, total: float | None, message: str | None) -> None:
            assert total == 6 and message
            told.append(value)

        arguments = {"prompt": "a red apple", "num_inference_steps": 6, "seed": 3}
        worker = working(live)
        result = await client.call_tool("generate_image", arguments, progress_callback=progress)
        worker.join()
        assert not result.is_error, result.content
        (picture,) = [one for one in result.content if isinstance(one, ImageContent)]
        assert picture.mime_type == "image/webp"
        assert len(told) >= 2 and told == sorted(set(told)) and told[-1] == 6
        (link,) = [one for one in result.content if isinstance(one, ResourceLink)]
        (full,) = (await client.read_resource(link.uri)).contents
        assert base64.b64decode(full.blob) == TINY_PNG  # type: ignore[union-attr]

    using(server, mode, use)


def test_a_time_out_and_a_cancel(live: Live, http_server: str) -> None:
    """What the client gives up goes on, and is there when the model asks for it; what the model cancels ends.

    Over stdio too: ``tests/integration/test_mcp_client.py``.
    """

    async def use(client: Client) -> None:
        with pytest.raises(MCPError):
            await client.call_tool("generate_image", {"prompt": "a panda", "seed": 1}, read_timeout_seconds=1.5)
        (job, *_) = live.http.get("/v1/jobs").json()["jobs"]
        assert job["request"]["seed"] == 1 and job["status"] == "queued" and not job["cancel_requested"]
        worker = working(live)
        result = await client.call_tool("get_image", {})
        worker.join()
        assert (result.structured_content["status"], result.structured_content["job_id"]) == ("succeeded", job["id"])

        begun = anyio.Event()

        async def progress(value: float, total: float | None, message: str | None) -> None:
            begun.set()

        async def generate() -> None:
            result = await client.call_tool("generate_image", {"prompt": "a panda"}, progress_callback=progress)
            assert result.is_error and "was cancelled" in str(result.content)

        async with anyio.create_task_group() as calls:
            calls.start_soon(generate)
            await begun.wait()
            (newest,) = live.http.get("/v1/jobs", params={"limit": 1}).json()["jobs"]
            ended = await client.call_tool("cancel_job", {"job_id": newest["id"]})
            assert ended.structured_content["status"] == "cancelled"

    using(http_server, "auto", use)
    while live.worker.take():  # the wake-up of what was cancelled
        pass


def test_the_configurations_of_the_docs_are_those_that_run_here() -> None:
    claude, cursor, code = CONFIGURATIONS
    host = claude["mcpServers"]["latentline"]
    assert host["command"] == "latentline" and host["args"] == ["mcp"] and set(host["env"]) == {"LATENTLINE_URL", "LATENTLINE_API_KEY"}
    assert code["servers"]["latentline"] == {"type": "stdio", **host}
    assert cursor["mcpServers"]["latentline"]["url"].endswith("/mcp")
    assert cursor["mcpServers"]["latentline"]["headers"]["Authorization"].startswith("Bearer ll_")


def test_the_snippet_of_the_docs(live: Live, http_server: str, capsys: pytest.CaptureFixture[str]) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    worker = working(live)
    exec(compile(snippet.replace("http://127.0.0.1:8765/mcp", http_server), "docs/mcp.md", "exec"), {"__name__": "snippet"})
    worker.join()
    assert capsys.readouterr().out == "['text', 'image', 'resource_link']\n"
