"""ImageStore and Images against moto. Signatures are tested on a real store (test_storage_real.py): moto accepts any."""

from __future__ import annotations

import base64
import hashlib
import socket
import time
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from botocore.exceptions import ClientError, ReadTimeoutError
from moto import mock_aws

from latentline.errors import ConfigurationError, StoreUnavailable
from latentline.images import CHECK_CACHE_S, Images, connect_s3
from latentline.settings import Settings
from latentline_worker.images import store as store_module
from latentline_worker.images.store import ImageStore

DATA = b"\x89PNG" + bytes(range(256)) * 40


ENDPOINT = "http://store.example:9000"


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    monkeypatch.setenv("MOTO_S3_CUSTOM_ENDPOINTS", ENDPOINT)
    with mock_aws():
        yield make_settings(ENDPOINT, f"images-{uuid.uuid4().hex[:12]}")


def make_settings(endpoint: str, bucket: str, **more: Any) -> Settings:
    return Settings(s3_endpoint_url=endpoint, s3_bucket=bucket, s3_access_key_id="key", s3_secret_access_key="secret", **more)


def refuses(code: str, monkeypatch: pytest.MonkeyPatch, store: ImageStore, status: int = 403) -> None:
    """Every call of this store's client is answered with ``code`` from now on."""

    def fail(*_: object, **__: object) -> Any:
        raise ClientError({"Error": {"Code": code, "Message": "no"}, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject")  # type: ignore[typeddict-item]

    monkeypatch.setattr(store._s3, "_make_api_call", fail)


@pytest.fixture
def dead_endpoint() -> Iterator[str]:
    """An address on which nothing listens; its port is held, so that no other process takes it."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{held.getsockname()[1]}"


def test_what_is_put_can_be_read(settings: Settings) -> None:
    store = ImageStore(settings)
    store.ensure_bucket()
    store.put("default/j1/1/0.png", DATA, "image/png", {"job-id": "j1", "seed": "7"})
    assert Images(settings).download("default/j1/1/0.png") == DATA
    head = connect_s3(settings, read_timeout_s=5).head_object(Bucket=settings.s3_bucket, Key="default/j1/1/0.png")
    assert head["ContentType"] == "image/png"
    assert head["Metadata"] == {"job-id": "j1", "seed": "7"}
    assert head["ContentLength"] == len(DATA)


def test_the_bucket_is_made_once(settings: Settings) -> None:
    store = ImageStore(settings)
    store.ensure_bucket()
    store.put("kept", b"x", "image/png", {})
    store.ensure_bucket()
    assert Images(settings).download("kept") == b"x"


def test_a_bucket_of_our_own_lets_images_expire_after_their_records(settings: Settings) -> None:
    store = ImageStore(settings.model_copy(update={"retention_s": 36 * 3600}))
    store.ensure_bucket()
    (rule,) = store._s3.get_bucket_lifecycle_configuration(Bucket=settings.s3_bucket)["Rules"]
    assert (rule["Status"], rule["Expiration"]["Days"]) == ("Enabled", 3)


def test_a_bucket_of_others_keeps_its_rules(settings: Settings) -> None:
    store = ImageStore(settings)
    store._s3.create_bucket(Bucket=settings.s3_bucket)
    store.ensure_bucket()
    with pytest.raises(ClientError, match="NoSuchLifecycleConfiguration"):
        store._s3.get_bucket_lifecycle_configuration(Bucket=settings.s3_bucket)


def test_a_store_without_such_rules_is_good_enough(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ImageStore(settings)
    warnings: list[str] = []
    monkeypatch.setattr(store_module.log, "warning", lambda text, *arguments: warnings.append(text % arguments))
    call = store._s3._make_api_call  # type: ignore[attr-defined]

    def no_rules(name: str, arguments: Any) -> Any:
        if name == "PutBucketLifecycleConfiguration":
            raise ClientError({"Error": {"Code": "NotImplemented", "Message": "no"}}, name)
        return call(name, arguments)

    monkeypatch.setattr(store._s3, "_make_api_call", no_rules)
    store.ensure_bucket()
    store.put("k", DATA, "image/png", {})
    assert len(warnings) == 1 and "cannot set an expiry rule" in warnings[0]


def test_the_upload_carries_its_md5(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ImageStore(settings)
    seen: dict[str, Any] = {}
    monkeypatch.setattr(store._s3, "_make_api_call", lambda name, kwargs: seen.update(kwargs))
    store.put("k", DATA, "image/png", {})
    assert seen["ContentMD5"] == base64.b64encode(hashlib.md5(DATA).digest()).decode()


def test_a_missing_bucket_is_a_setting_that_is_wrong(settings: Settings) -> None:
    with pytest.raises(ConfigurationError, match=settings.s3_bucket):
        ImageStore(settings).put("k", DATA, "image/png", {})
    with pytest.raises(StoreUnavailable, match=settings.s3_bucket):
        Images(settings).check()


@pytest.mark.parametrize("code", ["InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied"])
def test_refused_credentials(settings: Settings, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    store = ImageStore(settings)
    refuses(code, monkeypatch, store)
    with pytest.raises(ConfigurationError, match=code):
        store.put("k", DATA, "image/png", {})
    with pytest.raises(ConfigurationError, match=code):
        store.ensure_bucket()


def test_a_store_that_is_overloaded_is_no_wrong_setting(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ImageStore(settings)
    refuses("SlowDown", monkeypatch, store, 503)
    with pytest.raises(StoreUnavailable, match="SlowDown"):
        store.put("k", DATA, "image/png", {})


def test_delete_all_deletes_what_lies_under_its_prefix(settings: Settings) -> None:
    store = ImageStore(settings)
    store.ensure_bucket()
    for key in ("default/j1/1/0.png", "default/j1/2/0.png", "default/j10/1/0.png"):
        store.put(key, DATA, "image/png", {})
    assert store.delete_all("default/j1/")
    left = store._s3.list_objects_v2(Bucket=settings.s3_bucket)["Contents"]
    assert [one["Key"] for one in left] == ["default/j10/1/0.png"]


def test_what_the_store_does_not_delete_is_told(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ImageStore(settings)
    store.ensure_bucket()
    store.put("default/j1/1/0.png", DATA, "image/png", {})
    call = store._s3._make_api_call  # type: ignore[attr-defined]

    def refuse(name: str, arguments: Any) -> Any:
        if name == "DeleteObject":
            raise ClientError({"Error": {"Code": "SlowDown", "Message": "no"}}, name)
        return call(name, arguments)

    monkeypatch.setattr(store._s3, "_make_api_call", refuse)
    assert not store.delete_all("default/j1/")


def test_a_store_on_which_nothing_listens_is_unavailable(dead_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = make_settings(dead_endpoint, "images")
    with pytest.raises(StoreUnavailable, match="images"):
        Images(settings).check()
    with pytest.raises(StoreUnavailable):
        Images(settings).download("k")
    store = ImageStore(settings)
    monkeypatch.setattr("time.sleep", lambda _: None)  # between botocore's tries
    with pytest.raises(StoreUnavailable):
        store.put("k", DATA, "image/png", {})
    with pytest.raises(StoreUnavailable):
        store.ensure_bucket()


def test_time_limits_stay_under_five_seconds(settings: Settings) -> None:
    config = Images(settings)._s3.meta.config
    assert config.retries == {"mode": "standard", "total_max_attempts": 1}
    assert config.connect_timeout + config.read_timeout < 5


def test_a_burst_asks_once_and_a_failure_is_asked_again(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    images = Images(settings)
    calls: list[str] = []
    answers: list[Exception | None] = [ReadTimeoutError(endpoint_url="x"), None]

    def head(name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
        calls.append(name)
        answer = answers.pop(0)
        if answer:
            raise answer
        return {}

    monkeypatch.setattr(images._s3, "_make_api_call", head)
    now = time.monotonic()
    monkeypatch.setattr("latentline.images.time.monotonic", lambda: now)
    for _ in range(20):
        with pytest.raises(StoreUnavailable):
            images.check()
    now += CHECK_CACHE_S
    for _ in range(20):
        images.check()
    assert calls == ["HeadBucket", "HeadBucket"]


def test_a_presigned_url_works(settings: Settings) -> None:
    store = ImageStore(settings)
    store.ensure_bucket()
    store.put("default/ä b/0.png", DATA, "image/png", {})
    url = Images(settings).presign("default/ä b/0.png")
    answer = requests.get(url, timeout=5)  # moto answers requests, and not httpx
    assert answer.status_code == 200
    assert answer.content == DATA
    assert answer.headers["content-type"] == "image/png"


def test_secrets_stay_out_of_repr(settings: Settings) -> None:
    assert "secret'" not in repr(settings).replace("s3_secret_access_key=SecretStr('**********')", "")
