"""``latentline mcp`` as a process, over either transport."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

import anyio
from mcp import Client, StdioServerParameters

COMMAND = [sys.executable, "-m", "latentline.cli", "mcp"]


def stdio(url: str, arguments: Sequence[str] = ("mcp",)) -> StdioServerParameters:
    """For a client that starts the process itself.

    Args:
        url: of the API.
        arguments: of ``latentline``.
    """
    return StdioServerParameters(command=COMMAND[0], args=[*COMMAND[1:-1], *arguments], env=_environment(url))


@contextlib.contextmanager
def over_http(url: str) -> Iterator[str]:
    """The address of a server over streamable HTTP, for the API at ``url``."""
    server = subprocess.Popen([*COMMAND, "--http", "--port", "0"], env=_environment(url), stderr=subprocess.PIPE, text=True)
    assert server.stderr
    ready = server.stderr.readline()
    assert ready.startswith("ready http://127.0.0.1:"), ready + server.stderr.read()
    yield ready.split()[1]
    server.terminate()
    said = server.stderr.read()
    assert server.wait(20) in (0, -15), said
    assert "Traceback" not in said
    server.stderr.close()


def using(server: Any, mode: Any, use: Callable[[Client], Awaitable[None]]) -> None:
    """Run a coroutine with the unmodified client of a server."""

    async def main() -> None:
        async with Client(server, mode=mode) as client:
            await use(client)

    anyio.run(main)


def _environment(url: str) -> dict[str, str]:
    return os.environ | {"LATENTLINE_URL": url}
