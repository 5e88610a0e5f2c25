"""Dead letters: list, show, replay, drop."""

from __future__ import annotations

import click

from latentline import records
from latentline.client import Client
from latentline.settings import Settings
from latentline.terminal import say, say_json

from .broker import run
from .options import json_option


@click.group()
def dead() -> None:
    """Jobs that failed permanently and unreadable messages (settings from LATENTLINE_* variables)."""


@dead.command("list")
@json_option
def list_dead(as_json: bool) -> None:
    """Dead letters, newest first."""
    found = run(records.dead_letters())
    if as_json:
        say_json({"dead_letters": found})
        return
    for letter in found:
        say(f"{letter['id']}  {letter['kind']}  {letter['reason']}")


@dead.command("show")
@click.argument("dead_id")
@json_option
def show_dead(dead_id: str, as_json: bool) -> None:
    """A dead letter, whole, as JSON."""
    say_json(run(records.dead_letter(dead_id)))


@dead.command("replay")
@click.argument("dead_id")
@json_option
def replay_dead(dead_id: str, as_json: bool) -> None:
    """Submit the request of a permanently failed job again, as a new job, and drop the dead letter."""
    letter = run(records.dead_letter(dead_id))
    request = records.request_of_letter(letter)
    with Client(Settings()) as client:
        record = client.submit(request)
    run(records.drop_dead_letter(dead_id))
    if as_json:
        say_json({"id": dead_id, "job_id": record.id})
    else:
        say(record.id)


@dead.command("drop")
@click.argument("dead_id")
@json_option
def drop_dead(dead_id: str, as_json: bool) -> None:
    """Forget a dead letter."""
    run(records.drop_dead_letter(dead_id))
    if as_json:
        say_json({"id": dead_id, "dropped": True})
