"""The MCP server over stdio or streamable HTTP."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import httpx
import uvicorn
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ResourceError, ToolError, UnexpectedToolError
from mcp.server.transport_security import TransportSecuritySettings
from mcp_types import CallToolResult, InputRequiredResult, ToolAnnotations
from pydantic import ValidationError

from latentline import __version__
from latentline.errors import ConfigurationError, InvalidRequest
from latentline.requests import allowed_by

from .remote import TIMEOUT_S, Refused
from .results import refusal
from .tools import Caller, Tools

INSTRUCTIONS = """Draws pictures from text on a latentline service. generate_image answers with the pictures, or with a job's id when they
take longer than a call may: then call get_image with it. After a call that timed out, call get_image without a job_id; do not generate
again, since the job goes on and is paid for. list_models says what can be asked for."""
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


class Server(MCPServer[httpx.AsyncClient]):
    """An MCP server whose errors about arguments say which one, what it was and what is allowed."""

    async def call_tool(
        self, name: str, arguments: dict[str, Any], context: Context[httpx.AsyncClient, Any] | None = None
    ) -> CallToolResult | InputRequiredResult:
        known = next((tool.input_schema["properties"] for tool in await self.list_tools() if tool.name == name), None)
        if known is not None and (unknown := sorted(arguments.keys() - known.keys())):
            message = f"{unknown[0][:80]}: {name} has no such argument; allowed: {', '.join(known) or 'none'}"
            return refusal(message, InvalidRequest.code)
        try:
            return await super().call_tool(name, arguments, context)
        except ToolError as error:
            cause = error.__cause__
            if isinstance(cause, ValidationError):
                return refusal(_blamed(cause), InvalidRequest.code)
            if isinstance(cause, Refused):
                return refusal(str(cause), cause.code)
            if isinstance(cause, ToolError) and not isinstance(error, UnexpectedToolError):
                raise ToolError(str(cause)) from None  # without the words that the library puts before it
            raise


def _blamed(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"]) or "arguments"
    got = "" if first["type"] == "missing" else f"got {str(first['input'])[:80]!r}; "
    return f"{field}: {got}allowed: {allowed_by(first)}"


def create_server(url: str, key: str | None, wait_s: float, max_bytes: int) -> Server:
    """The server with its tools and resources.

    Args:
        url: of the HTTP API.
        key: the API key of callers who send none of their own; None without one.
        wait_s, max_bytes: see :class:`Tools`.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: MCPServer[httpx.AsyncClient]) -> AsyncIterator[httpx.AsyncClient]:
        async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S) as http:
            yield http

    server = Server("latentline", instructions=INSTRUCTIONS, version=__version__, log_level="WARNING", lifespan=lifespan)
    tools = Tools(key, wait_s, max_bytes)
    reads = ToolAnnotations(read_only_hint=True, open_world_hint=False)
    server.add_tool(
        tools.generate_image,
        title="Draw a picture",
        annotations=ToolAnnotations(read_only_hint=False, destructive_hint=False, open_world_hint=False),
    )
    server.add_tool(tools.get_image, title="Get a job's pictures", annotations=reads)
    server.add_tool(tools.list_models, title="List models", annotations=reads)
    server.add_tool(
        tools.cancel_job,
        title="Cancel a job",
        annotations=ToolAnnotations(read_only_hint=False, destructive_hint=True, idempotent_hint=True, open_world_hint=False),
    )
    _add_resources(server, tools)
    return server


def _add_resources(server: Server, tools: Tools) -> None:
    for kind in ("png", "webp", "jpeg"):

        async def picture(job_id: str, number: str, ctx: Caller) -> bytes:
            with _as_resource_error():
                return await tools.remote(ctx).picture(job_id, number)

        uri = f"latentline://jobs/{{job_id}}/images/{{number}}.{kind}"
        server.resource(uri, name=f"picture-{kind}", description="A picture of a job, full size.", mime_type=f"image/{kind}")(picture)

    @server.resource("latentline://jobs/{job_id}", name="job", description="A job as it is now.", mime_type="application/json")
    async def job(job_id: str, ctx: Caller) -> dict[str, Any]:
        with _as_resource_error():
            return await tools.remote(ctx).job(job_id)


@contextlib.contextmanager
def _as_resource_error() -> Iterator[None]:
    try:
        yield
    except ToolError as error:
        raise ResourceError(str(error)) from None


def serve_stdio(server: Server) -> None:
    """Serve the process's stdin and stdout, until stdin ends."""
    server.run("stdio")


def serve_http(server: Server, url: str, key: str | None, host: str, listener: socket.socket, allowed_hosts: Sequence[str]) -> None:
    """Serve streamable HTTP at ``/mcp`` until the process is told to stop.

    Args:
        listener: the listening socket.
        allowed_hosts: Host headers to accept besides those of this machine, where a proxy stands before it.

    Raises:
        ConfigurationError: others than this machine could use the API without a key of their own.
    """
    if not is_loopback(host):
        _check_exposure(url, key, host)
    security = TransportSecuritySettings(
        enable_dns_rebinding_protection=is_loopback(host),
        allowed_hosts=[*(f"{name}:*" for name in LOOPBACK), *allowed_hosts],
        allowed_origins=[f"http://{name}:*" for name in LOOPBACK],
    )
    app = server.streamable_http_app(host=host, transport_security=security)
    uvicorn.Server(uvicorn.Config(app, access_log=False, ws="none", log_level="warning")).run([listener])


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_exposure(url: str, key: str | None, host: str) -> None:
    if key:
        raise ConfigurationError(
            f"LATENTLINE_API_KEY is for this machine alone, and this serves on {host or 'every address'}: "
            "unset it, and each client sends its own key as Authorization: Bearer ll_..."
        )
    try:
        status = httpx.get(f"{url.rstrip('/')}/v1/models", timeout=TIMEOUT_S).status_code
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ConfigurationError(f"{url} does not answer ({type(error).__name__}), so it is not known whether it wants keys") from None
    if status != 401:
        raise ConfigurationError(f"{url} serves without keys, so whoever reaches {host} could use it: use 127.0.0.1")
