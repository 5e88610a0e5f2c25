"""Secrets of tenants for their callbacks: make, rotate, list, revoke. They go to the broker directly, as the operator's user."""

from __future__ import annotations

from datetime import UTC, datetime

import click

from latentline import records
from latentline.records.secrets import OVERLAP_S, CallbackSecret
from latentline.terminal import note, say, say_json

from .broker import run
from .options import json_option


@click.group()
def secrets() -> None:
    """Secrets that sign the callbacks of one tenant (LATENTLINE_REDIS_URL with the broker's user `operator`).

    A tenant without one has its callbacks signed with LATENTLINE_CALLBACK_SECRET.
    """


@secrets.command("create")
@click.argument("tenant")
@json_option
def create_secret(tenant: str, as_json: bool) -> None:
    """Give a tenant a secret of its own. It is shown once, and signs from the next callback on."""
    _show(tenant, run(records.create_secret(tenant)), as_json)


@secrets.command("rotate")
@click.argument("tenant")
@json_option
def rotate_secret(tenant: str, as_json: bool) -> None:
    """Give a tenant a new secret, shown once. For 24 hours callbacks are signed with the one before as well."""
    made = run(records.rotate_secret(tenant))
    _show(tenant, made, as_json)
    note(f"the secret before signs as well until {_moment(made.at + OVERLAP_S)}")


@secrets.command("list")
@json_option
def list_secrets(as_json: bool) -> None:
    """Tenants with secrets of their own, and when those that sign now were made, newest first. The secrets cannot be seen."""
    found = run(records.secret_times())
    if as_json:
        say_json({"tenants": [{"tenant": tenant, "created_at": [*map(_moment, times)]} for tenant, times in found.items()]})
        return
    for tenant, times in found.items():
        say("  ".join([tenant, *map(_moment, times)]))


@secrets.command("revoke")
@click.argument("tenant")
@json_option
def revoke_secrets(tenant: str, as_json: bool) -> None:
    """Delete the secrets of a tenant: from its next callback on, LATENTLINE_CALLBACK_SECRET signs."""
    run(records.revoke_secrets(tenant))
    if as_json:
        say_json({"tenant": tenant, "revoked": True})
    else:
        say(f"{tenant} has no callback secret of its own any more")


def _show(tenant: str, made: CallbackSecret, as_json: bool) -> None:
    if as_json:
        say_json({"tenant": tenant, "secret": made.secret, "created_at": _moment(made.at)})
    else:
        say(made.secret)


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
