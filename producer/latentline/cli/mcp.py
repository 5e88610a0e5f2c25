"""The MCP server for agents: ``latentline mcp``."""

from __future__ import annotations

import os
import socket

import click

from latentline.keys import Credential
from latentline.terminal import note

from .errors import EXIT_BAD_INPUT, fail
from .extras import load
from .options import url_option


@click.command()
@url_option
@click.option("--http", is_flag=True, help="Serve streamable HTTP at /mcp; without it, stdin and stdout.")
@click.option("--host", default="127.0.0.1", show_default=True, help="With --http.")
@click.option("--port", type=click.IntRange(0, 65535), default=8765, show_default=True, help="With --http; 0: any free one.")
@click.option("--allow-host", "allowed_hosts", multiple=True, help="A Host header to accept besides this machine's; may be repeated.")
@click.option(
    "--wait", "wait_s", type=click.FloatRange(0, 600), default=45.0, show_default=True, envvar="LATENTLINE_MCP_WAIT_S",
    help="Seconds that a call waits for its picture: less than the host waits for the call.",
)  # fmt: skip
@click.option(
    "--max-bytes", type=click.IntRange(10_000, 10_000_000), default=400_000, show_default=True, envvar="LATENTLINE_MCP_MAX_BYTES",
    help="Of the pictures of one answer.",
)  # fmt: skip
def mcp(url: str, http: bool, host: str, port: int, allowed_hosts: tuple[str, ...], wait_s: float, max_bytes: int) -> None:
    """Serve the tools generate_image, get_image, list_models and cancel_job to agents (docs/mcp.md).

    The tools call the API at --url (LATENTLINE_URL) with the key in LATENTLINE_API_KEY.
    """
    server = load("latentline.mcp.server", "latentline mcp", "mcp")
    key = os.environ.get("LATENTLINE_API_KEY", "").strip() or None
    if key and Credential.parse(key) is None:
        fail("LATENTLINE_API_KEY: this is no API key; allowed: ll_..., as latentline keys create shows it", EXIT_BAD_INPUT)
    if not url.startswith(("http://", "https://")):
        fail(f"--url: got {url!r}; allowed: http://HOST:PORT or https://HOST", EXIT_BAD_INPUT, field="--url")
    made = server.create_server(url, key, wait_s, max_bytes)
    if not http:
        server.serve_stdio(made)
        return
    try:
        listener = socket.create_server((host, port))
    except OSError as error:
        fail(f"--host, --port: {host}:{port} cannot be opened: {error.strerror}", EXIT_BAD_INPUT)
    with listener:
        note(f"ready http://{host}:{listener.getsockname()[1]}/mcp")
        server.serve_http(made, url, key, host, listener, allowed_hosts)
