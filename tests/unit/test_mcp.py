"""The MCP tools over a real API on loopback, fakeredis and the fake worker; through the unmodified client, in this process."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import anyio
import httpx2
import numpy as np
import pytest
from click.testing import CliRunner
from mcp import Client, MCPError
from mcp.client.streamable_http import streamable_http_client
from mcp_types import CallToolResult, ImageContent, ResourceLink, TextContent
from PIL import Image
from support.live_api import Live, live_api, serving

from latentline import Settings, records
from latentline.cli import main
from latentline.jobs import JobError, JobWarning
from latentline.keys import NewKey
from latentline.mcp.pictures import for_chat
from latentline.mcp.server import create_server

NO_SUCH = "0" * 32


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Iterator[Live]:
    with live_api(monkeypatch) as live:
        yield live


def using(live: Live, use: Callable[[Client], Coroutine[Any, Any, None]], wait_s: float = 30, mode: Any = "auto") -> None:
    """Run a coroutine with a client of the tools, while the fake worker runs whatever waits."""

    async def main() -> None:
        async with Client(create_server(str(live.http.base_url), None, wait_s, 400_000), mode=mode) as client:
            await use(client)

    anyio.run(main)


def working(live: Live) -> threading.Thread:
    """The fake worker runs the next job, in a thread."""

    def work() -> None:
        while not live.worker.run_all():
            pass

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def text(result: CallToolResult) -> str:
    first = result.content[0]
    assert isinstance(first, TextContent)
    return first.text


@pytest.mark.parametrize(
    ("tool", "arguments", "said"),
    [
        ("generate_image", {}, "prompt: allowed: a value (the field is required)"),
        ("generate_image", {"prompt": "x", "width": 4096}, "width: got '4096'; allowed: at most 2048"),
        ("generate_image", {"prompt": "x", "num_images": "many"}, "num_images: got 'many'; allowed: an integer"),
        ("generate_image", {"prompt": "x", "steps": 3}, "steps: generate_image has no such argument; allowed: prompt, negative_prompt, "),
        ("generate_image", {"prompt": "x", "width": 1024, "height": 1024}, "width: got 1024; allowed: width * height at most 65536"),
        ("generate_image", {"prompt": "x", "model": "absent"}, "model: got 'absent'; allowed: one of: latentline-emoji"),
        ("generate_image", {"prompt": "x", "scheduler": "absent"}, "scheduler: got 'absent'; allowed: one of: ddim, "),
        ("generate_image", {"prompt": "x", "loras": [{"name": "../up"}]}, "loras.0.name: got '../up'; allowed: text that matches"),
        ("get_image", {"job_id": "../models"}, "job_id: got '../models'; allowed: text that matches"),
        ("get_image", {"job_id": NO_SUCH}, f"no job '{NO_SUCH}'"),
        ("get_image", {}, "job_id: none was given, and none of the newest jobs was made by generate_image"),
        ("cancel_job", {"job_id": NO_SUCH}, f"no job '{NO_SUCH}'"),
        ("list_models", {"all": True}, "all: list_models has no such argument; allowed: none"),
    ],
)
def test_bad_input_is_a_tool_error_that_names_the_argument(live: Live, tool: str, arguments: dict[str, Any], said: str) -> None:
    async def use(client: Client) -> None:
        result = await client.call_tool(tool, arguments)
        assert result.is_error and text(result).startswith(said), text(result)
        assert "pydantic" not in text(result) and "Traceback" not in text(result)

    using(live, use)
    assert live.http.get("/v1/jobs").json()["jobs"] == []


@pytest.mark.parametrize("mode", ["legacy", "auto"])
def test_a_call_that_takes_too_long_answers_with_the_jobs_id_and_a_link(live: Live, mode: str) -> None:
    async def use(client: Client) -> None:
        result = await client.call_tool("generate_image", {"prompt": "a cat", "num_inference_steps": 2, "seed": 7})
        assert not result.is_error
        job_id = result.structured_content["job_id"]
        assert result.structured_content["status"] == "queued" and f'get_image(job_id="{job_id}")' in text(result)
        (link,) = [one for one in result.content if isinstance(one, ResourceLink)]
        (job,) = (await client.read_resource(link.uri)).contents
        assert json.loads(job.text)["status"] == "queued"  # type: ignore[union-attr]
        for absent in (
            f"latentline://jobs/{NO_SUCH}",
            f"latentline://jobs/{job_id}/images/9.png",
            f"latentline://jobs/{job_id}/images/x.png",
        ):
            with pytest.raises(MCPError, match=r"no job|0 pictures|number"):
                await client.read_resource(absent)
        working(live).join()
        result = await client.call_tool("get_image", {"job_id": job_id})
        assert result.structured_content["pictures"][0]["seed"] == 7
        newest = await client.call_tool("get_image", {})
        assert newest.structured_content["job_id"] == job_id
        (link,) = [one for one in result.content if isinstance(one, ResourceLink)]
        assert link.mime_type == "image/png"
        (full,) = (await client.read_resource(link.uri)).contents
        assert full.blob and full.mime_type == "image/png"  # type: ignore[union-attr]

    using(live, use, wait_s=0.2, mode=mode)


@pytest.mark.parametrize("mode", ["legacy", "auto"])
def test_a_clients_time_out_cancels_nothing(live: Live, mode: str) -> None:
    async def use(client: Client) -> None:
        with pytest.raises(MCPError):
            await client.call_tool("generate_image", {"prompt": "a cat", "num_inference_steps": 2}, read_timeout_seconds=1.5)
        (job,) = live.http.get("/v1/jobs").json()["jobs"]
        assert job["status"] == "queued" and not job["cancel_requested"]
        thread = working(live)
        result = await client.call_tool("get_image", {})
        thread.join()
        assert result.structured_content["status"] == "succeeded" and result.structured_content["job_id"] == job["id"]

    using(live, use, mode=mode)


def test_cancelled_and_failed_jobs_say_so(live: Live) -> None:
    async def use(client: Client) -> None:
        made = await client.call_tool("generate_image", {"prompt": "a cat"})
        job_id = made.structured_content["job_id"]
        cancelled = await client.call_tool("cancel_job", {"job_id": job_id})
        assert text(cancelled) == f"Job {job_id} has ended: cancelled." and not cancelled.is_error
        result = await client.call_tool("get_image", {"job_id": job_id})
        assert result.is_error and text(result) == f"Job {job_id} was cancelled."
        live.worker.fail_with = JobError(code="out_of_memory", message="needs 9 GB")
        made = await client.call_tool("generate_image", {"prompt": "a cat"})
        working(live).join()
        result = await client.call_tool("get_image", {"job_id": made.structured_content["job_id"]})
        assert result.is_error and text(result).endswith("failed: out_of_memory: needs 9 GB")

    using(live, use, wait_s=0.1)


def test_what_the_worker_warns_of_is_told(live: Live) -> None:
    async def use(client: Client) -> None:
        job_id = (await client.call_tool("generate_image", {"prompt": "a cat"})).structured_content["job_id"]
        claim = live.worker.records.claim(live.worker.take() or "", "fake", 30)
        assert claim is not None
        warning = JobWarning(code="prompt_truncated", field="prompt", message="prompt has more tokens than are read")
        live.worker.records.warn(job_id, claim.token, [warning])
        live.worker.finish(claim)
        assert text(await client.call_tool("get_image", {})).endswith("\nWarning: prompt has more tokens than are read")

    using(live, use, wait_s=0.1)


def test_an_api_that_is_away_is_a_sentence(live: Live) -> None:
    async def use(client: Client) -> None:
        live.redis.connected = False
        result = await client.call_tool("generate_image", {"prompt": "a cat"})
        assert result.is_error and text(result) == "the broker does not answer as it should: ConnectionError"

    using(live, use)

    async def main() -> None:
        async with Client(create_server("http://127.0.0.1:9", None, 1, 400_000)) as client:
            result = await client.call_tool("list_models", {})
            assert result.is_error and text(result).startswith("http://127.0.0.1:9 does not answer (ConnectError)")

    anyio.run(main)


def test_tools_have_schemas_with_examples(live: Live) -> None:
    async def use(client: Client) -> None:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert tools.keys() == {"generate_image", "get_image", "list_models", "cancel_job"}
        schema = tools["generate_image"].input_schema
        assert schema["required"] == ["prompt"] and schema["properties"]["prompt"]["examples"] == ["a red apple"]
        assert all("xample" in (tool.description or "") and tool.output_schema for tool in tools.values())
        assert client.instructions and "get_image" in client.instructions
        models = await client.call_tool("list_models", {})
        assert models.structured_content["models"][0]["id"] == "latentline-emoji"

    using(live, use)


@pytest.mark.parametrize("limit", [10_000, 60_000])
@pytest.mark.parametrize("size", [(64, 64), (2048, 1024)])
def test_pictures_for_a_chat_are_bounded(limit: int, size: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)  # what compresses worst
    written = io.BytesIO()
    Image.fromarray(noise).save(written, "PNG")
    data, kind = for_chat(written.getvalue(), limit)
    picture = Image.open(io.BytesIO(data))
    assert len(data) <= limit and kind == "image/webp" and max(picture.size) <= 1024
    assert abs(picture.width / picture.height - size[0] / size[1]) < 0.05
    assert for_chat(data, limit) == (data, kind), "small enough already"


def test_the_command_serves_others_only_where_each_has_a_key(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    url = str(live.http.base_url)

    def refused(*args: str) -> str:
        result = CliRunner().invoke(main, ["mcp", "--url", url, "--http", "--host", "0.0.0.0", "--port", "0", *args])
        assert result.exit_code == 2, result.output
        return result.stderr.splitlines()[-1]

    assert "serves without keys" in refused()
    monkeypatch.setenv("LATENTLINE_API_KEY", "ll_" + "0" * 8)
    assert "this is no API key" in refused()


def test_pictures_that_come_are_images(live: Live) -> None:
    async def use(client: Client) -> None:
        thread = working(live)
        told: list[tuple[float, float | None, str | None]] = []

        async def progress(value: float, total: float | None, message: str | None) -> None:
            told.append((value, total, message))

        arguments = {"prompt": "a cat", "num_inference_steps": 4, "num_images": 2}
        result = await client.call_tool("generate_image", arguments, progress_callback=progress)
        thread.join()
        pictures = [one for one in result.content if isinstance(one, ImageContent)]
        assert len(pictures) == 2 and {one.mime_type for one in pictures} == {"image/webp"}
        values = [value for value, _, _ in told]
        assert values == sorted(set(values)) and values[-1] == 4 and {total for _, total, _ in told} == {4}
        assert all(result.structured_content["job_id"] in (message or "") for _, _, message in told)

    using(live, use)


def test_over_http_each_caller_has_their_own_key(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(auth="keys")
    with live_api(monkeypatch, settings) as live:
        keys = [records.run(live.worker.redis, records.create_key(NewKey.parse(tenant=name)))[0] for name in ("ann", "bob")]
        server = create_server(str(live.http.base_url), None, 0.1, 400_000)
        with serving(server.streamable_http_app()) as (http, _):  # type: ignore[arg-type]

            async def call(key: str | None, tool: str, arguments: dict[str, Any]) -> CallToolResult:
                headers = {"Authorization": f"Bearer {key}"} if key else {}
                async with httpx2.AsyncClient(headers=headers) as http_client:
                    transport = streamable_http_client(str(http.base_url.join("/mcp")), http_client=http_client)
                    async with Client(transport) as client:
                        return await client.call_tool(tool, arguments)

            async def main() -> None:
                made = await call(keys[0], "generate_image", {"prompt": "a cat"})
                job_id = made.structured_content["job_id"]
                assert (await call(keys[0], "get_image", {})).structured_content["job_id"] == job_id
                assert text(await call(keys[1], "get_image", {})).startswith("job_id: none was given")
                assert text(await call(keys[1], "get_image", {"job_id": job_id})).startswith("no job")
                assert "Authorization" in text(await call(None, "list_models", {}))

            anyio.run(main)
            assert http.post("/mcp", headers={"host": "evil.example"}, json={}).status_code == 421
