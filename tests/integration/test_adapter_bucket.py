"""Adapters under a prefix of a real bucket: found without fetching them, fetched when a job names one, checked, and kept within a bound."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from support.tiny import tiny_pipeline

from latentline.errors import InvalidRequest, LatentlineError, ModelError, StoreUnavailable
from latentline.images import connect_s3
from latentline.jobs import StoredLora
from latentline.settings import Settings
from latentline_worker.models.lora import Adapters, Bucket, Target
from latentline_worker.models.lora import bucket as bucket_module
from latentline_worker.settings import WorkerSettings

BUCKET = "adapters"


@pytest.fixture(scope="module")
def target() -> Target:
    pipeline = tiny_pipeline()
    return Target(type(pipeline), {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder})


def file_of(target: Target, seed: int, *, attention: str = "attn1", padding: int = 0) -> bytes:
    """An adapter of rank 2, in peft's format."""
    generator, made = torch.Generator().manual_seed(seed), {}
    for name, layer in target.modules["unet"].named_modules():
        if name.endswith("attn1.to_q") and isinstance(layer, torch.nn.Linear):
            changed = name.replace("attn1", attention)
            made[f"unet.{changed}.lora_A.weight"] = torch.randn(2, layer.in_features, generator=generator)
            made[f"unet.{changed}.lora_B.weight"] = torch.randn(layer.out_features, 2, generator=generator)
    return save(made, {"padding": "x" * padding})


class Shelf:
    """A prefix of the bucket that belongs to one test."""

    def __init__(self, settings: Settings, prefix: str, cache: Path, max_bytes: int = 1 << 30) -> None:
        self.s3 = connect_s3(settings, read_timeout_s=10)
        with contextlib.suppress(self.s3.exceptions.BucketAlreadyOwnedByYou, self.s3.exceptions.BucketAlreadyExists):
            self.s3.create_bucket(Bucket=BUCKET)
        self.prefix, self.cache = prefix, cache
        self.bucket = Bucket(self.s3, BUCKET, prefix, cache, max_bytes)

    def put(self, name: str, data: bytes) -> None:
        self.s3.put_object(Bucket=BUCKET, Key=self.prefix + name, Body=data)

    def kept(self) -> list[bytes]:
        return sorted(path.read_bytes() for path in self.cache.iterdir())

    def adapters(self, target: Target) -> Adapters:
        return Adapters([self.bucket], target, slots=2, rank=16)

    def rescan(self, adapters: Adapters) -> bool:
        self.bucket.look_again()
        return adapters.rescan()


@pytest.fixture
def shelf(store_settings: Settings, tmp_path: Path) -> Shelf:
    return Shelf(store_settings, f"public/{tmp_path.name}/", tmp_path / "cache")


def named(*names: str) -> list[StoredLora]:
    return [StoredLora(name=name) for name in names]


def read_anew(adapters: Adapters, name: str) -> Any:
    adapters._cache.clear()
    return adapters.find(named(name)).parts


def test_adapters_are_found_by_their_heads_and_fetched_when_they_are_named(
    shelf: Shelf, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket_module, "HEAD_BYTES", 64)  # so that a second read is needed
    data = file_of(target, 1)
    shelf.put("good.safetensors", data)
    shelf.put("alien.safetensors", file_of(target, 1, attention="attn9"))
    shelf.put("cut.safetensors", data[:-100])
    shelf.put("text.safetensors", b"this is not what its name says")
    shelf.put("notes.txt", b"no adapter")
    shelf.put("deeper/hidden.safetensors", data)
    adapters = shelf.adapters(target)
    assert adapters.names == ("good",) and set(adapters.refused) == {"alien", "cut", "text"}
    assert "this model has no such layer" in adapters.refused["alien"] and "cannot be read as safetensors" in adapters.refused["text"]
    assert shelf.kept() == [], "nothing was fetched"

    found = adapters.find(named("good")).parts
    assert found == (("good", hashlib.sha256(data).hexdigest(), 1.0),)
    assert shelf.kept() == [data]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shelf.s3, "get_object", None)
        assert read_anew(adapters, "good") == found, "it is on this machine's disk"
    for name in ("notes", "hidden"):
        with pytest.raises(InvalidRequest):
            adapters.find(named(name))


def test_adapters_that_come_change_and_go_are_noticed(shelf: Shelf, target: Target) -> None:
    adapters = shelf.adapters(target)
    assert adapters.names == ()
    shelf.put("one.safetensors", file_of(target, 1))
    assert not adapters.rescan(), "a listing is used for a minute"
    assert shelf.rescan(adapters) and adapters.names == ("one",)
    before = read_anew(adapters, "one")
    shelf.put("one.safetensors", file_of(target, 2, padding=3))
    assert read_anew(adapters, "one") == before, "until it is looked at again"
    for path in shelf.cache.iterdir():
        path.unlink()
    with pytest.raises(StoreUnavailable, match="adapter one has changed in its bucket"):
        read_anew(adapters, "one")
    assert not adapters.rescan() and read_anew(adapters, "one") != before, "the failure made the next look a new one"
    shelf.s3.delete_object(Bucket=BUCKET, Key=f"{shelf.prefix}one.safetensors")
    assert shelf.rescan(adapters) and adapters.names == ()


def test_sums_beside_the_adapters_are_held(shelf: Shelf, target: Target) -> None:
    good, other = file_of(target, 1), file_of(target, 2)
    for name, data in (("good", good), ("wrong", other), ("unknown", other)):
        shelf.put(f"{name}.safetensors", data)
    digest = hashlib.sha256(good).hexdigest()
    shelf.put("SHA256SUMS", f"{digest}  good.safetensors\n{digest} *wrong.safetensors\n".encode())
    adapters = shelf.adapters(target)
    assert adapters.names == ("good", "wrong")
    assert adapters.refused == {"unknown": "adapter unknown: it is not in SHA256SUMS beside it; allowed: those that are"}
    assert adapters.find(named("good")).parts[0][1] == digest
    with pytest.raises(ModelError, match=rf"adapter wrong: its SHA-256 sum is {hashlib.sha256(other).hexdigest()}; allowed: {digest}"):
        adapters.find(named("wrong"))
    assert shelf.kept() == [good], "what is not as it should be is not kept"


def test_the_folder_stays_within_its_bound(store_settings: Settings, target: Target, tmp_path: Path) -> None:
    data = [file_of(target, seed) for seed in range(4)]
    shelf = Shelf(store_settings, f"bound/{tmp_path.name}/", tmp_path / "cache", max_bytes=2 * len(data[0]) + 10)
    for number, one in enumerate(data):
        shelf.put(f"a{number}.safetensors", one)
    shelf.put("large.safetensors", file_of(target, 9, padding=3 * len(data[0])))
    adapters = shelf.adapters(target)
    assert "bytes; allowed: " in adapters.refused["large"] and adapters.names == ("a0", "a1", "a2", "a3")
    for name in ("a0", "a1", "a0", "a2"):
        read_anew(adapters, name)
    assert shelf.kept() == sorted([data[0], data[2]]), "the one used least recently went"


def test_a_bucket_that_is_not_there_is_named(store_settings: Settings, target: Target, tmp_path: Path) -> None:
    bucket = Bucket(connect_s3(store_settings, read_timeout_s=10), "no-such-bucket-here", "x/", tmp_path, 1 << 20)
    with pytest.raises(LatentlineError, match=r"cannot list adapters in s3://no-such-bucket-here/x/: "):
        Adapters([bucket], target, slots=1, rank=4)


@pytest.mark.parametrize("prefix", ["adapters/x/", "s3://adapters", "s3://adapters/x", "s3://ADAPTERS/x/", "s3://adapters//"])
def test_a_prefix_without_meaning_is_refused(prefix: str) -> None:
    with pytest.raises(ValueError, match=r"allowed: s3://BUCKET/PREFIX/"):
        WorkerSettings(lora_prefix=prefix)


def test_adapters_do_not_lie_where_pictures_expire() -> None:
    given: dict[str, Any] = {"lora_prefix": "s3://images/adapters/", "s3_bucket": "images"}
    with pytest.raises(ValueError, match=r"lora_prefix: got 's3://images/adapters/'; allowed: another bucket than that of the pictures"):
        WorkerSettings(**given)
