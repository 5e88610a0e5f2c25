"""The routes of the web UI's API."""

from __future__ import annotations

import base64
import contextlib
import time
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Query, Request
from fastapi.security import HTTPBasic
from starlette.datastructures import State
from starlette.responses import JSONResponse, Response

from latentline.api.auth import credential_of
from latentline.api.body import json_object
from latentline.api.dependencies import opened
from latentline.api.dialects import common
from latentline.api.dialects.common import (
    ClientGone,
    body_of,
    dialect_application,
    model_of,
    offered,
    parsed,
    problem_answer,
    submit,
    while_there,
)
from latentline.api.problems import Problem
from latentline.api.service import JobService
from latentline.errors import InvalidRequest, NotAuthenticated
from latentline.infotext import sampler_name
from latentline.jobs import JobRecord
from latentline.keys import Credential
from latentline.settings import Settings

from .answers import progress, render, result, unfinished
from .request import NAMES, Txt2Img
from .schema import Progress, Txt2ImgAnswer, errors

POLL_S = 15.0  # of one wait for events: only how often a listener that hears nothing looks up

# What clients ask for before they draw, or to fill their lists, and what is always empty here.
EMPTY: dict[str, Any] = {
    "scripts": {"txt2img": [], "img2img": []}, "script-info": [], "cmd-flags": {}, "upscalers": [], "latent-upscale-modes": [],
    "sd-vae": [], "hypernetworks": [], "face-restorers": [], "realesrgan-models": [], "prompt-styles": [],
    "embeddings": {"loaded": {}, "skipped": {}}, "memory": {"ram": {}, "cuda": {}},
}  # fmt: skip
NOT_YET = ("img2img", "extra-single-image", "extra-batch-images", "interrogate", "png-info")

_OPTIONS: dict[str, Any] = {"requestBody": {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}}}
_BASIC = Depends(HTTPBasic(auto_error=False, scheme_name="API key as password", description="any user name; the password is an API key"))


def basic_credential(request: Request) -> Credential | None:
    """The key that stands as the password of Basic authentication, or as a Bearer token."""
    given = request.headers.getlist("authorization")
    scheme, _, text = given[0].partition(" ") if len(given) == 1 else ("", "", "")
    if scheme.lower() != "basic":
        return credential_of(request)
    try:
        password = base64.b64decode(text.strip(), validate=True).decode().partition(":")[2]
    except ValueError:
        password = ""
    credential = Credential.parse(password)
    if credential is None:
        raise NotAuthenticated(
            "the password of the Authorization header is not an API key; allowed: any user name, and ll_... as the password"
        )
    return credential


Reading = Annotated[JobService, Depends(opened("read", _BASIC, basic_credential))]
Submitting = Annotated[JobService, Depends(opened("submit", _BASIC, basic_credential))]


def create(state: State, settings: Settings) -> FastAPI:
    """The application of this dialect."""
    router = APIRouter(tags=["web UI"])

    @router.post(
        "/txt2img",
        openapi_extra=body_of(Txt2Img),
        response_model=None,
        responses={200: {"model": Txt2ImgAnswer}, **errors(408, 413, 415, 429, 504)},
    )
    async def txt2img(request: Request, jobs: Submitting) -> Response:
        """Draw pictures and answer with them when they are there. A closed connection cancels nothing, as in the web UI."""
        data = await json_object(request)
        asked = parsed(Txt2Img, data)
        model = await model_of(asked.checkpoint, jobs, settings)
        info = (await jobs.models()).get(model)
        record = await submit(jobs, asked.native(model, info), NAMES, settings)
        try:
            record, previews = await while_there(request, _followed(jobs, record.id))
        except ClientGone:
            return Response(status_code=499)  # nobody reads it
        if problem := unfinished(record):
            return problem_answer(render, problem)
        return JSONResponse(await result(jobs, record, data, asked.ignored(info), previews, asked.send_images))

    @router.get("/progress", response_model=Progress, responses=errors())
    async def get_progress(jobs: Reading, skip_current_image: Annotated[bool, Query()] = False) -> dict[str, Any]:
        """The current job: of the key's tenant, whichever dialect made it, the newest that runs, else the newest that waits."""
        record, count = await _current(jobs)
        image = None
        if record and record.step and not skip_current_image:
            async with jobs.listen(record.id, None) as listener:
                image = next((found[0] for found in [await _newest(listener, 0.0)] if found), None)
        return progress(record, count, image, time.time())

    @router.post("/interrupt", responses=errors())
    @router.post("/skip", responses=errors())
    async def interrupt(jobs: Submitting) -> dict[str, Any]:
        """Cancel the current job, see ``progress``. The request that waits for it is answered with its newest preview."""
        record, _ = await _current(jobs)
        if record:
            await jobs.cancel(record.id)
        return {}

    _add_options(router, settings)
    _add_lists(router, settings)
    return dialect_application("latentline: web UI", state, router, render, [Txt2Img])


def _add_options(router: APIRouter, settings: Settings) -> None:
    @router.get("/options", responses=errors())
    async def get_options(jobs: Reading) -> dict[str, Any]:
        """The settings that have a meaning here."""
        model = await model_of(None, jobs, settings)
        return {"sd_model_checkpoint": model, "sd_checkpoint_hash": None, "samples_format": "png", "CLIP_stop_at_last_layers": 1}

    @router.post("/options", openapi_extra=_OPTIONS, responses=errors(408, 413, 415))
    async def set_options(request: Request, jobs: Submitting) -> None:
        """Nothing is kept between requests: what others share is not one client's to change. A model of this request alone stands in
        ``override_settings``."""
        data = await json_object(request)
        name, model = data.get("sd_model_checkpoint"), await model_of(None, jobs, settings)
        if name is not None and await model_of(str(name).partition(" [")[0], jobs, settings) != model:
            raise InvalidRequest("sd_model_checkpoint", name, f"{model!r} here; another one in override_settings of a request")


def _add_lists(router: APIRouter, settings: Settings) -> None:
    """The routes that list what there is."""

    @router.get("/sd-models", responses=errors())
    async def sd_models(jobs: Reading) -> list[dict[str, Any]]:
        about = {"hash": None, "sha256": None, "config": None}
        return [{"title": name, "model_name": name, "filename": model, **about} for name, model in (await offered(jobs, settings)).items()]

    @router.get("/samplers", responses=errors())
    async def samplers(jobs: Reading) -> list[dict[str, Any]]:
        """Of all models that are served."""
        found = {one: None for model in (await jobs.models()).values() for one in model.schedulers}
        return [{"name": sampler_name(one), "aliases": [one], "options": {}} for one in found]

    @router.get("/schedulers", responses=errors())
    async def schedulers(_: Reading) -> list[dict[str, Any]]:
        about = {"aliases": None, "default_rho": -1.0, "need_inner_model": False}
        return [{"name": name, "label": name.capitalize(), **about} for name in ("automatic", "karras")]

    @router.get("/loras", responses=errors())
    async def loras(jobs: Reading) -> list[dict[str, Any]]:
        found = [(model, name) for model in (await jobs.models()).values() for name in model.loras]
        return [{"name": name, "alias": name, "path": f"{model.id}/{name}", "metadata": {}} for model, name in found]

    @router.post("/refresh-checkpoints", responses=errors())
    @router.post("/refresh-loras", responses=errors())
    async def refresh(_: Reading) -> None:
        """Workers announce their models by themselves."""

    for path, value in EMPTY.items():
        router.add_api_route(f"/{path}", _constant(value), methods=["GET"], name=path, responses=errors())
    for path in NOT_YET:
        router.add_api_route(
            f"/{path}", _refusing(path), methods=["POST"], name=path, status_code=501, response_model=None, responses=errors(501)
        )


def _constant(value: Any) -> Any:
    async def empty(_: Reading) -> Any:
        return value

    return empty


def _refusing(path: str) -> Any:
    async def not_yet(_: Submitting) -> Response:
        return problem_answer(render, Problem(501, "not_implemented", f"{path} is not there yet: latentline takes no pictures as input"))

    return not_yet


async def _current(jobs: JobService) -> tuple[JobRecord | None, int]:
    """The current job, and how many of the newest jobs have not ended."""
    running, _ = await jobs.list("running", None, 50)
    queued, _ = await jobs.list("queued", None, 50)
    return next(iter([*running, *queued]), None), len(running) + len(queued)


async def _followed(jobs: JobService, job_id: str) -> tuple[JobRecord, list[str]]:
    """The record when the job has ended, or after the limit as it is then, and its newest previews as ``data:`` URLs."""
    previews: list[str] = []
    deadline = time.monotonic() + common.WAIT_LIMIT_S
    with contextlib.suppress(TimeoutError):
        async with jobs.listen(job_id, None) as listener:
            while not listener.ended and (left_s := deadline - time.monotonic()) > 0:
                previews = await _newest(listener, min(POLL_S, left_s)) or previews
    return await jobs.get(job_id), previews


async def _newest(listener: Any, wait_s: float) -> list[str]:
    """The newest previews among the next events."""
    found: list[str] = []
    for event in await listener.next(wait_s):
        if event.type == "job.preview":
            found = event.data.get("images") or found
    return found
