"""ImageStore and Images against a real S3 server: signatures, checksums and other things that moto does not check."""

from __future__ import annotations

import hashlib
import os

import httpx
import pytest
from botocore.exceptions import ClientError
from pydantic import SecretStr

from latentline.errors import ConfigurationError, StoreUnavailable
from latentline.images import Images, connect_s3
from latentline.settings import Settings
from latentline_worker.images.store import ImageStore

KEY = "default/j1/1/0.png"


@pytest.fixture
def data(store_settings: Settings) -> bytes:
    made = os.urandom(300_000)
    store = ImageStore(store_settings)
    store.ensure_bucket()
    store.put(KEY, made, "image/png", {"job-id": "j1", "seed": "1"})
    return made


def get(url: str) -> httpx.Response:
    return httpx.get(url, trust_env=False, timeout=10)


def test_a_presigned_url_gives_the_same_bytes(store_settings: Settings, data: bytes) -> None:
    answer = get(Images(store_settings).presign(KEY))
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "image/png"
    assert hashlib.sha256(answer.content).digest() == hashlib.sha256(data).digest()


def test_tampered_and_unsigned_urls_are_refused(store_settings: Settings, data: bytes) -> None:
    ImageStore(store_settings).put("default/j2/1/0.png", b"another tenant's", "image/png", {})
    url = Images(store_settings).presign(KEY)
    last = url[-1]
    assert get(url[:-1] + ("0" if last != "0" else "1")).status_code == 403
    assert get(url.replace("/j1/", "/j2/")).status_code == 403
    assert get(url.replace("X-Amz-Expires=3600", "X-Amz-Expires=360000")).status_code == 403
    assert get(url.split("?")[0]).status_code == 403


def test_delete_all_deletes_what_lies_under_its_prefix_and_nothing_else(store_settings: Settings) -> None:
    store, images = ImageStore(store_settings), Images(store_settings)
    store.ensure_bucket()
    gone = [f"default/gone/{attempt}/{i}.png" for attempt in (1, 2) for i in range(3)]
    kept = ["default/gone-not/1/0.png", "other/gone/1/0.png"]
    for key in gone + kept:
        store.put(key, b"picture", "image/png", {})
    assert store.delete_all("default/gone/")
    for key in gone:
        with pytest.raises(StoreUnavailable, match="NoSuchKey"):
            images.download(key)
    assert [images.download(key) for key in kept] == [b"picture"] * 2
    assert store.delete_all("default/gone/"), "nothing left to delete is no failure"


def test_damage_on_the_way_is_noticed(store_settings: Settings) -> None:
    s3 = connect_s3(store_settings, read_timeout_s=5)
    with pytest.raises(ClientError) as caught:
        s3.put_object(Bucket=store_settings.s3_bucket, Key="bad", Body=b"sent", ContentMD5="AAAAAAAAAAAAAAAAAAAAAA==")
    assert caught.value.response["Error"]["Code"] in ("BadDigest", "InvalidDigest")


@pytest.mark.parametrize("field", ["s3_access_key_id", "s3_secret_access_key"])
def test_wrong_credentials(store_settings: Settings, field: str) -> None:
    wrong = store_settings.model_copy(update={field: SecretStr("f" * 20)})
    store = ImageStore(wrong)
    with pytest.raises(ConfigurationError):
        store.ensure_bucket()
    with pytest.raises(ConfigurationError):
        store.put("k", b"x", "image/png", {})
    with pytest.raises(StoreUnavailable):
        Images(wrong).check()


def test_a_bucket_is_made_when_it_is_missing(store_settings: Settings) -> None:
    fresh = store_settings.model_copy(update={"s3_bucket": "made-by-a-test"})
    with pytest.raises(StoreUnavailable):
        Images(fresh).check()
    ImageStore(fresh).ensure_bucket()
    Images(fresh).check()
