"""Decoded image -> file -> storage -> what the record says of it."""

from __future__ import annotations

import hashlib
from typing import Protocol

import torch

from latentline.jobs import Claim, ImageRef

from .engine.decoder import Decoder, Pixels
from .metadata import encode_image


class Store(Protocol):
    """Where images go (``storage.ImageStore``)."""

    def put(self, key: str, data: bytes, content_type: str, metadata: dict[str, str]) -> None: ...


class Delivery:
    """Decodes, encodes and uploads one job's images on the calling thread."""

    def __init__(self, decoder: Decoder, store: Store) -> None:
        self._decoder = decoder
        self._store = store

    def decode(self, latents: torch.Tensor) -> list[Pixels]:
        """(images, c, h, w) latents -> pixels; shares the decoder's micro-batches with other jobs."""
        futures = [self._decoder.decode(image) for image in latents]
        return [future.result() for future in futures]

    def upload(self, claim: Claim, images: list[Pixels]) -> tuple[ImageRef, ...]:
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
