"""API keys in Redis. Only the operator's user of ``deploy/valkey/users.acl`` may write them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from latentline import routing
from latentline.errors import KeyNotFound
from latentline.keys import ApiKey, NewKey, generate

from .driving import Operation, broker_time, hgetall_many


def create_key(new: NewKey) -> Operation[tuple[str, ApiKey]]:
    """Store a new key; its text, which cannot be had again, and its record."""
    text, credential = generate()
    key = ApiKey(
        prefix=credential.prefix,
        digest=credential.digest,
        tenant=new.tenant,
        scopes=new.scopes,
        limits=new.limits,
        created_at=(yield from broker_time()),
        note=new.note,
    )
    fields: dict[str, str] = {name: value if isinstance(value, str) else json.dumps(value) for name, value in key.model_dump().items()}

    def call(client: Any) -> Any:
        pipeline = client.pipeline(transaction=False)
        pipeline.hset(routing.api_key_key(key.prefix), mapping=fields)
        pipeline.zadd(routing.api_keys_key(), {key.prefix: key.created_at})
        return pipeline.execute()

    yield call
    return text, key


def keys(tenant: str | None = None) -> Operation[list[ApiKey]]:
    """All keys, or those of a tenant, oldest first."""
    prefixes = yield lambda client: client.zrange(routing.api_keys_key(), 0, -1)
    raws = yield hgetall_many(prefixes, routing.api_key_key)
    found = [key for raw in raws if (key := key_of(raw)) is not None]
    return [key for key in found if tenant in (None, key.tenant)]


def revoke_key(prefix: str) -> Operation[None]:
    """Delete a key: the next request with it is refused. Raises KeyNotFound."""

    def call(client: Any) -> Any:
        pipeline = client.pipeline(transaction=False)
        pipeline.delete(routing.api_key_key(prefix))
        pipeline.zrem(routing.api_keys_key(), prefix)
        return pipeline.execute()

    deleted, _ = yield call
    if not deleted:
        raise KeyNotFound(f"no key with the prefix {prefix[:80]!r}")


def find_keys(prefixes: Iterable[str]) -> Operation[dict[str, ApiKey]]:
    """Those of these keys that are there, in one round trip."""
    raws = yield hgetall_many(list(prefixes), routing.api_key_key)
    found = [key for raw in raws if (key := key_of(raw)) is not None]
    return {key.prefix: key for key in found}


def key_of(raw: dict[str, str]) -> ApiKey | None:
    """A stored key; None for one that is not there or that this version cannot read, which opens nothing."""
    try:
        read = {name: json.loads(raw[name]) for name in ("scopes", "limits", "created_at")}
        return ApiKey.model_validate(raw | read)
    except (KeyError, ValueError, ValidationError):
        return None
