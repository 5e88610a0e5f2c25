"""The HTTP server under the API: uvicorn, with its sockets and its own limits on clients."""

from __future__ import annotations

import os
import socket
import sys
from typing import Any

import uvicorn

from latentline.logs import set_up_logs
from latentline.settings import Settings
from latentline.tracing import open_traces

from .app import create_app
from .auth import check_exposure
from .metrics import serve_api_metrics
from .protocol import PatientProtocol


def serve(settings: Settings, host: str, port: int, fd: int | None, shutdown_s: int) -> None:
    """Serve until the process is told to stop; exits with status 3 if the application does not start.

    Args:
        fd: a listening socket that was inherited, instead of ``host`` and ``port``.
        shutdown_s: seconds that open answers get at the end.

    Raises:
        ConfigurationError: it would serve without keys elsewhere than on loopback, or the port for metrics is taken.
    """
    name = f"api@{socket.gethostname()}:{os.getpid()}"
    set_up_logs(settings.log_format, name)
    listener = None if fd is None else socket.socket(fileno=fd)
    check_exposure(settings, host, listener)
    # Its logs are those of this process: log_config would give them handlers of their own.
    options: dict[str, Any] = {"access_log": False, "log_config": None, "timeout_graceful_shutdown": shutdown_s}
    options |= {"http": PatientProtocol, "ws": "none"}
    metrics = serve_api_metrics(settings) if settings.metrics_port else None
    traces = open_traces("api", name)
    application = create_app(settings, metrics=metrics, traces=traces)
    server = uvicorn.Server(uvicorn.Config(application, host=host, port=port, **options))
    # uvicorn takes every inherited descriptor for a Unix socket, and asyncio then leaves TCP_NODELAY out, which costs 40 ms an
    # answer on a connection that is kept alive. Python finds the true family of a descriptor by itself.
    server.run(None if listener is None else [listener])
    if traces:
        traces.close()
    if not server.started:
        sys.exit(3)
