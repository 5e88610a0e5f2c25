"""The list of jobs."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import click

from latentline.terminal import say_json

from .errors import EXIT_BAD_INPUT, fail
from .jobs import show
from .options import json_option, url_option
from .remote import JOB_FIELDS, Api

MAX_PAGE = 200  # jobs in one answer of the API


def _moment(_: click.Context, option: click.Parameter, value: str | None) -> str | None:
    """A time as the API reads it: in UTC where it names no zone."""
    if value is None:
        return None
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        name, allowed = option.opts[0], "a date, or a date and time, such as 2026-11-27 or 2026-11-27T22:00:00+01:00"
        fail(f"{name}: got {value[:80]!r}; allowed: {allowed}", EXIT_BAD_INPUT, field=name, allowed=allowed)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).isoformat()


@click.command()
@click.option("--status", help="queued, running, succeeded, failed or cancelled")
@click.option("--model", help="Of this model.")
@click.option("--since", "created_after", callback=_moment, metavar="TIME", help="Submitted then or later; UTC unless it names a zone.")
@click.option("--until", "created_before", callback=_moment, metavar="TIME", help="Submitted earlier.")
@click.option("--metadata", multiple=True, metavar="KEY:VALUE", help="With this entry; may be repeated, then with all of them.")
@click.option("--tenant", help="Of this tenant; for administrators.")
@click.option("--limit", type=int, default=20, show_default=True, help="Jobs at most.")
@click.option("--cursor", help="Go on where an earlier list with --json ended: its next_cursor.")
@url_option
@json_option
def jobs(limit: int, cursor: str | None, url: str, as_json: bool, **where: Any) -> None:
    """List jobs, newest first."""
    if limit < 1:
        fail(f"--limit: got {limit}; allowed: at least 1", EXIT_BAD_INPUT, field="--limit", allowed="at least 1")
    api = Api(url)
    found: list[dict[str, Any]] = []
    wanted = {name: value for name, value in where.items() if value}
    while True:  # a page may be shorter than asked for, or empty, while more follow
        params = wanted | {"limit": min(limit - len(found), MAX_PAGE)} | ({"cursor": cursor} if cursor else {})
        page = api.page("/v1/jobs", "jobs", JOB_FIELDS, params=params)
        found += page["jobs"]
        cursor = page.get("next_cursor")
        if not cursor or len(found) >= limit:
            break
    if as_json:
        say_json({"jobs": found, "next_cursor": cursor})
        return
    for job in found:
        show(job | {"images": []}, False)
