"""Pictures small enough for a chat: hosts refuse or cut an answer of about a megabyte, and models look at about a thousand pixels."""

from __future__ import annotations

import io

from PIL import Image

MAX_SIDE_PX = 1024
QUALITIES = (85, 70, 55, 40)
KINDS = {"WEBP": "image/webp", "JPEG": "image/jpeg"}


def for_chat(data: bytes, max_bytes: int) -> tuple[bytes, str]:
    """A picture of at most so many bytes and 1024 pixels a side, and its media type.

    One that is small enough already, and WebP or JPEG, is left as it is. Any other becomes WebP, as good as the bytes allow; where
    the lowest quality is still too large, it is made half as wide and high.
    """
    with Image.open(io.BytesIO(data)) as image:
        if image.format in KINDS and len(data) <= max_bytes and max(image.size) <= MAX_SIDE_PX:
            return data, KINDS[image.format]
        picture = image.convert("RGB")
    picture.thumbnail((MAX_SIDE_PX, MAX_SIDE_PX))
    while True:
        for quality in QUALITIES:
            written = io.BytesIO()
            picture.save(written, "WEBP", quality=quality)  # nothing of the file's metadata: the prompt is not part of the answer
            if written.tell() <= max_bytes or max(picture.size) <= 16:
                return written.getvalue(), KINDS["WEBP"]
        picture = picture.resize((max(1, picture.width // 2), max(1, picture.height // 2)))
