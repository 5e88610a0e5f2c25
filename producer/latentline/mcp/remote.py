"""The HTTP API as the tools use it. What goes wrong is a tool error, which the model reads and can act on."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import quote

import anyio
import httpx
from httpx_sse import SSEError, aconnect_sse
from mcp.server.mcpserver.exceptions import ToolError

TIMEOUT_S = 10.0
QUIET_S = 45.0  # a stream says something at least every 15 s: one that is silent for so long is dead
AGAIN_S = 0.5  # between the end of a stream and the next try
PICTURE_S = 60.0

ENDED = frozenset(("succeeded", "failed", "cancelled"))
MADE_BY = {"made_by": "latentline mcp"}
"""In the metadata of every job that a tool makes."""

Show = Callable[[dict[str, Any]], Awaitable[None]]  # the data of an event


class Refused(ToolError):
    """What the API refuses, with its code (the table of errors in ``docs/usage.md``)."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


class Unreachable(Refused):
    """The API, or what it needs, does not answer, which may pass."""


class Remote:
    """The API as one key may use it.

    Args:
        http: whose base URL is the API's.
        authorization: the header of every request; None without a key.
    """

    def __init__(self, http: httpx.AsyncClient, authorization: str | None) -> None:
        self._http = http
        self._headers = {"Authorization": authorization} if authorization else {}

    async def call(self, method: str, path: str, **options: Any) -> Any:
        """The JSON of an answer; raises ToolError with what the API says is wrong, in its words, which are the tools' own."""
        answer = await self._request(method, path, **options)
        try:
            return answer.json()
        except ValueError:
            raise ToolError(f"{self._http.base_url} is not a latentline API (its answer is no JSON)") from None

    async def submit(self, body: dict[str, Any]) -> dict[str, Any]:
        job: dict[str, Any] = await self.call("POST", "/v1/jobs", json={**body, "metadata": MADE_BY})
        return job

    async def job(self, job_id: str) -> dict[str, Any]:
        job: dict[str, Any] = await self.call("GET", _path(job_id))
        return job

    async def newest(self) -> dict[str, Any]:
        """The last job that a tool made with this key's tenant."""
        params = {"metadata": [f"{name}:{value}" for name, value in MADE_BY.items()], "limit": 1}
        jobs: list[dict[str, Any]] = (await self.call("GET", "/v1/jobs", params=params))["jobs"]
        if not jobs:
            raise Refused("job_id: none was given, and none of the newest jobs was made by generate_image", "job_not_found")
        return jobs[0]

    async def cancel(self, job_id: str) -> dict[str, Any]:
        job: dict[str, Any] = await self.call("POST", _path(job_id, "/cancel"))
        return job

    async def models(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = (await self.call("GET", "/v1/models"))["models"]
        return found

    async def picture(self, job_id: str, number: int | str) -> bytes:
        """The file of one picture, as the worker wrote it."""
        return (await self._request("GET", _path(job_id, f"/images/{quote(str(number), safe='')}"), timeout=PICTURE_S)).content

    async def follow(self, job_id: str, limit_s: float, show: Show) -> dict[str, Any]:
        """The job when it has ended, or as it is after the limit. Leaving early changes nothing for the job.

        Args:
            show: gets the data of each event.
        """
        with anyio.move_on_after(limit_s):
            await self._until_ended(job_id, show)
        return await self.job(job_id)

    async def _until_ended(self, job_id: str, show: Show) -> None:
        """Return when the job has ended. A stream that breaks is resumed, also over a restart of the API."""
        last: str | None = None
        while True:
            try:
                headers = {**self._headers, **({"Last-Event-ID": last} if last else {})}
                timeout = httpx.Timeout(TIMEOUT_S, read=QUIET_S)
                async with aconnect_sse(self._http, "GET", _path(job_id, "/events"), headers=headers, timeout=timeout) as source:
                    if source.response.status_code == 200:
                        async for event in source.aiter_sse():
                            last = event.id or last
                            await show(event.json() if event.data else {})
                            if event.event.removeprefix("job.") in ENDED:
                                return
                if (await self.job(job_id))["status"] in ENDED:
                    return
            except (httpx.TransportError, SSEError, ValueError, Unreachable):
                pass
            await anyio.sleep(AGAIN_S)

    async def _request(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            answer = await self._http.request(method, path, headers=self._headers, **options)
        except httpx.HTTPError as error:
            message = f"{self._http.base_url} does not answer ({type(error).__name__}); a job that was accepted goes on"
            raise Unreachable(message, "api_unreachable") from None
        if answer.is_error:
            raise _refused(answer)
        return answer


def _path(job_id: str, rest: str = "") -> str:
    return f"/v1/jobs/{quote(job_id, safe='')}{rest}"


def _refused(answer: httpx.Response) -> Refused:
    try:
        message, code = (str(answer.json()["error"][name]) for name in ("message", "code"))
    except (ValueError, KeyError, TypeError):
        message, code = f"the API answered with status {answer.status_code}", "api_unreachable"
    if wait_s := answer.headers.get("retry-after"):
        message += f" (try again in {wait_s} s)"
    return (Unreachable if answer.status_code >= 500 else Refused)(message, code)
