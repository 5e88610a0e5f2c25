"""A labelled sheet of pictures: what ``latentline grid`` writes. Needs Pillow."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from .picture_file import decode

LEAST, MOST = 160, 512  # pixels of a cell's longer side: small pictures are enlarged by a whole factor, large ones reduced
GAP, MARGIN, LINE = 8, 12, 22
FONT_PX, TITLE_PX = 14, 16
PAPER, INK, FAINT, EMPTY = "#ffffff", "#1a1a1a", "#5a5a5a", "#eeeeee"


@dataclass(frozen=True)
class Sheet:
    """What is drawn. ``pictures`` by (column, row): an image, or why there is none."""

    title: str
    subtitle: str
    columns: Sequence[str]
    rows: Sequence[str]
    """Empty for a sheet of one row without a label."""
    pictures: Mapping[tuple[int, int], Image.Image | str]
    facts: Mapping[str, Any]
    """Kept in the file as JSON."""


def opened(data: bytes, job_id: str) -> Image.Image:
    """A job's picture."""
    return decode(data, f"the picture of job {job_id}").convert("RGB")


def draw(sheet: Sheet) -> bytes:
    """The sheet as a PNG file."""
    font, bold = ImageFont.load_default(FONT_PX), ImageFont.load_default(TITLE_PX)
    shown = {place: one if isinstance(one, str) else _sized(one) for place, one in sheet.pictures.items()}
    sizes = [one.size for one in shown.values() if isinstance(one, Image.Image)] or [(LEAST, LEAST)]
    wide, high = max(width for width, _ in sizes), max(height for _, height in sizes)
    left = MARGIN + (min(3 * LEAST, max(math.ceil(font.getlength(_plain(one))) for one in sheet.rows)) + GAP if sheet.rows else 0)
    top = MARGIN + 3 * LINE + GAP
    size = (left + len(sheet.columns) * (wide + GAP) - GAP + MARGIN, top + max(1, len(sheet.rows)) * (high + GAP) - GAP + MARGIN)
    page = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(page)
    pen.text((MARGIN, MARGIN), _fitted(sheet.title, bold, size[0] - 2 * MARGIN), INK, bold)
    pen.text((MARGIN, MARGIN + LINE), _fitted(sheet.subtitle, font, size[0] - 2 * MARGIN), FAINT, font)
    for column, label in enumerate(sheet.columns):
        pen.text((left + column * (wide + GAP) + wide / 2, top - GAP), _fitted(label, font, wide), INK, font, anchor="md")
    for row, label in enumerate(sheet.rows):
        middle = top + row * (high + GAP) + high / 2
        pen.text((left - GAP, middle), _fitted(label, font, left - MARGIN - GAP), INK, font, anchor="rm")
    for (column, row), one in shown.items():
        corner = left + column * (wide + GAP), top + row * (high + GAP)
        if isinstance(one, Image.Image):
            page.paste(one, (corner[0] + (wide - one.width) // 2, corner[1] + (high - one.height) // 2))
            continue
        pen.rectangle((*corner, corner[0] + wide - 1, corner[1] + high - 1), EMPTY)
        pen.text((corner[0] + wide / 2, corner[1] + high / 2), _fitted(one, font, wide - GAP), INK, font, anchor="mm")
    info, file = PngInfo(), io.BytesIO()
    info.add_text("latentline", json.dumps({"grid": 1, **sheet.facts}))
    page.save(file, "PNG", pnginfo=info)
    return file.getvalue()


def _sized(image: Image.Image) -> Image.Image:
    """Enlarged without smoothing, so that its pixels stay what they are, or reduced."""
    longer = max(image.size)
    if longer > MOST:
        return image.resize((image.width * MOST // longer, image.height * MOST // longer), Image.Resampling.LANCZOS)
    factor = max(1, math.ceil(LEAST / longer))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _plain(text: str) -> str:
    """On one line, without control characters."""
    return "".join(c if c.isprintable() else " " for c in text)


def _fitted(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """The text, cut to a width in pixels."""
    text = _plain(text)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
