"""Serves a process's metrics to Prometheus, on a port of their own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, start_http_server

from .errors import ConfigurationError
from .settings import Settings


def serve_metrics(settings: Settings, registry: CollectorRegistry, *, offset: int = 0) -> int | None:
    """Serve ``registry`` from a thread until the process ends, where ``LATENTLINE_METRICS_PORT`` asks for it.

    Args:
        offset: added to the port; of several processes that one command starts, each needs a port of its own.

    Returns:
        the port; None where no metrics are wanted.

    Raises:
        ConfigurationError: the port is taken.
    """
    if not settings.metrics_port:
        return None
    port = settings.metrics_port + offset
    try:
        start_http_server(port, settings.metrics_host, registry)
    except OSError as error:
        raise ConfigurationError(f"LATENTLINE_METRICS_PORT: {settings.metrics_host}:{port} cannot be served: {error.strerror}") from None
    return port
