"""The FastAPI application: health checks, the shape of errors, and the routers of the dialects."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from fastapi_offline import FastAPIOffline
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from latentline import __version__
from latentline.client import AsyncClient
from latentline.errors import LatentlineError
from latentline.settings import Settings

from . import batch, events, fleet, jobs, pictures, session, thumbnails, timelines
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
from .thumbnails import Thumbnails


def create_app(settings: Settings | None = None, client: AsyncClient | None = None, metrics: ApiMetrics | None = None) -> FastAPI:
    """The application.

    Args:
        client: for tests; without it, one is opened when the application starts. Either is closed at its end.
        metrics: where requests are counted; None counts none.
    """
    settings = settings or (client.settings if client else Settings())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.client = client or AsyncClient(settings)
        app.state.access = Access(app.state.client, keys=settings.auth == "keys")
        app.state.streams = Streams(app.state.client)
        app.state.groups = Groups(app.state.client)
        app.state.places = Places(app.state.client)
        app.state.estimates = Estimates(app.state.client)
        app.state.leavers = Leavers(app.state.client)
        app.state.thumbnails = Thumbnails()
        yield
        await app.state.leavers.close()
        await app.state.estimates.close()
        await app.state.places.close()
        await app.state.groups.close()
        await app.state.streams.close()
        await app.state.client.close()

    # The page of /docs comes with its scripts, since a service may stand where the internet cannot be reached.
    app = FastAPIOffline(title="latentline", version=__version__, lifespan=lifespan, docs_url="/docs", redoc_url=None)
    routers = [module.router for module in (jobs, batch, events, pictures, thumbnails, timelines, fleet, session)]
    for router in routers:
        app.include_router(router)
    files = PageFiles()
    app.mount("/page", files, "page")

    @app.get("/", include_in_schema=False)
    async def page(request: Request) -> Response:
        return await files.get_response("index.html", request.scope)

    @app.get("/healthz", tags=["health"], summary="Whether this process is alive")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get(
        "/readyz", tags=["health"], summary="Whether a job would be accepted and run now", responses={503: {"description": "Not ready"}}
    )
    async def readyz(request: Request) -> JSONResponse:
        reasons: list[str] = []
        try:
            if not await request.app.state.client.workers():
                reasons.append("no worker is alive")
        except LatentlineError as error:
            reasons.append(error.message)
        try:
            await request.app.state.client.check_store()
        except LatentlineError as error:
            reasons.append(error.message)
        return JSONResponse({"status": "unavailable" if reasons else "ok", "reasons": reasons}, 503 if reasons else 200)

    complete_document(app, keys=settings.auth == "keys")
    mount_dialects(app, settings)
    app.add_middleware(Methods, routes=[*app.routes, *(route for router in routers for route in router.routes)])
    origins = [origin for origin in settings.cors_origins.split(",") if origin]
    if origins:  # outside of Methods, since it answers a browser's OPTIONS itself
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "HEAD", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "Idempotency-Key", "If-None-Match", "Last-Event-ID", "Range"],
            expose_headers=["Content-Range", "ETag", "Location", "Retry-After"],
            max_age=600,
        )
    if settings.auth == "none":
        message = "this API serves without keys, so the Host header must be localhost or a loopback address"
        app.add_middleware(LoopbackHosts, refusal=error_answer(403, "not_allowed", message))
    handle_problems(app, _render)
    if metrics:
        app.add_middleware(Measured, metrics=metrics)  # the last one, so the outermost: answers of the other middleware count as well
    return app


def error_answer(status: int, code: str, message: str, headers: dict[str, str] | None = None, **more: Any) -> JSONResponse:
    """An error answer. All of them have this shape."""
    return JSONResponse({"error": {"code": code, "message": message, **more}}, status, headers=headers)


def _render(problem: Problem) -> JSONResponse:
    invalid = problem.invalid
    blamed = {"field": invalid.field, "allowed": invalid.allowed} if invalid else {}
    return error_answer(problem.status, problem.code, problem.message, problem.headers, **blamed)
