"""ImageStore and Images against a real S3 server: signatures, checksums and other things that moto does not check."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from datetime import UTC, datetime

import httpx
import pytest
from botocore.exceptions import ClientError
from pydantic import SecretStr

from latentline.errors import ConfigurationError, StoreUnavailable
from latentline.images import Images, connect_s3
from latentline.settings import Settings
from latentline_worker.callbacks.message import Links
from latentline_worker.embedded.store import Store
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


def test_a_url_is_signed_for_the_name_by_which_clients_reach_the_store(store_settings: Settings, data: bytes) -> None:
    assert store_settings.s3_endpoint_url is not None
    public = store_settings.s3_endpoint_url.replace("127.0.0.1", "localhost")
    url = Images(store_settings.model_copy(update={"s3_public_endpoint_url": public + "/"})).presign(KEY)
    assert url.startswith(f"{public}/images/{KEY}?")
    assert get(url).content == data
    assert get(url.replace("localhost", "127.0.0.1")).status_code == 403  # the name is part of what is signed


def test_the_deliverers_keys_open_pictures_and_change_nothing(real_store: Store, data: bytes) -> None:
    reader = Settings.from_variables(real_store.reader_environment)
    links = Links.of(reader)
    assert links is not None
    url, until = links.sign(KEY)
    assert get(url).content == data and (until - datetime.now(UTC)).total_seconds() <= reader.presign_ttl_s
    s3 = connect_s3(reader, read_timeout_s=5)
    bucket = reader.s3_bucket
    attempts: list[Callable[[], object]] = [
        lambda: s3.put_object(Bucket=bucket, Key=KEY, Body=b"mine"),
        lambda: s3.put_object(Bucket=bucket, Key="new", Body=b"mine"),
        lambda: s3.delete_object(Bucket=bucket, Key=KEY),
        lambda: s3.copy_object(Bucket=bucket, Key="copy", CopySource={"Bucket": bucket, "Key": KEY}),
        lambda: s3.list_objects_v2(Bucket=bucket),
        lambda: s3.list_buckets(),
        lambda: s3.create_bucket(Bucket="mine"),
        lambda: s3.delete_bucket(Bucket=bucket),
        lambda: s3.put_bucket_lifecycle_configuration(Bucket=bucket, LifecycleConfiguration={"Rules": []}),
    ]
    for number, attempt in enumerate(attempts):
        try:
            answer = attempt()
        except ClientError as error:
            assert error.response["Error"]["Code"] in ("AccessDenied", "403"), number
        else:  # some stores answer a list of buckets, and leave out those that the keys may not list
            assert not answer.get("Buckets", [0]), number  # type: ignore[attr-defined]
    assert get(url).content == data


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
