"""Pixels -> an image file that carries its own generation parameters.

PNG files hold the ``parameters`` text that image tools already read, and the same facts as JSON under ``latentline``. WebP
and JPEG files hold the text as the EXIF user comment and the JSON as the EXIF image description.
"""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from latentline.infotext import parameters_text
from latentline.jobs import JobRecord

EXIF_IFD, EXIF_USER_COMMENT, EXIF_DESCRIPTION = 0x8769, 0x9286, 0x010E

Pixels = npt.NDArray[np.uint8]  # (height, width, 3)


def encode_preview(pixels: Pixels) -> str:
    """(height, width, 3) pixels of a preview as a ``data:`` URL: WebP of a few kilobytes at most."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def encode_image(pixels: Pixels, record: JobRecord, seed: int) -> bytes:
    """(height, width, 3) pixels -> a file in the job's output format, with the parameters inside."""
    image = Image.fromarray(pixels)
    r = record.request
    text = parameters_text(record, seed, image.width, image.height)
    fields = {"model", "prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "scheduler", "loras"}
    data = r.model_dump(mode="json", include=fields)
    facts = json.dumps({"job_id": record.id, **data, "seed": seed, "width": image.width, "height": image.height})
    buffer = io.BytesIO()
    if r.output.format == "png":
        info = PngInfo()
        info.add_itxt("parameters", text) if not text.isascii() else info.add_text("parameters", text)
        info.add_text("latentline", facts)
        image.save(buffer, "PNG", pnginfo=info)
    else:
        exif = Image.Exif()
        exif[EXIF_DESCRIPTION] = facts
        exif.get_ifd(EXIF_IFD)[EXIF_USER_COMMENT] = b"UNICODE\x00" + text.encode("utf-16-be")
        image.save(buffer, r.output.format.upper(), quality=r.output.quality, exif=exif)
    return buffer.getvalue()
