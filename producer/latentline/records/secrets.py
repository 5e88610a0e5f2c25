"""Secrets with which the callbacks of a tenant are signed.

The operator's user of ``deploy/valkey/users.acl`` writes them and cannot read them; the deliverer's user alone reads them.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic import ValidationError

from latentline import routing
from latentline.errors import ConfigurationError, InvalidRequest, SecretNotFound
from latentline.keys import tenant_name
from latentline.requests import Message
from latentline.webhooks import generate_secret

from .driving import Operation, broker_time

OVERLAP_S = 24 * 3600  # for so long after a rotation the replaced secret signs as well
MAX_SECRETS = 8  # of one tenant: the newest, and those that were replaced in the last 24 hours


class CallbackSecret(Message):
    """One entry of a tenant's list."""

    at: float
    """When it was made, on the broker's clock."""
    secret: str


def create_secret(tenant: str) -> Operation[CallbackSecret]:
    """Give a tenant a callback secret of its own; this is the only time that it can be seen.

    Raises:
        InvalidRequest: no tenant's name, or the tenant has a secret.
    """
    if (yield from _times(tenant_name(tenant))):
        raise InvalidRequest("tenant", tenant, "one without a callback secret of its own; a further one is made by rotating")
    return (yield from _add(tenant, []))


def rotate_secret(tenant: str) -> Operation[CallbackSecret]:
    """Give a tenant a new secret. Callbacks are signed with the one before as well for ``OVERLAP_S``.

    Raises:
        InvalidRequest: no tenant's name.
        SecretNotFound: it has none of its own.
    """
    times = yield from _times(tenant_name(tenant))
    if not times:
        raise _none(tenant)
    return (yield from _add(tenant, times))


def revoke_secrets(tenant: str) -> Operation[None]:
    """Delete all secrets of a tenant at once; raises SecretNotFound."""

    def call(client: Any) -> Any:
        pipeline = client.pipeline(transaction=False)
        pipeline.delete(routing.secret_key(tenant))
        pipeline.hdel(routing.secrets_key(), tenant)
        return pipeline.execute()

    if not any((yield call)):
        raise _none(tenant)


def secret_times() -> Operation[dict[str, list[float]]]:
    """Tenants with secrets of their own, by name: when the newest was made, and those that still sign beside it."""
    raw = yield lambda client: client.hgetall(routing.secrets_key())
    now = yield from broker_time()
    return {tenant: _signing(json.loads(raw[tenant]), now) for tenant in sorted(raw)}


def read_secrets(entries: list[str], now: float) -> list[str]:
    """Those of a tenant's stored secrets that sign now; raises ConfigurationError where one cannot be read."""
    try:
        kept = [CallbackSecret.model_validate_json(entry) for entry in entries]
    except ValidationError:  # its text may hold the secret
        raise ConfigurationError("a callback secret of this tenant cannot be read: make another with latentline secrets rotate") from None
    return [one.secret for one in kept[: len(_signing([one.at for one in kept], now))]]


def _signing(times: list[float], now: float) -> list[float]:
    """Of times of creation, newest first: those of the newest secret and of the ones that were replaced in the last 24 hours."""
    return [at for i, at in enumerate(times) if i == 0 or now - times[i - 1] < OVERLAP_S]


def _times(tenant: str) -> Operation[list[float]]:
    raw = yield lambda client: client.hget(routing.secrets_key(), tenant)
    times: list[float] = json.loads(raw or "[]")
    return times


def _add(tenant: str, times: list[float]) -> Operation[CallbackSecret]:
    made = CallbackSecret(at=(yield from broker_time()), secret=generate_secret())
    kept = _signing([made.at, *times], made.at)[:MAX_SECRETS]

    def call(client: Any) -> Any:
        pipeline = client.pipeline(transaction=False)
        pipeline.lpush(routing.secret_key(tenant), made.model_dump_json())
        pipeline.ltrim(routing.secret_key(tenant), 0, len(kept) - 1)
        pipeline.hset(routing.secrets_key(), tenant, json.dumps(kept))
        return pipeline.execute()

    yield call
    return made


def _none(tenant: str) -> SecretNotFound:
    return SecretNotFound(f"tenant {tenant[:100]!r} has no callback secret of its own")
