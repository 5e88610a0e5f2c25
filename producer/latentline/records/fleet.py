"""Who serves what, and whether the broker keeps it."""

from __future__ import annotations

import redis

from latentline import routing
from latentline.jobs import ModelInfo

from .driving import Operation

WORKER_ALIVE_S = 10  # a worker that has not beaten for this long is gone


def models() -> Operation[dict[str, ModelInfo]]:
    """Every model that some worker has announced."""
    raw = yield lambda client: client.hgetall(routing.models_key())
    return {model_id: ModelInfo.model_validate_json(info) for model_id, info in sorted(raw.items())}


def workers() -> Operation[list[str]]:
    """Names of the workers that have beaten lately."""
    seconds, _ = yield lambda client: client.time()
    names: list[str] = yield lambda client: client.zrangebyscore(routing.workers_key(), seconds - WORKER_ALIVE_S, "+inf")
    return names


def up_s() -> Operation[float]:
    """Seconds since the broker was started, in whole ones; infinite when it does not tell this user."""
    try:
        found: dict[str, float] = yield lambda client: client.info("server")
    except redis.ResponseError:
        return float("inf")
    return found["uptime_in_seconds"]


def durability() -> Operation[list[str]]:
    """What of the broker's settings may lose jobs, as sentences; empty when all is well."""
    try:
        found: dict[str, str] = yield lambda client: client.config_get("appendonly", "maxmemory-policy", "maxmemory")
    except redis.ResponseError:
        return ["the broker does not let its settings be read: whether jobs survive its restart is not known"]
    problems = []
    if found.get("appendonly") != "yes":
        problems.append("appendonly is off: a restart of the broker loses jobs")
    if found.get("maxmemory-policy") != "noeviction":
        problems.append(f"maxmemory-policy is {found.get('maxmemory-policy')}: under pressure the broker drops records; set noeviction")
    if found.get("maxmemory") in (None, "0"):
        problems.append("maxmemory is not set: the broker may be killed for memory instead of refusing jobs")
    return problems
