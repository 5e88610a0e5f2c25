"""What the body of a status callback holds: written by the process that delivers it, described in the API's OpenAPI document."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from .jobs import JobError, JobWarning, Message


class CallbackImage(Message):
    """A picture in the object store. ``url`` opens it for whoever has it, until ``url_expires_at``.

    Both are null where the deliverer has no credentials of the store.
    """

    key: str
    seed: int
    width: int
    height: int
    content_type: str
    sha256: str
    num_bytes: int
    url: str | None
    url_expires_at: datetime | None


class CallbackData(Message):
    """The job as it was at the event. Times are Unix seconds on the broker's clock."""

    id: str
    status: str
    model: str
    attempt: int
    step: int
    num_steps: int
    created_at: float
    started_at: float | None
    finished_at: float | None
    images: tuple[CallbackImage, ...]
    error: JobError | None
    warnings: tuple[JobWarning, ...]
    tenant: str
    metadata: dict[str, Any]


class CallbackMessage(Message):
    """The body of a callback. Each try is signed anew, under the same ``id``; ``seq`` orders the events of one job."""

    id: str
    type: str
    timestamp: datetime
    seq: int
    data: CallbackData
