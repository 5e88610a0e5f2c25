"""Dead letters: list, show, replay, drop."""

from __future__ import annotations

import json

import click

from latentline import records
from latentline.client import Client
from latentline.errors import InvalidRequest, JobNotFound
from latentline.jobs import JobRequest
from latentline.settings import Settings

from .broker import run
from .errors import clear_errors
from .options import json_option


@click.group()
def dead() -> None:
    """Jobs that failed permanently and unreadable messages (settings from LATENTLINE_* variables)."""


@dead.command("list")
@json_option
@clear_errors
def list_dead(as_json: bool) -> None:
    """Dead letters, newest first."""
    found = run(records.dead_letters())
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    for letter in found:
        click.echo(f"{letter['id']}  {letter['kind']}  {letter['reason']}")


@dead.command("show")
@click.argument("dead_id")
@clear_errors
def show_dead(dead_id: str) -> None:
    """A dead letter, whole."""
    click.echo(json.dumps(run(records.dead_letter(dead_id)), indent=2))


@dead.command("replay")
@click.argument("dead_id")
@clear_errors
def replay_dead(dead_id: str) -> None:
    """Submit the request of a permanently failed job again, as a new job, and drop the dead letter."""
    letter = run(records.dead_letter(dead_id))
    if letter["kind"] != "job":
        raise InvalidRequest("dead_id", dead_id, "the dead letter of a job: an unreadable message cannot be replayed")
    try:
        request = JobRequest.model_validate_json(letter["request"]).model_copy(update={"idempotency_key": None})
    except ValueError:
        raise JobNotFound(f"the dead letter {dead_id!r} holds a request that this version cannot read") from None
    with Client(Settings()) as client:
        record = client.submit(request)
    run(records.drop_dead_letter(dead_id))
    click.echo(record.id)


@dead.command("drop")
@click.argument("dead_id")
@clear_errors
def drop_dead(dead_id: str) -> None:
    """Forget a dead letter."""
    run(records.drop_dead_letter(dead_id))
