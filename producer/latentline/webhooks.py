"""Sign and verify callbacks as Standard Webhooks says; receivers import this module.

https://github.com/standard-webhooks/standard-webhooks: HMAC-SHA256 over ``id.timestamp.body``, secrets written as
``whsec_<base64>``. Standard library only.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
import time
from collections.abc import Mapping, Sequence

from .errors import ConfigurationError, WebhookError

SECRET_PREFIX = "whsec_"
SECRET_BYTES = 32
MIN_SECRET_BYTES = 16
TOLERANCE_S = 300  # how old or how far ahead a timestamp may be: a captured callback cannot be replayed later


def generate_secret() -> str:
    """A fresh signing secret."""
    return SECRET_PREFIX + base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode()


def sign(secret: str, message_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """The three headers of a signed message. ``timestamp`` is in Unix seconds.

    Raises:
        ConfigurationError: the secret is not ``whsec_`` and base64.
    """
    signature = base64.b64encode(_mac(secret, message_id, str(timestamp), body)).decode()
    return {"webhook-id": message_id, "webhook-timestamp": str(timestamp), "webhook-signature": f"v1,{signature}"}


def verify(secret: str | Sequence[str], headers: Mapping[str, str], body: bytes, *, tolerance_s: float = TOLERANCE_S) -> None:
    """Return when the message is authentic and fresh; several secrets serve a rotation.

    Raises:
        WebhookError: a header is missing or malformed, the timestamp is too far off, or no signature fits.
    """
    lower = {name.lower(): value for name, value in headers.items()}
    try:
        message_id, stamp, signatures = (lower[f"webhook-{part}"] for part in ("id", "timestamp", "signature"))
    except KeyError as error:
        raise WebhookError(f"the header {error.args[0]} is missing") from None
    if not (stamp.isascii() and stamp.isdigit() and len(stamp) < 13):
        raise WebhookError("webhook-timestamp is not a number of seconds")
    if abs(time.time() - int(stamp)) > tolerance_s:
        raise WebhookError(f"webhook-timestamp is more than {tolerance_s:g} s off")
    expected = [_mac(one, message_id, stamp, body) for one in ([secret] if isinstance(secret, str) else secret)]
    for signature in signatures.split():
        version, _, encoded = signature.partition(",")
        try:
            given = base64.b64decode(encoded, validate=True)
        except (binascii.Error, ValueError):
            continue
        if version == "v1" and any(hmac.compare_digest(given, mac) for mac in expected):
            return
    raise WebhookError("no signature fits")


def _mac(secret: str, message_id: str, timestamp: str, body: bytes) -> bytes:
    try:
        if not secret.startswith(SECRET_PREFIX):
            raise ValueError("prefix")
        key = base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
        if len(key) < MIN_SECRET_BYTES:
            raise ValueError("length")
    except (binascii.Error, ValueError):
        raise ConfigurationError(f"a webhook secret is {SECRET_PREFIX} and the base64 of at least {MIN_SECRET_BYTES} bytes") from None
    return hmac.digest(key, f"{message_id}.{timestamp}.".encode() + body, hashlib.sha256)
