"""Decoded image -> file -> storage -> what the record says of it. On task threads, away from the device."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol

from latentline.jobs import Claim, ImageRef

from .encode import Pixels, encode_image


class Store(Protocol):
    """Where images go (``store.ImageStore``)."""

    def put(self, key: str, data: bytes, content_type: str, metadata: dict[str, str]) -> None: ...


class Delivery:
    """Encodes and uploads one job's images on the calling thread."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def upload(self, claim: Claim, images: Sequence[Pixels]) -> tuple[ImageRef, ...]:
        """Encode and upload; the key carries the attempt, so that an outdated worker overwrites nothing.

        Raises:
            StoreUnavailable: the object store does not take them.
        """
        record = claim.record
        refs = []
        for i, pixels in enumerate(images):
            seed = record.request.seed + i
            output = record.request.output
            data = encode_image(pixels, record, seed)
            key = f"{record.request.tenant}/{record.id}/{record.attempt}/{i}.{output.format}"
            self._store.put(key, data, output.content_type, {"job-id": record.id, "seed": str(seed)})
            height, width = pixels.shape[:2]
            refs.append(
                ImageRef(
                    key=key,
                    seed=seed,
                    width=width,
                    height=height,
                    content_type=output.content_type,
                    sha256=hashlib.sha256(data).hexdigest(),
                    num_bytes=len(data),
                )
            )
        return tuple(refs)
