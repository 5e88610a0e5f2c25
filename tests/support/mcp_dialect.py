"""MCP among the dialects: its tools through the unmodified client, over streamable HTTP, with the caller's own key."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Awaitable, Callable
from typing import Any, ClassVar

import anyio
import httpx
import httpx2
from mcp import Client
from mcp.client.streamable_http import streamable_http_client

from latentline.mcp.results import ERROR

from .dialects import NATIVE_WORDS, Speaker


class MCP(Speaker):
    """An answer is the result of a call, as the protocol writes it; its HTTP status says nothing, since a tool error is a result too."""

    name = "mcp"
    waits = True
    words = NATIVE_WORDS
    lacks: ClassVar[dict[str, str]] = {
        "test_bodies_that_are_none": "messages are read by the protocol's library, and what is no message never reaches a tool",
        "test_paths_and_methods_that_are_none": "a tool has no path and no method; the server's one path is the protocol's",
        "test_the_limit_of_waiting": "a call that has waited for long enough is no error: it answers with the job's id, see test_mcp.py",
    }
    at: str = ""
    """The server's address; whoever starts it sets this."""

    def send(self, http: httpx.Client, headers: dict[str, str], body: dict[str, Any]) -> httpx.Response:
        return self._call(headers, "generate_image", body)

    def refused(self, answer: httpx.Response) -> bool:
        return bool(answer.json()["isError"])

    def status(self, code: str, native: int) -> int:
        return 200

    def code(self, answer: httpx.Response) -> str:
        return str(answer.json()["_meta"][ERROR])

    def retry_after_s(self, answer: httpx.Response) -> int:
        found = re.search(r"\(try again in (\d+) s\)", answer.text)
        assert found, answer.text
        return int(found[1])

    def job_id(self, answer: httpx.Response) -> str:
        return str(answer.json()["structuredContent"]["job_id"])

    def pictures(self, http: httpx.Client, answer: httpx.Response, headers: dict[str, str]) -> list[bytes]:
        links = [one["uri"] for one in answer.json()["content"] if one["type"] == "resource_link"]

        async def read(client: Client) -> list[bytes]:
            return [base64.b64decode((await client.read_resource(link)).contents[0].blob) for link in links]  # type: ignore[union-attr]

        return self._with_client(headers, read)

    def blamed(self, answer: httpx.Response) -> str | None:
        result = answer.json()
        (said,) = result["content"]
        assert result["isError"] and said["type"] == "text" and "structuredContent" not in result
        found = re.match(r"([a-z_.]+): (got .*; )?allowed: ", said["text"])
        return found[1] if found else None

    def progress(self, http: httpx.Client, job_id: str, headers: dict[str, str]) -> float:
        async def read(client: Client) -> float:
            (found,) = (await client.read_resource(f"latentline://jobs/{job_id}")).contents
            job = json.loads(found.text)  # type: ignore[union-attr]
            return float(job["step"] / job["num_steps"])

        return self._with_client(headers, read)

    def cancel(self, http: httpx.Client, job_id: str, headers: dict[str, str]) -> None:
        assert not self.refused(self._call(headers, "cancel_job", {"job_id": job_id}))

    def ended(self, answer: httpx.Response) -> str:
        return str(answer.json()["structuredContent"]["status"])

    def sees(self, http: httpx.Client, job_id: str, headers: dict[str, str]) -> bool:
        answer = self._call(headers, "get_image", {"job_id": job_id})
        return not self.refused(answer) and self.job_id(answer) == job_id

    def _call(self, headers: dict[str, str], tool: str, arguments: dict[str, Any]) -> httpx.Response:
        async def call(client: Client) -> httpx.Response:
            result = await client.call_tool(tool, arguments)
            return httpx.Response(200, json=result.model_dump(mode="json", by_alias=True, exclude_none=True))

        return self._with_client(headers, call)

    def _with_client(self, headers: dict[str, str], use: Callable[[Client], Awaitable[Any]]) -> Any:
        async def main() -> Any:
            async with (
                httpx2.AsyncClient(headers=headers, timeout=60, trust_env=False) as http_client,
                Client(streamable_http_client(self.at, http_client=http_client)) as client,
            ):
                return await use(client)

        return anyio.run(main)
