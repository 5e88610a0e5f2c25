"""Sign and verify status callbacks as Standard Webhooks does (https://www.standardwebhooks.com). Standard library only.

A receiver::

    from latentline.webhooks import verify

    verify("whsec_...", request.headers, raw_body)  # raises WebhookError unless it is genuine and recent
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
import secrets as random
import time
from collections.abc import Iterable, Mapping

from .errors import ConfigurationError, WebhookError

PREFIX = "whsec_"
MIN_KEY_BYTES = 24  # the specification's lower bound
TOLERANCE_S = 300.0  # most difference of the two clocks; a captured message can be replayed for as long
_TIMESTAMP = re.compile(r"[0-9]{1,12}")


def generate_secret() -> str:
    """A new secret, 32 random bytes."""
    return PREFIX + base64.b64encode(random.token_bytes(32)).decode()


def sign(secret: str, message_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """The three headers for ``body``. A retry has the same id and a new ``timestamp`` (Unix seconds).

    Raises:
        ConfigurationError: the secret is not ``whsec_`` and base64 of at least 24 bytes.
    """
    digest = _digest(_key(secret), message_id.encode(), str(timestamp).encode(), body)
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": "v1," + base64.b64encode(digest).decode(),
    }


def verify(secrets: str | Iterable[str], headers: Mapping[str, str], body: bytes, tolerance_s: float = TOLERANCE_S) -> None:
    """Return if one of ``secrets`` signed exactly these bytes within the tolerance. Pass the old and the new one while rotating.

    Raises:
        WebhookError: a header is missing or malformed, the message is too old or too new, or no signature matches.
        ConfigurationError: a secret of the receiver's own is malformed, or there is none.
    """
    keys = [_key(secret) for secret in ([secrets] if isinstance(secrets, str) else secrets)]
    if not keys:
        raise ConfigurationError("no webhook secret to verify with")
    lower = {name.lower(): value for name, value in headers.items()}
    try:
        message_id, timestamp, signatures = (lower[f"webhook-{part}"] for part in ("id", "timestamp", "signature"))
    except KeyError as error:
        raise WebhookError(f"the header {error.args[0]} is missing") from None
    if not _TIMESTAMP.fullmatch(timestamp):
        raise WebhookError("webhook-timestamp is not a time in Unix seconds")
    if abs(time.time() - int(timestamp)) > tolerance_s:
        raise WebhookError(f"the message is more than {tolerance_s:g} s old or early")
    # An id with lone surrogates was never signed; "replace" makes it fail the comparison instead of raising here.
    expected = [_digest(key, message_id.encode(errors="replace"), timestamp.encode(), body) for key in keys]
    for signature in signatures.split():
        version, _, encoded = signature.partition(",")
        if version != "v1":
            continue  # another scheme
        try:
            given = base64.b64decode(encoded, validate=True)
        except (binascii.Error, ValueError):
            continue
        if any(hmac.compare_digest(given, digest) for digest in expected):
            return
    raise WebhookError("no signature matches")


def _digest(key: bytes, message_id: bytes, timestamp: bytes, body: bytes) -> bytes:
    return hmac.new(key, b".".join((message_id, timestamp, body)), hashlib.sha256).digest()


def _key(secret: str) -> bytes:
    try:
        key = base64.b64decode(secret.removeprefix(PREFIX), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not secret.startswith(PREFIX) or len(key) < MIN_KEY_BYTES:
        # The message must not contain the secret.
        raise ConfigurationError(f"a webhook secret is {PREFIX} and the base64 of at least {MIN_KEY_BYTES} bytes")
    return key
