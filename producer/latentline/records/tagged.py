"""Jobs of a tenant by what their metadata says."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import pydantic_core

from latentline.scripts import SINCE

from .driving import Operation, call_script_many

MAX_LOOK = 2000  # jobs of a tenant among which those with a value are looked for
AT_ONCE = 500  # jobs that one call looks at: a millisecond of the broker


class Created(NamedTuple):
    """A job, and when it was stored: milliseconds on the broker's clock."""

    job_id: str
    at_ms: int
    metadata: dict[str, Any]


class Look(NamedTuple):
    """Where to look for a tenant's newest jobs: from a time on, without those that are known."""

    tenant: str
    since_ms: int
    known: Collection[str]


def tagged(tenant: str, name: str, value: str, since_ms: int | None = None) -> Operation[list[Created]]:
    """A tenant's jobs whose metadata has this value, oldest first: those stored since a time, or among its newest ``MAX_LOOK``."""
    # As records store it: JSON without blanks. What only looks like it is left out below.
    needle = f"{pydantic_core.to_json(name).decode()}:{pydantic_core.to_json(value).decode()}"
    found: dict[str, Created] = {}
    since, most = "" if since_ms is None else str(since_ms), MAX_LOOK if since_ms is None else AT_ONCE
    while True:
        arguments = {"tenant": tenant, "since": since, "needle": needle, "known": "[]", "most": most}
        ((rows, last, num_looked),) = yield from call_script_many(SINCE, [arguments])
        found |= {one.job_id: one for one in _created(rows) if one.metadata.get(name) == value}
        if since == "" or num_looked < most:
            return sorted(found.values(), key=lambda one: (one.at_ms, one.job_id))
        # So many jobs of one millisecond that the next call would look at the same ones.
        most = most * 2 if last == since else AT_ONCE
        since = last


def newest(looks: Sequence[Look]) -> Operation[list[list[Created]]]:
    """The new jobs of some tenants, oldest first, at most ``AT_ONCE`` of each, in one round trip."""
    calls = [
        {"tenant": look.tenant, "since": str(look.since_ms), "needle": "", "known": json.dumps(list(look.known)), "most": AT_ONCE}
        for look in looks
    ]
    replies = yield from call_script_many(SINCE, calls)
    return [list(_created(rows)) for rows, _, _ in replies]


def newest_at_ms(tenant: str) -> Operation[int]:
    """When a tenant's newest job was stored, in milliseconds; 0 without jobs."""
    arguments = {"tenant": tenant, "since": "", "needle": "", "known": "[]", "most": 1}
    ((_, last, _),) = yield from call_script_many(SINCE, [arguments])
    return int(last or 0)


def _created(rows: Sequence[Any]) -> Iterator[Created]:
    for job_id, at_ms, request in rows:
        yield Created(job_id, int(at_ms), json.loads(request).get("metadata") or {})
