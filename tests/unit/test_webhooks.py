"""Signatures: ours and the reference package's verify each other; whatever is not genuine is refused."""

from __future__ import annotations

import base64
import subprocess
import sys
import time
from datetime import UTC, datetime

import pytest
import standardwebhooks

from latentline.errors import ConfigurationError, WebhookError
from latentline.webhooks import generate_secret, sign, verify

BODY = '{"type":"job.succeeded","data":{"id":"j1","ü":1}}'.encode()


@pytest.fixture
def secret() -> str:
    return generate_secret()


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> int:
    moment = 1_800_000_000
    monkeypatch.setattr(time, "time", lambda: float(moment))
    return moment


def test_the_specification_s_example() -> None:
    # From the Standard Webhooks reference implementations' own tests.
    headers = sign("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_the_reference_verifies_ours(secret: str) -> None:
    standardwebhooks.Webhook(secret).verify(BODY, sign(secret, "msg_1", int(time.time()), BODY))


def test_ours_verifies_the_reference(secret: str) -> None:
    moment = datetime.now(UTC)
    signature = standardwebhooks.Webhook(secret).sign("msg_1", moment, BODY.decode())
    headers = {"Webhook-Id": "msg_1", "Webhook-Timestamp": str(int(moment.timestamp())), "Webhook-Signature": signature}
    verify(secret, headers, BODY)


def test_rotation_either_side(secret: str, now: int) -> None:
    old = generate_secret()
    headers = sign(old, "msg_1", now, BODY)
    verify([secret, old], headers, BODY)
    # A sender that signs with both: one unknown scheme, one unknown key, ours.
    both = headers | {
        "webhook-signature": f"v1a,xyz {sign(secret, 'msg_1', now, BODY)['webhook-signature']} {headers['webhook-signature']}"
    }
    verify(old, both, BODY)
    with pytest.raises(WebhookError, match="no signature matches"):
        verify(generate_secret(), both, BODY)


@pytest.mark.parametrize(("offset_s", "accepted"), [(-301, False), (-300, True), (300, True), (301, False)])
def test_tolerance(secret: str, now: int, offset_s: int, accepted: bool) -> None:
    headers = sign(secret, "msg_1", now + offset_s, BODY)
    if accepted:
        verify(secret, headers, BODY)
    else:
        with pytest.raises(WebhookError, match="300 s"):
            verify(secret, headers, BODY)


@pytest.mark.parametrize(
    "change",
    [
        {"webhook-id": "msg_2"},
        {"webhook-timestamp": "1800000001"},
        {"webhook-timestamp": "nan"},
        {"webhook-timestamp": "1e9"},
        {"webhook-timestamp": "-1800000000"},
        {"webhook-timestamp": "١٨٠٠٠٠٠٠٠٠"},
        {"webhook-timestamp": "9" * 5000},
        {"webhook-signature": ""},
        {"webhook-signature": "v1"},
        {"webhook-signature": "v1,"},
        {"webhook-signature": "v1,not base64!"},
        {"webhook-signature": "v1,ünï"},
        {"webhook-signature": "v1," + base64.b64encode(b"x" * 32).decode()},
        {"webhook-id": "\udc80"},
        {"webhook-id": "msg_\ud800"},
    ],
)
def test_altered_or_malformed_headers(secret: str, now: int, change: dict[str, str]) -> None:
    with pytest.raises(WebhookError):
        verify(secret, sign(secret, "msg_1", now, BODY) | change, BODY)


@pytest.mark.parametrize("name", ["webhook-id", "webhook-timestamp", "webhook-signature"])
def test_a_missing_header_is_named(secret: str, now: int, name: str) -> None:
    headers = sign(secret, "msg_1", now, BODY)
    del headers[name]
    with pytest.raises(WebhookError, match=name):
        verify(secret, headers, BODY)


def test_altered_body(secret: str, now: int) -> None:
    with pytest.raises(WebhookError):
        verify(secret, sign(secret, "msg_1", now, BODY), BODY + b" ")


def test_a_signature_counts_only_under_its_own_scheme(secret: str, now: int) -> None:
    """The right digest under another label: that scheme may sign something else."""
    headers = sign(secret, "msg_1", now, BODY)
    for label in ("v2", "v1a", "v", "", "V1"):
        relabelled = headers | {"webhook-signature": headers["webhook-signature"].replace("v1,", f"{label},", 1)}
        with pytest.raises(WebhookError, match="no signature matches"):
            verify(secret, relabelled, BODY)


@pytest.mark.parametrize(("length", "accepted"), [(23, False), (24, True)])
def test_the_shortest_key(length: int, accepted: bool) -> None:
    key = "whsec_" + base64.b64encode(bytes(length)).decode()
    if accepted:
        assert sign(key, "msg_1", 0, BODY)["webhook-id"] == "msg_1"
    else:
        with pytest.raises(ConfigurationError, match="at least 24 bytes"):
            sign(key, "msg_1", 0, BODY)


@pytest.mark.parametrize("bad", ["", "whsec_", "whsec_c2hvcnQ=", "whsec_!!!!", "c" * 44])
def test_a_malformed_secret_is_named_without_being_shown(bad: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        sign(bad, "msg_1", 0, BODY)
    assert len(bad) < 10 or bad not in str(caught.value)


def test_no_secret_is_not_a_pass(now: int) -> None:
    with pytest.raises(ConfigurationError):
        verify([], sign(generate_secret(), "msg_1", now, BODY), BODY)


def test_secrets_differ() -> None:
    assert len({generate_secret() for _ in range(100)}) == 100


def test_receivers_need_only_the_standard_library() -> None:
    code = "import latentline.webhooks, sys; print(sorted({'torch', 'boto3', 'redis', 'httpx'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
