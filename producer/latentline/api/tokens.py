"""Tokens for event streams: an EventSource sends no headers, so what opens a stream has to stand in its URL.

A token reads ``llt_<prefix>_<expiry>_<signature>``. It is signed with the digest of the API key with which it was made, so every
process of the API can check it after the one look at the key that a request needs in any case, and a key that is gone has no
tokens. It opens streams of the key's tenant and nothing else, since URLs end in logs.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import time

from latentline.errors import NotAllowed, NotAuthenticated
from latentline.keys import ApiKey

LIFE_S = 600  # in which a stream may be opened; one that is open stays open

_FORM = re.compile(r"llt_([0-9a-f]{12})_([0-9a-f]{8})_([0-9a-f]{64})")


def make_token(key: ApiKey, now: float | None = None) -> tuple[str, int]:
    """A token of this key, and the Unix time of its end."""
    expires_at = int(time.time() if now is None else now) + LIFE_S
    return f"llt_{key.prefix}_{expires_at:08x}_{_signature(key, expires_at)}", expires_at


def prefix_of_token(token: str) -> str:
    """The prefix of the key with which it was made, as it claims; raises NotAuthenticated for what cannot be a token."""
    found = _FORM.fullmatch(token)
    if not found:
        raise NotAuthenticated("the token is none that POST /v1/events/token gave")
    return found[1]


def key_of_token(token: str, key: ApiKey | None) -> ApiKey:
    """The key, as far as its token may stand for it: to read what its tenant has.

    Args:
        key: the key with the token's prefix; None where there is none.

    Raises:
        NotAuthenticated: the token is not one of this key, or its time is over.
        NotAllowed: the key may not read.
    """
    found = _FORM.fullmatch(token)
    if not found or key is None or not hmac.compare_digest(found[3], _signature(key, int(found[2], 16))):
        raise NotAuthenticated("the token is wrong, or its API key was revoked")
    if time.time() >= int(found[2], 16):
        raise NotAuthenticated(f"the token has expired: a stream is opened within {LIFE_S} s; get another one from POST /v1/events/token")
    if not key.may("read"):
        raise NotAllowed(f"the API key lacks the scope 'read'; it has: {', '.join(key.scopes)}")
    return key.model_copy(update={"scopes": ("read",)})


def _signature(key: ApiKey, expires_at: int) -> str:
    return hmac.new(key.digest.encode(), f"latentline events {key.prefix} {expires_at}".encode(), hashlib.sha256).hexdigest()
