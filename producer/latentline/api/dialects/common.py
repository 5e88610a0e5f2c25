"""What dialects share: the application of one, names and sizes of models, errors in a dialect's own words, waiting for a job."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from fastapi import APIRouter, FastAPI, Request
from pydantic import BaseModel, ValidationError
from starlette.background import BackgroundTask
from starlette.datastructures import State
from starlette.responses import Response

from latentline.api.document import drop_security
from latentline.api.methods import Methods
from latentline.api.problems import Problem, Render, handle_problems
from latentline.api.service import JobService
from latentline.errors import InvalidRequest
from latentline.jobs import JobRecord, JobRequest, Sending
from latentline.requests import allowed_by
from latentline.settings import Settings

WAIT_LIMIT_S = 540.0  # of an answer that waits for its job: clients, and proxies that were told of slow answers, end at 600

# Of every error: its native code, which is the same in every dialect, whatever the dialect calls it.
CODE_HEADER = "Latentline-Error"

DEFAULT_MODEL: str = JobRequest.model_fields["model"].default

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")


class ClientGone(Exception):
    """The client has closed its connection while its job ran."""


def dialect_application(title: str, state: State, router: APIRouter, render: Render, bodies: Sequence[type[BaseModel]] = ()) -> FastAPI:
    """The application of one dialect, to be mounted at its prefix.

    Args:
        state: of the whole API: its client, access, streams and leavers.
        router: the dialect's routes, without the prefix.
        render: writes a problem in the dialect's own shape.
        bodies: what the OpenAPI document has to hold for :func:`body_of`.
    """
    app = FastAPI(title=title, docs_url=None, redoc_url=None)
    app.state = state
    app.include_router(router)
    app.add_middleware(Methods, routes=[*app.routes, *router.routes])
    handle_problems(app, lambda problem: problem_answer(render, problem))
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = generate()
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            for body in bodies:
                schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
                schemas |= {**schema.pop("$defs", {}), body.__name__: schema}
            if not state.access.keys:
                drop_security(document)
        return generate()

    app.openapi = openapi  # type: ignore[method-assign]
    return app


def body_of(model: type[BaseModel]) -> dict[str, Any]:
    """For a route's ``openapi_extra``: its body, which is read by hand, so that FastAPI cannot derive it."""
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def problem_answer(render: Render, problem: Problem) -> Response:
    """A problem in a dialect's shape, with its native code in a header."""
    answer = render(problem)
    answer.headers[CODE_HEADER] = problem.code
    return answer


async def model_of(name: str | None, jobs: JobService, settings: Settings) -> str:
    """The model that a dialect's name stands for.

    A name that is no alias is left as it is: the job service refuses it unless a worker serves it. Without a name it is the bundled
    model, or where that is not served the first model in the order of the alphabet.
    """
    if name is not None:
        return settings.aliases.get(name, name)
    served = sorted(await jobs.models())
    return DEFAULT_MODEL if DEFAULT_MODEL in served or not served else served[0]


async def offered(jobs: JobService, settings: Settings) -> dict[str, str]:
    """Every name that a request may give as its model -> the model that it stands for: those that are served, and their aliases."""
    served = await jobs.models()
    return {name: name for name in served} | {name: model for name, model in settings.aliases.items() if model in served}


def size_of(text: str | None, field: str = "size") -> tuple[int, int] | tuple[None, None]:
    """(width, height) of ``WxH``; (None, None), the model's own size, for ``auto`` and None.

    A size that the model does not make is refused by the job service, not replaced: what comes back is what was asked for.
    """
    if text in (None, "auto"):
        return None, None
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", str(text))
    if not found:
        raise InvalidRequest(field, text, "auto, or WIDTHxHEIGHT in pixels such as 512x512")
    return int(found[1]), int(found[2])


def parsed(model: type[M], data: dict[str, Any]) -> M:
    """A dialect's body as its model; raises InvalidRequest for the first field that is not acceptable, in the model's own names."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        allowed = allowed_by(first)
        if first["type"] == "extra_forbidden" and len(first["loc"]) == 1:
            allowed = "only the known fields: " + ", ".join(sorted(model.model_fields))
        field = ".".join(str(part) for part in first["loc"] if not isinstance(part, int)) or "body"
        raise InvalidRequest(field, None if first["type"] == "missing" else first.get("input"), allowed) from None


async def submit(
    jobs: JobService, data: dict[str, Any], names: Mapping[str, str], settings: Settings, sending: Sending | None = None
) -> JobRecord:
    """Submit a native request for a dialect.

    Args:
        data: the native request.
        names: native field -> the dialect's word for it: errors speak the dialect's words.
        sending: where the client may send the request again: it then gets the job of the earlier sending.
    """
    try:
        return await jobs.submit(data, sending)
    except InvalidRequest as error:
        raise _in_words_of(names, error, settings) from None


def _in_words_of(names: Mapping[str, str], error: InvalidRequest, settings: Settings) -> InvalidRequest:
    """An error of the job service in a dialect's words."""
    native = error.field.partition(".")[0]
    field = names.get(error.field) or names.get(native, native)
    allowed = error.allowed
    if error.field == "model" and settings.aliases:
        allowed += f"; aliases: {', '.join(sorted(settings.aliases))}"
    pattern = r"\b(" + "|".join(map(re.escape, sorted(names, key=len, reverse=True))) + r")\b"
    return InvalidRequest(field, error.value, re.sub(pattern, lambda found: names[found[0]], allowed))


def sending_of(request: Request, jobs: JobService, data: dict[str, Any], count: int) -> Sending:
    """One sending of a request: of this path, with this key and this body.

    Args:
        count: how often the client says that it has sent the request before; 0 for a new one.
    """
    key = jobs.principal.key.prefix if jobs.principal.key else ""
    text = json.dumps([request.url.path, key, data], sort_keys=True, separators=(",", ":"))
    return Sending(hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest(), count)


async def wait(request: Request, jobs: JobService, job_id: str, limit_s: float | None = None) -> JobRecord:
    """The record when the job has ended, or after the limit as it is then.

    Args:
        limit_s: ``WAIT_LIMIT_S`` by default.

    Raises:
        ClientGone: nobody waits for it any more.
    """
    return await while_there(request, jobs.ended(job_id, WAIT_LIMIT_S if limit_s is None else limit_s))


async def while_there(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What ``work`` gives; raises ClientGone, and ends it, when the client closes its connection before."""
    working, gone = asyncio.create_task(work), asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    """Return when the client has closed its connection. For a request whose body was read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def written(jobs: JobService, job_id: str, sending: Sending) -> BackgroundTask:
    """For an answer's ``background``: notes that it went out."""
    return BackgroundTask(jobs.answer_written, job_id, sending)
