"""What FastAPI cannot derive for the OpenAPI document: the request, events, callbacks as webhooks, and headers of answers."""

from __future__ import annotations

from typing import Any, get_args

from fastapi import FastAPI
from pydantic import BaseModel

from latentline.callbacks import CallbackMessage
from latentline.jobs import JobError, JobRequest, JobWarning
from latentline.requests import CallbackEvent

from .answers import ImageAnswer

REF = "#/components/schemas/{model}"


class JobEventData(BaseModel):
    """The data of one server-sent event; its ``event`` is the type, its ``id`` goes into ``Last-Event-ID``.

    Types: job.queued, job.running, job.progress, job.preview, job.succeeded, job.failed, job.cancelled, job.position, job.gone; newer
    workers may send others.
    Fields that do not belong to the type are left out.
    """

    type: str
    job_id: str
    at: float
    seq: int | None = None
    """Orders the events of one job; a job.preview has none."""
    status: str | None = None
    worker: str | None = None
    phase: str | None = None
    step: int | None = None
    num_steps: int | None = None
    batch_jobs: int | None = None
    """Jobs that shared the last step with this one, itself included."""
    delay_s: float | None = None
    reason: str | None = None
    images: list[ImageAnswer | str] | None = None
    """Of job.preview: pictures as data URLs. Of job.succeeded: the results."""
    queue_position: int | None = None
    eta_s: float | None = None
    """Estimated seconds to the job's last step."""
    error: JobError | None = None
    warnings: list[JobWarning] | None = None


def _text(description: str) -> dict[str, Any]:
    return {"description": description, "schema": {"type": "string"}}


RETRY_AFTER = {"Retry-After": {"description": "Seconds after which the same request may be accepted", "schema": {"type": "integer"}}}
OF_STATUS: dict[str, dict[str, Any]] = {
    "401": {"WWW-Authenticate": _text("The scheme: Bearer")},
    "429": RETRY_AFTER,
    "503": RETRY_AFTER,
}
ETAG = {"ETag": _text("Send it back as If-None-Match"), "Cache-Control": _text("For how long the answer may be kept")}
SIGNED = {
    "webhook-id": "The id of the message: the same at every try",
    "webhook-timestamp": "When this try was signed, in Unix seconds",
    "webhook-signature": "One or more of v1,BASE64 with blanks between: HMAC-SHA256 of id.timestamp.body",
}


def complete_document(app: FastAPI, keys: bool) -> None:
    """Let the application's document say what is not in its routes.

    Args:
        keys: whether requests need one; without, no operation asks for it.
    """
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = generate()
            for model in (JobRequest, JobEventData, CallbackMessage):
                # What is sent is described as it is written, what is submitted as it is read.
                mode = "validation" if model is JobRequest else "serialization"
                schema = model.model_json_schema(ref_template=REF, mode=mode)  # type: ignore[arg-type]
                document["components"]["schemas"] = {**schema.pop("$defs", {}), **document["components"]["schemas"], model.__name__: schema}
            document["webhooks"] = {event: {"post": _webhook(event)} for event in get_args(CallbackEvent)}
            for path, item in document["paths"].items():
                for method, operation in item.items():
                    _add_headers(path, method, operation["responses"])
            if not keys:
                drop_security(document)
        return generate()

    app.openapi = openapi  # type: ignore[method-assign]


def drop_security(document: dict[str, Any]) -> None:
    """No operation asks for a key: of an API that serves without."""
    for item in document["paths"].values():
        for operation in item.values():
            operation.pop("security", None)
    document.get("components", {}).pop("securitySchemes", None)


def _webhook(event: str) -> dict[str, Any]:
    parameters = [
        {"name": name, "in": "header", "required": True, "description": meaning, "schema": {"type": "string"}}
        for name, meaning in SIGNED.items()
    ]
    return {
        "summary": f"Told to the URL in a job's `callback`: {event}",
        "description": "Signed as in Standard Webhooks. What is not answered with 2xx within 15 seconds is sent again, for three days. "
        "With `callback.prediction_base` the body is a prediction, as `/replicate/v1` answers it.",
        "operationId": f"told_{event.partition('.')[2]}",
        "parameters": parameters,
        "requestBody": {"required": True, "content": {"application/json": {"schema": {"$ref": REF.format(model="CallbackMessage")}}}},
        "responses": {
            "2XX": {"description": "Received"},
            "410": {"description": "This URL wants no callbacks any more: none is sent to it again"},
        },
    }


def _add_headers(path: str, method: str, responses: dict[str, Any]) -> None:
    for status, answer in responses.items():
        headers = dict(OF_STATUS.get(status, {}))
        if "304" in responses and status in ("200", "206", "304"):
            headers |= ETAG
        if status == "206":
            headers["Content-Range"] = _text("Which bytes these are, of how many")
        if (path, method, status) == ("/v1/jobs", "post", "202"):
            headers["Location"] = _text("Where the job is")
        if headers:
            answer["headers"] = headers | answer.get("headers", {})
        events = answer.get("content", {}).get("text/event-stream")
        if events is not None:
            events["schema"] = {"type": "string", "description": "Server-sent events; the data of each is a JobEventData as JSON"}
            events["x-event-data"] = {"$ref": REF.format(model="JobEventData")}
