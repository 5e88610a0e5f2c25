"""Encoding and uploading one job's images: what the record then says of them."""

from __future__ import annotations

import hashlib
import io
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image
from support.stubs import MemoryStore

from latentline.errors import StoreUnavailable
from latentline.jobs import Claim, JobRecord, JobRequest, Status, resolve
from latentline.provenance import Made
from latentline_worker.images.upload import Uploader

PIXELS = [np.full((16, 24, 3), level, dtype=np.uint8) for level in (10, 200)]

MADE = Made(weights="w", dtype="float32", sampler="s", device="cpu")


def claim(attempt: int = 1, **output: Any) -> Claim:
    request = JobRequest.parse({"prompt": "a cat", "seed": 7, "num_images": 2, "tenant": "acme", "output": output})
    record = JobRecord(id="j1", request=resolve(request).request, status=Status.RUNNING, num_steps=20, created_at=0, attempt=attempt)
    return Claim(record=record, token=attempt)


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def uploader(store: MemoryStore) -> Uploader:
    return Uploader(cast(Any, store))


def test_the_references_describe_what_was_stored(store: MemoryStore, uploader: Uploader) -> None:
    refs = uploader.upload(claim(format="webp"), PIXELS, MADE)
    assert [ref.seed for ref in refs] == [7, 8]
    assert {(ref.width, ref.height, ref.content_type) for ref in refs} == {(24, 16, "image/webp")}
    for ref in refs:
        data = store.objects[ref.key]
        assert (ref.sha256, ref.num_bytes) == (hashlib.sha256(data).hexdigest(), len(data))
        image = Image.open(io.BytesIO(data))
        assert image.size == (24, 16) and ref.pixels_sha256 == hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()


def test_each_attempt_has_keys_of_its_own(store: MemoryStore, uploader: Uploader) -> None:
    first, second = ([ref.key for ref in uploader.upload(claim(attempt), PIXELS, MADE)] for attempt in (1, 2))
    assert first == ["acme/j1/1/0.png", "acme/j1/1/1.png"]
    assert second == ["acme/j1/2/0.png", "acme/j1/2/1.png"]
    assert len(store.objects) == 4, "an attempt overwrites nothing of another"


def test_a_store_that_does_not_answer_is_passed_on(store: MemoryStore, uploader: Uploader) -> None:
    store.problem = StoreUnavailable("away")
    with pytest.raises(StoreUnavailable, match="away"):
        uploader.upload(claim(), PIXELS, MADE)
