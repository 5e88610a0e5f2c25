"""API keys: make them, list them, revoke them. They go to the broker directly, as the operator's user."""

from __future__ import annotations

from datetime import UTC, datetime

import click

from latentline import records
from latentline.keys import SCOPES, ApiKey, NewKey
from latentline.terminal import say, say_json

from .broker import run
from .options import json_option


@click.group()
def keys() -> None:
    """Make, list and revoke API keys (LATENTLINE_REDIS_URL with the broker's user `operator`)."""


@keys.command("create")
@click.option("--tenant", required=True, help="Whose jobs the key submits and sees.")
@click.option("--scope", "scopes", type=click.Choice(SCOPES), multiple=True, default=("submit", "read"), show_default=True)
@click.option("--rate", type=int, default=0, help="Submissions per minute; 0: no bound.")
@click.option("--max-jobs", type=int, default=0, help="Jobs that the tenant may have queued and running; 0: no bound.")
@click.option("--max-cost", type=int, default=0, help="Rows of denoising of those jobs; 0: LATENTLINE_TENANT_CAP.")
@click.option("--top-priority", type=int, default=0, show_default=True, help="The most urgent priority: 0 is served first, 9 last.")
@click.option("--note", default="", help="What the key is for.")
@json_option
def create_key(
    tenant: str, scopes: tuple[str, ...], rate: int, max_jobs: int, max_cost: int, top_priority: int, note: str, as_json: bool
) -> None:
    """Make a key. It is shown once: only its hash is stored."""
    limits = {"rate": rate, "max_jobs": max_jobs, "max_cost": max_cost, "top_priority": top_priority}
    text, key = run(records.create_key(NewKey.parse(tenant=tenant, scopes=scopes, limits=limits, note=note)))
    if as_json:
        say_json({"key": text, **_shown(key)})
    else:
        say(text)


@keys.command("list")
@click.option("--tenant", help="Of this tenant only.")
@json_option
def list_keys(tenant: str | None, as_json: bool) -> None:
    """All keys, oldest first, by their prefixes."""
    found = run(records.keys(tenant))
    if as_json:
        say_json({"keys": [_shown(key) for key in found]})
        return
    for key in found:
        limits = [f"{name}={value}" for name, value in key.limits.model_dump().items() if value]
        say("  ".join(filter(None, (key.prefix, _made(key), key.tenant, ",".join(key.scopes), *limits, key.note))))


@keys.command("revoke")
@click.argument("prefix")
@json_option
def revoke_key(prefix: str, as_json: bool) -> None:
    """Delete a key by its prefix: requests with it are refused from now on, its open event streams end within seconds."""
    run(records.revoke_key(prefix))
    if as_json:
        say_json({"prefix": prefix, "revoked": True})
    else:
        say(f"{prefix} is revoked")


def _shown(key: ApiKey) -> dict[str, object]:
    return key.model_dump(mode="json", exclude={"digest"}) | {"created_at": _made(key)}


def _made(key: ApiKey) -> str:
    return datetime.fromtimestamp(key.created_at, UTC).isoformat(timespec="seconds")
