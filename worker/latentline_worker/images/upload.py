"""Decoded image -> file -> object store -> the reference that the record keeps. Runs on task threads, away from the device."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from latentline.jobs import Claim, ImageRef
from latentline.provenance import Made

from .encode import Pixels, encode_image
from .store import ImageStore


class Uploader:
    """Encodes and uploads one job's images on the calling thread."""

    def __init__(self, store: ImageStore) -> None:
        self._store = store

    def upload(self, claim: Claim, images: Sequence[Pixels], made: Made) -> tuple[ImageRef, ...]:
        """Encode and upload images of shape (height, width, 3).

        The object key carries the attempt, so that a worker whose lease was lost cannot overwrite its successor's images.

        Raises:
            ConfigurationError: the store refuses this worker's credentials.
            StoreUnavailable: the store does not answer, or cannot take the images now.
        """
        record = claim.record
        refs = []
        for i, pixels in enumerate(images):
            seed = record.request.seed + i
            output = record.request.output
            data, digest = encode_image(pixels, record, seed, made)
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
                    pixels_sha256=digest,
                )
            )
        return tuple(refs)
