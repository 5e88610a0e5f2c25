"""Images as producers see them: how URLs are addressed and signed, and how often the store is asked. The rest: ``test_store.py``."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from botocore.exceptions import ReadTimeoutError

from latentline.errors import ConfigurationError, StoreUnavailable
from latentline.images import Images
from latentline.settings import Settings

KEYS = {"s3_access_key_id": "key", "s3_secret_access_key": "secret", "s3_bucket": "pictures"}


def images(**settings: Any) -> Images:
    return Images(Settings.model_validate(KEYS | settings))


@pytest.mark.parametrize(
    ("endpoint", "host", "path"),
    [
        # A name, since any library addresses a numeric host by path.
        ("http://store.example:9000", "store.example:9000", "/pictures/a/0.png"),
        (None, "pictures.s3.amazonaws.com", "/a/0.png"),
    ],
)
def test_a_private_store_is_addressed_by_path_and_aws_by_host(endpoint: str | None, host: str, path: str) -> None:
    """A bucket's name is part of no private endpoint's host name."""
    url = urlsplit(images(s3_endpoint_url=endpoint).presign("a/0.png"))
    assert (url.netloc, url.path) == (host, path)


def test_a_url_is_signed_for_as_long_as_the_setting_says() -> None:
    query = parse_qs(urlsplit(images(s3_endpoint_url="http://store.example", presign_ttl_s=77).presign("k")).query)
    assert (query["X-Amz-Expires"], query["X-Amz-Algorithm"]) == (["77"], ["AWS4-HMAC-SHA256"])
    assert query["X-Amz-Credential"][0].startswith("key/")


def test_no_credentials_are_a_setting_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    with pytest.raises(ConfigurationError, match="LATENTLINE_S3_ACCESS_KEY_ID"):
        Images(Settings(s3_endpoint_url="http://store.example")).presign("k")


def test_concurrent_checks_ask_a_hanging_store_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would wait for its time limit otherwise, one after another or all at once."""
    store = images(s3_endpoint_url="http://store.example")
    asked, may_answer = threading.Semaphore(0), threading.Event()
    calls: list[str] = []

    def hang(name: str, _: dict[str, Any]) -> Any:
        calls.append(name)
        asked.release()
        assert may_answer.wait(30)
        raise ReadTimeoutError(endpoint_url="http://store.example")

    monkeypatch.setattr(store._s3, "_make_api_call", hang)
    waiting = threading.Semaphore(0)
    lock = store._lock

    class Counted:
        """The lock, counting who comes to it."""

        def __enter__(self) -> None:
            waiting.release()
            lock.acquire()

        def __exit__(self, *_: object) -> None:
            lock.release()

    monkeypatch.setattr(store, "_lock", Counted())

    def check() -> type[Exception] | None:
        try:
            store.check()
        except StoreUnavailable as error:
            return type(error)
        return None

    with ThreadPoolExecutor(8) as pool:
        results = [pool.submit(check) for _ in range(8)]
        try:
            assert asked.acquire(timeout=30)
            assert all(waiting.acquire(timeout=30) for _ in range(8)), "all have come while the first still waits"
            assert calls == ["HeadBucket"]
        finally:
            may_answer.set()
        assert [result.result(30) for result in results] == [StoreUnavailable] * 8
    assert calls == ["HeadBucket"]
