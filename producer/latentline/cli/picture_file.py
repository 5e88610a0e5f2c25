"""Picture files as ``verify`` and ``grid`` read them. Needs Pillow, so commands load this module when they run."""

from __future__ import annotations

import hashlib
import io
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops, ImageStat, UnidentifiedImageError
from pydantic import ValidationError

from latentline.errors import InvalidRequest
from latentline.provenance import Provenance
from latentline.requests import MAX_SIZE_PX

MAX_FILE_BYTES = 32 << 20  # the largest picture, 2048 x 2048 pixels, has 12 MiB of them
ALLOWED = "a PNG, WebP or JPEG file that latentline made"
FACTS, EXIF_DESCRIPTION = "latentline", 0x010E


@dataclass(frozen=True)
class Picture:
    """A file's pixels, and what it says of how they were made."""

    image: Image.Image  # RGB
    says: Provenance

    @property
    def digest(self) -> str:
        """Of the pixels that it holds (:attr:`Provenance.pixels_sha256` says which it was made with)."""
        return hashlib.sha256(self.image.tobytes()).hexdigest()


def read_file(path: Path) -> Picture:
    """A picture of ours from a file.

    Raises:
        InvalidRequest: there is no such file, it is too large, no picture, or not one of ours.
    """
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise InvalidRequest("FILE", f"{path.name} of {size} bytes", f"{MAX_FILE_BYTES} bytes at most")
        data = path.read_bytes()
    except OSError as error:
        raise InvalidRequest("FILE", str(path), f"a file that can be read ({error.strerror})") from None
    return read(data, path.name)


def read(data: bytes, name: str) -> Picture:
    """A picture of ours; raises InvalidRequest as :func:`read_file`."""
    image = decode(data, name)
    return Picture(image.convert("RGB"), _provenance(image, name))


def decode(data: bytes, name: str) -> Image.Image:
    """The pixels of a file, also of one that latentline did not make; raises InvalidRequest for what is no picture."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=("PNG", "WEBP", "JPEG"))
            if max(image.size) > MAX_SIZE_PX:
                raise InvalidRequest(
                    "FILE", f"{name} of {image.width} x {image.height} pixels", f"{MAX_SIZE_PX} pixels at most on each side"
                )
            image.load()
    except UnidentifiedImageError:
        raise InvalidRequest("FILE", name, f"{ALLOWED}; this is no picture of these formats") from None
    except InvalidRequest:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds for damaged files, SyntaxError and struct.error among them
        raise InvalidRequest("FILE", name, f"{ALLOWED}; this one is damaged ({error})") from None
    return image


def _provenance(image: Image.Image, name: str) -> Provenance:
    text = image.info.get(FACTS) if image.format == "PNG" else image.getexif().get(EXIF_DESCRIPTION)
    if text is None:
        other = "it has parameters of another program" if "parameters" in image.info else "it does not say how it was made"
        raise InvalidRequest("FILE", name, f"{ALLOWED}; {other}")
    try:
        facts: Any = json.loads(text)
    except ValueError:
        raise InvalidRequest("FILE", name, f"{ALLOWED}; its metadata is that of another program") from None
    if not isinstance(facts, dict) or "provenance" not in facts:
        what = (
            "it is a sheet of latentline grid"
            if isinstance(facts, dict) and "grid" in facts
            else "its metadata does not say how to make it again"
        )
        raise InvalidRequest("FILE", name, f"{ALLOWED}; {what}")
    try:
        return Provenance.model_validate(facts)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise InvalidRequest("FILE", name, f"{ALLOWED}; its metadata is damaged at {place!r} ({first['msg']})") from None


def largest_difference(one: Image.Image, other: Image.Image) -> int:
    """Of any value of any pixel, 0 to 255."""
    extrema: Any = ImageChops.difference(one, other).getextrema()
    return int(max(high for _, high in extrema))


def mean_square(one: Image.Image, other: Image.Image) -> float:
    """The mean square difference over all values."""
    squares = ImageStat.Stat(ImageChops.difference(one, other)).sum2
    return float(sum(squares) / (len(squares) * one.width * one.height))
