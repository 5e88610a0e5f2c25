"""Status callbacks: deliver them, list them, send one again."""

from __future__ import annotations

import sys

import click

from latentline import records
from latentline.errors import JobNotFound
from latentline.terminal import say, say_json

from .broker import run
from .errors import check_settings
from .extras import load
from .options import json_option


@click.group()
def callbacks() -> None:
    """Deliver status callbacks, look at them, send them again (settings from LATENTLINE_* variables)."""


@callbacks.command("serve")
def serve_callbacks() -> None:
    """Deliver callbacks until told to stop."""
    module = load("latentline_worker.callbacks.worker", "latentline callbacks serve", "callbacks")
    check_settings()
    sys.exit(module.serve(module.ProcessSettings()))


@callbacks.command("list")
@click.option("--job", "job_id", help="Of this job only.")
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True)
@json_option
def list_callbacks(job_id: str | None, limit: int, as_json: bool) -> None:
    """Callbacks with what came of each try, newest first."""
    found = run(records.callbacks(job_id, limit))
    if as_json:
        say_json({"callbacks": [{**one, "record": one["job_id"]} for one in found]})
        return
    for one in found:
        last = one["log"][-1]["result"] if one["log"] else "not tried yet"
        say(f"{one['id']}  {one['status']}  tries {one['tries']}  {last}")


@callbacks.command("replay")
@click.argument("callback_id")
@json_option
def replay_callback(callback_id: str, as_json: bool) -> None:
    """Send a callback once more, under the same id."""
    if not run(records.replay_callback(callback_id)):
        raise JobNotFound(f"no callback {callback_id!r}")
    if as_json:
        say_json({"id": callback_id, "replayed": True})
    else:
        say(f"{callback_id} is sent again")
