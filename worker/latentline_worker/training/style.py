"""Pictures of the held-back style with captions: what an adapter is trained on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from PIL import Image

from .concepts import make_concept, object_words
from .errors import TrainingError
from .folders import CAPTIONS
from .manifest import HELD_BACK_STYLE, rows
from .pictures import SPRITE_PX

MARGIN_PX = 12  # on each side: objects fill as much of a picture as the training pictures' single objects


def write_style(data: Path, target: Path, count: int) -> int:
    """Write ``count`` pictures of the held-back style on white, and their captions; how many there are.

    Which ones is decided by a hash of their names, so that it is always the same ones.

    Raises:
        TrainingError: there is no data set, a picture of it is broken, or ``target`` cannot be written.
    """
    found = [row for row in rows(data) if row["style"] == HELD_BACK_STYLE]
    if not found:
        raise TrainingError(f"{data}: has no pictures of the style {HELD_BACK_STYLE}")
    found.sort(key=lambda row: hashlib.sha256(row["key"].encode()).digest())
    lines = []
    try:
        target.mkdir(parents=True, exist_ok=True)
        for row in found[:count]:
            concept = make_concept(row["key"], row["label"])
            with Image.open(data / row["file"]) as image:
                sprite = image.convert("RGBA").resize((SPRITE_PX, SPRITE_PX), Image.Resampling.BILINEAR)
            side = SPRITE_PX + 2 * MARGIN_PX
            picture = Image.new("RGB", (side, side), "white")
            picture.paste(sprite, (MARGIN_PX, MARGIN_PX), sprite)
            picture.save(target / f"{row['key']}.png")
            words = object_words(concept.noun, concept.own_colour)
            lines.append({"file": f"{row['key']}.png", "caption": f"{words}, {HELD_BACK_STYLE} style"})
        (target / CAPTIONS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    except OSError as error:
        raise TrainingError(f"{target}: the pictures cannot be written: {error}") from error
    return len(lines)
