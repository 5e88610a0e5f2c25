"""Pixels -> an image file that carries its own provenance.

PNG files hold the ``parameters`` text that image tools already read, and all that made the picture as JSON under ``latentline``
(:class:`latentline.provenance.Provenance`). WebP and JPEG files hold the text as the EXIF user comment and the JSON as the EXIF
image description.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from latentline.infotext import parameters_text
from latentline.jobs import JobRecord, StoredOutput
from latentline.provenance import Made, Provenance

FACTS = "latentline"  # the PNG text that holds the JSON
EXIF_IFD, EXIF_USER_COMMENT, EXIF_DESCRIPTION = 0x8769, 0x9286, 0x010E
MAX_EXIF_BYTES = 65_000  # one JPEG segment holds 65,533; a prompt of 2000 emoji alone takes 24,000 in the JSON

NO_DIGEST = "0" * 64
_PLACE = b'"pixels_sha256": "%s"'  # as JSON writes it; in a value of the JSON the quotes would be escaped

Pixels = npt.NDArray[np.uint8]  # (height, width, 3)


def encode_preview(pixels: Pixels) -> str:
    """(height, width, 3) pixels of a preview as a ``data:`` URL: WebP of a few kilobytes at most."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def encode_image(pixels: Pixels, record: JobRecord, seed: int, made: Made) -> tuple[bytes, str]:
    """(height, width, 3) pixels -> a file in the job's output format that holds its provenance, and the digest of its pixels."""
    image = Image.fromarray(pixels)
    lossless = record.request.output.format == "png"
    digest = pixels_digest(image) if lossless else NO_DIGEST
    facts = _provenance(record, seed, image.size, made, digest).model_dump_json()
    text = parameters_text(record, seed, *image.size)
    if lossless:
        return _png(image, text, facts), digest
    data = _lossy(image, record.request.output, text, facts)
    # What a reader decodes is known only now. The digest goes into its place in the file, which nothing else in it depends on.
    with Image.open(io.BytesIO(data)) as decoded:
        digest = pixels_digest(decoded)
    return data.replace(_PLACE % NO_DIGEST.encode(), _PLACE % digest.encode()), digest


def pixels_digest(image: Image.Image) -> str:
    """SHA-256 of the decoded pixels: RGB, 8 bits, row by row."""
    return hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()


def _provenance(record: JobRecord, seed: int, size: tuple[int, int], made: Made, digest: str) -> Provenance:
    fields = {"model", "prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "scheduler", "loras", "output"}
    said = record.request.model_dump(include=fields)
    width, height = size
    return Provenance(job_id=record.id, **said, seed=seed, width=width, height=height, made=made, pixels_sha256=digest)


def _png(image: Image.Image, text: str, facts: str) -> bytes:
    info = PngInfo()
    for key, value in (("parameters", text), (FACTS, facts)):
        info.add_text(key, value) if value.isascii() else info.add_itxt(key, value)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def _lossy(image: Image.Image, output: StoredOutput, text: str, facts: str) -> bytes:
    """A JPEG or WebP file."""
    exif = Image.Exif()
    exif[EXIF_DESCRIPTION] = json.dumps(json.loads(facts))  # in ASCII, as EXIF wants it
    comment = b"UNICODE\x00" + text.encode("utf-16-be")
    if len(exif.tobytes()) + len(comment) < MAX_EXIF_BYTES:  # the JSON says the same
        exif.get_ifd(EXIF_IFD)[EXIF_USER_COMMENT] = comment
    buffer = io.BytesIO()
    image.save(buffer, output.format.upper(), quality=output.quality, exif=exif)
    return buffer.getvalue()
