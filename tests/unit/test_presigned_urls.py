"""URLs of images are signed once for half of their life."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from latentline import Settings, images
from latentline.images import Images


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(images, "time", clock)
    return clock


@pytest.fixture
def signed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys that were signed, in order."""
    keys: list[str] = []

    def sign(self: Images, key: str) -> str:
        keys.append(key)
        return f"https://store.example/{key}?number={len(keys)}"

    monkeypatch.setattr(Images, "sign", sign)
    return keys


def test_a_url_is_given_again_for_half_of_its_life(clock: Clock, signed: list[str]) -> None:
    store = Images(Settings(presign_ttl_s=100))
    first = store.presign("a")
    clock.now += 49.9
    assert store.presign("a") == first and signed == ["a"]
    clock.now += 0.1
    assert store.presign("a") != first and signed == ["a", "a"]


def test_the_oldest_urls_make_room(clock: Clock, signed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_SIGNED", 2)
    store = Images(Settings(presign_ttl_s=100))
    for key in ("a", "b", "c", "b", "c", "a"):
        store.presign(key)
    assert signed == ["a", "b", "c", "a"]


def test_a_real_signature_is_reused() -> None:
    store = Images(Settings(s3_endpoint_url="http://127.0.0.1:9", s3_access_key_id="id", s3_secret_access_key="secret"))
    url = store.presign("a.png")
    assert "X-Amz-Signature=" in url and store.presign("a.png") == url and store.presign("b.png") != url


def test_a_url_is_signed_for_the_public_name_of_the_store() -> None:
    keys = {"s3_access_key_id": "id", "s3_secret_access_key": "secret", "s3_endpoint_url": "http://store:8333"}
    url = Images(Settings(**keys, s3_public_endpoint_url="https://images.example.com/")).presign("a/0.png")
    assert url.startswith("https://images.example.com/images/a/0.png?") and "store" not in url
    assert Images(Settings(**keys)).presign("a/0.png").startswith("http://store:8333/images/a/0.png?")


@pytest.mark.parametrize("url", ["images.example.com", "ftp://images.example.com", "https://a.example/path", "https://u:p@a.example", ""])
def test_a_public_name_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValidationError, match="s3_public_endpoint_url"):
        Settings(s3_public_endpoint_url=url)
