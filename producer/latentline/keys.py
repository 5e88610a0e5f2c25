"""API keys: their text, what is stored of them, and what they allow.

A key reads ``ll_<prefix>_<secret>``: the prefix finds the record, the secret is 32 random bytes. Only its SHA-256 is stored. A plain
hash is enough, since a secret of 256 random bits cannot be guessed.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
from typing import Annotated, Literal, Self, get_args

from pydantic import Field, ValidationError

from .requests import Message, Submitted, Tenant, invalid_request

Scope = Literal["submit", "read", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)

_FORM = re.compile(r"ll_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")


class Limits(Submitted):
    """What the holder of a key may ask for. 0 is no bound."""

    rate: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Submissions per minute with this key."""
    max_jobs: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Jobs of the tenant that have not ended."""
    max_cost: Annotated[int, Field(ge=0, le=2**53)] = 0
    """Rows of denoising of the tenant's jobs that have not ended. 0: ``LATENTLINE_TENANT_CAP`` counts. One job always fits."""
    top_priority: Annotated[int, Field(ge=0, le=9)] = 0
    """The most urgent priority that a job may have: 0 is served first, 9 last."""


class ApiKey(Message):
    """A key as it is stored."""

    prefix: str
    digest: str = Field(repr=False)
    """SHA-256 of the secret, in hex."""
    tenant: str
    scopes: tuple[str, ...]
    limits: Limits = Limits()
    created_at: float
    note: str = ""

    def may(self, scope: Scope) -> bool:
        return scope in self.scopes or "admin" in self.scopes

    def opens_for(self, credential: Credential) -> bool:
        """Whether the credential is this key, in constant time."""
        return hmac.compare_digest(self.digest, credential.digest)


class Credential(Message):
    """What a client presents, without the secret itself."""

    prefix: str
    digest: str = Field(repr=False)

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """None for what cannot be a key."""
        found = _FORM.fullmatch(text)
        return cls(prefix=found[1], digest=_digest(found[2])) if found else None


class NewKey(Submitted):
    """What a new key shall be: checked as a request is."""

    tenant: Tenant
    scopes: Annotated[tuple[Scope, ...], Field(min_length=1)] = ("submit", "read")
    limits: Limits = Limits()
    note: Annotated[str, Field(max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")] = ""

    @classmethod
    def parse(cls, **fields: object) -> Self:
        """Raises InvalidRequest for the first field that is not acceptable."""
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise invalid_request(error) from None


def tenant_name(text: str) -> str:
    """The text, if it can be a tenant's name; raises InvalidRequest."""
    return NewKey.parse(tenant=text).tenant


def generate() -> tuple[str, Credential]:
    """A new key's text, which is shown once, and what is stored of it."""
    secret = base64.urlsafe_b64encode(secrets.token_bytes(32)).decode().rstrip("=")
    prefix = secrets.token_hex(6)
    return f"ll_{prefix}_{secret}", Credential(prefix=prefix, digest=_digest(secret))


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
