"""What went wrong with a request, whichever way it went wrong, and how an application answers it in its own shape."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from latentline.errors import InvalidRequest, LatentlineError
from latentline.requests import allowed_by

log = logging.getLogger(__name__)

HTTP_CODES = {
    404: "not_found", 405: "method_not_allowed", 408: "request_timeout", 413: "body_too_large", 415: "unsupported_media_type",
    416: "range_not_satisfiable",
}  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """Why a request is not answered as asked. The codes are the same in every dialect; how they are written is the dialect's."""

    status: int
    code: str
    message: str
    headers: dict[str, str] = field(default_factory=dict)
    invalid: InvalidRequest | None = None
    """The field, its value and what is allowed, where a field is to blame."""


Render = Callable[[Problem], Response]


def handle_problems(app: FastAPI, render: Render) -> None:
    """Answer every error of an application with what ``render`` makes of it."""

    async def handle(request: Request, error: Exception) -> Response:
        return render(problem_of(request, error))

    for kind in (LatentlineError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, handle)


def problem_of(request: Request, error: Exception) -> Problem:
    """Any error as what its client is told of it."""
    if isinstance(error, LatentlineError):
        return _domain_problem(error)
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        parameter = [part for part in first["loc"] if isinstance(part, str)][-1]  # of a list of values, the place in it follows
        return _domain_problem(InvalidRequest(parameter, first.get("input"), allowed_by(first)))
    if isinstance(error, HTTPException):
        return _http_problem(request, error)
    log.error("%s %r failed", request.method, request.url.path[:200], exc_info=error)  # quoted: a path may hold line ends
    # uvicorn closes the connection after an error that the application let through: a client that did not know would use it again.
    return Problem(500, "internal_error", "the server failed on this request; its log has the details", {"Connection": "close"})


def _domain_problem(error: LatentlineError) -> Problem:
    headers = {"Retry-After": str(error.retry_after_s)} if error.retry_after_s is not None else {}
    if error.http_status == 401:
        headers["WWW-Authenticate"] = 'Bearer realm="latentline"'
    return Problem(error.http_status, error.code, error.message, headers, error if isinstance(error, InvalidRequest) else None)


def _http_problem(request: Request, error: HTTPException) -> Problem:
    headers: dict[str, Any] = dict(error.headers or {})
    if error.status_code == 405 and (allow := request.scope["latentline.allow"]()):  # the router names those of one route only
        headers["Allow"] = allow
    path = request.url.path
    shown = path if len(path) <= 100 else path[:97] + "..."
    code = HTTP_CODES.get(error.status_code, "http_error")
    return Problem(error.status_code, code, f"{request.method} {shown}: {error.detail}", headers)
