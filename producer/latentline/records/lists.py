"""Pages of jobs, newest first, by status, tenant, model, time and metadata."""

from __future__ import annotations

import base64
import contextlib
import math
from dataclasses import dataclass

from latentline.errors import InvalidRequest, JobNotFound
from latentline.jobs import JobRecord, Status
from latentline.scripts import PAGE

from .driving import Operation, call_script_many, pairs
from .jobs import end_overdue, label
from .stored import record_of

MAX_PAGE = 200
# Jobs that one page looks at: a list by anything but tenant alone or status alone looks at others too. Each costs the broker some 20
# microseconds, in which it serves nobody else.
MAX_LOOK = 500
MAX_PAGE_BYTES = 1024 * 1024  # of the records of one page, which may have long prompts
MAX_LABELS = 5


@dataclass(frozen=True)
class JobFilter:
    """Which jobs a page holds; those that meet every condition. Empty: all."""

    status: Status | None = None
    tenant: str = ""
    model: str = ""
    created_after: float | None = None
    """Unix seconds: then or later."""
    created_before: float | None = None
    """Earlier."""
    metadata: tuple[str, ...] = ()
    """Entries of the metadata as ``key:value``; values that are not text as in JSON."""


def list_jobs(
    status: Status | None = None, cursor: str | None = None, limit: int = 50, *, tenant: str | None = None, where: JobFilter | None = None
) -> Operation[tuple[list[JobRecord], str | None]]:
    """A page of records, newest first, and the cursor of the next page. It takes one round trip, unless jobs are overdue.

    A page may be shorter than ``limit`` although more follow, as the cursor then says: at most ``MAX_LOOK`` jobs are looked at, and
    records of ``MAX_PAGE_BYTES`` are read.

    Args:
        where: which jobs, instead of ``status`` and ``tenant``.

    Raises:
        InvalidRequest: a limit out of range, too many entries of metadata, or a cursor that no page gave.
    """
    if not 1 <= limit <= MAX_PAGE:
        raise InvalidRequest("limit", limit, f"1 to {MAX_PAGE}")
    where = where or JobFilter(status, tenant or "")
    if len(where.metadata) > MAX_LABELS:
        raise InvalidRequest("metadata", len(where.metadata), f"at most {MAX_LABELS} entries")
    for entry in where.metadata:
        if ":" not in entry:
            raise InvalidRequest("metadata", entry, "key:value, such as order:17")
    before, last_id = _begin(cursor, where.created_before)
    arguments = {
        "tenant": where.tenant,
        "status": where.status or "",
        "model": where.model,
        "labels": "\n".join(label(text) for text in where.metadata),
        "before": before,
        "after": "-inf" if where.created_after is None else _milliseconds(where.created_after),
        "last_id": last_id,
        "limit": limit,
        "most": MAX_LOOK,
        "most_bytes": MAX_PAGE_BYTES,
    }
    ((now, found, following),) = yield from call_script_many(PAGE, [arguments])
    raws = [pairs(flat) for flat, _ in found]
    positions = {raw["id"]: position for raw, (_, position) in zip(raws, found, strict=True)}
    current = yield from end_overdue(raws, float(now))
    page: list[JobRecord] = []
    for raw in current:
        with contextlib.suppress(JobNotFound):  # a record of a version that this code cannot read is left out
            record = record_of(raw)
            if where.status in (None, record.status):
                place = positions[record.id] if record.status is Status.QUEUED else None
                page.append(record.model_copy(update={"queue_position": place}))
    return page, _cursor(following) if following else None


def _begin(cursor: str | None, created_before: float | None) -> tuple[str, str]:
    """Where the page begins: a score, exclusive where it begins with "(", and the id after which, of those with that score."""
    limit = None if created_before is None else _milliseconds(created_before)
    if cursor is None:
        return ("+inf" if limit is None else f"({limit}"), ""
    score, last_id = _read_cursor(cursor)
    return (f"({limit}", "") if limit is not None and int(limit) <= int(score) else (score, last_id)


def _milliseconds(seconds: float) -> str:
    """A time as the score that a job of it has."""
    return str(math.floor(seconds * 1000))


def _cursor(last: str) -> str:
    """``last`` is score:id of the last job of a page."""
    return base64.urlsafe_b64encode(last.encode()).decode()


def _read_cursor(cursor: str) -> tuple[str, str]:
    try:
        score, job_id = base64.urlsafe_b64decode(cursor.encode()).decode().split(":", 1)
        return str(int(score)), job_id
    except ValueError:
        raise InvalidRequest("cursor", cursor, "a cursor that an earlier page gave") from None
