"""Health checks: whether this process is alive, and whether a job would be accepted and run now."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from latentline.errors import LatentlineError

router = APIRouter(tags=["health"])


@router.get("/healthz", summary="Whether this process is alive")
async def healthz() -> dict[str, str]:
    return {"status": "ok"}


@router.get("/readyz", summary="Whether a job would be accepted and run now", responses={503: {"description": "Not ready"}})
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
