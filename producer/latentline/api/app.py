"""The FastAPI application: its routers, its middleware, what the routes share, and the shape of errors."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from fastapi_offline import FastAPIOffline
from starlette.datastructures import State
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from latentline import __version__
from latentline.async_client import AsyncClient
from latentline.settings import Settings

from . import batch, events, fleet, health, jobs, pictures, session, thumbnails, timelines
from .auth import Access, LoopbackHosts
from .dialects import mount_dialects
from .document import complete_document
from .estimates import Estimates
from .groups import Groups
from .leavers import Leavers
from .methods import Methods
from .metrics import ApiMetrics, Measured
from .page import PageFiles
from .places import Places
from .problems import Problem, handle_problems
from .streams import Streams
from .telemetry import telemetry
from .thumbnails import Thumbnails

if TYPE_CHECKING:
    from latentline.tracing.export import Traces

ROUTERS = tuple(module.router for module in (health, jobs, batch, events, pictures, thumbnails, timelines, fleet, session))


def create_app(
    settings: Settings | None = None,
    client: AsyncClient | None = None,
    metrics: ApiMetrics | None = None,
    traces: Traces | None = None,
) -> FastAPI:
    """The application.

    Args:
        client: for tests; without it, one is opened when the application starts. Either is closed at its end.
        metrics: where requests are counted; None counts none.
        traces: where spans of requests go; None makes none.
    """
    settings = settings or (client.settings if client else Settings())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with _services(app.state, settings, client or AsyncClient(settings)):
            yield

    # The page of /docs comes with its scripts, since a service may stand where the internet cannot be reached.
    options: dict[str, Any] = {"lifespan": lifespan, "docs_url": "/docs", "redoc_url": None, "telemetry": telemetry(traces)}
    app = FastAPIOffline(title="latentline", version=__version__, **options)
    app.router.routes.insert(0, jobs.POLL)
    for router in ROUTERS:
        app.include_router(router)
    _add_page(app)
    complete_document(app, keys=settings.auth == "keys")
    mount_dialects(app, settings)
    handle_problems(app, _render)
    _add_middleware(app, settings)
    if metrics:
        app.add_middleware(Measured, metrics=metrics)  # the last one, so the outermost: answers of the other middleware count as well
    return app


@asynccontextmanager
async def _services(state: State, settings: Settings, client: AsyncClient) -> AsyncIterator[None]:
    """What the routes share while the application runs."""
    state.client = client
    state.access = Access(client, keys=settings.auth == "keys")
    state.streams = Streams(client)
    state.groups = Groups(client)
    state.places = Places(client)
    state.estimates = Estimates(client)
    state.leavers = Leavers(client)
    state.thumbnails = Thumbnails()
    yield
    await state.leavers.close()
    await state.estimates.close()
    await state.places.close()
    await state.groups.close()
    await state.streams.close()
    await client.close()


def _add_page(app: FastAPI) -> None:
    files = PageFiles()
    app.mount("/page", files, "page")

    @app.get("/", include_in_schema=False)
    async def page(request: Request) -> Response:
        return await files.get_response("index.html", request.scope)


def _add_middleware(app: FastAPI, settings: Settings) -> None:
    """Each one added is outside of those before it."""
    app.add_middleware(Methods, routes=[*app.routes, *(route for router in ROUTERS for route in router.routes)])
    origins = [origin for origin in settings.cors_origins.split(",") if origin]
    if origins:  # outside of Methods, since it answers a browser's OPTIONS itself
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "HEAD", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "Idempotency-Key", "If-None-Match", "Last-Event-ID", "Range", "Traceparent"],
            expose_headers=["Content-Range", "ETag", "Location", "Retry-After"],
            max_age=600,
        )
    if settings.auth == "none":
        message = "this API serves without keys, so the Host header must be localhost or a loopback address"
        app.add_middleware(LoopbackHosts, refusal=error_answer(403, "not_allowed", message))


def error_answer(status: int, code: str, message: str, headers: dict[str, str] | None = None, **more: Any) -> JSONResponse:
    """An error answer. All of them have this shape."""
    return JSONResponse({"error": {"code": code, "message": message, **more}}, status, headers=headers)


def _render(problem: Problem) -> JSONResponse:
    invalid = problem.invalid
    blamed = {"field": invalid.field, "allowed": invalid.allowed} if invalid else {}
    return error_answer(problem.status, problem.code, problem.message, problem.headers, **blamed)
