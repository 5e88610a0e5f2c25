"""A folder of pictures with captions as training data.

Captions come from ``captions.jsonl`` (lines of ``{"file": "cat.png", "caption": "a cat"}``) where there is one, else
from the file names: ``a_red_cat-01.png`` says "a red cat". What cannot be used is named and left out; a folder
in which too little remains is refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import TrainingError
from .seeds import python_random

CAPTIONS = "captions.jsonl"
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
HELD_OUT_SHARE = 0.05
MAX_NAMED = 20  # pictures left out that are named one by one; the rest are counted


class FolderData:
    """Pictures of a folder, scaled and cropped to squares, in memory.

    A picture of another size or shape is scaled until its shorter side fits; the crop along its longer side is drawn
    anew each time, flips are not made. Held out is the twentieth part with the lowest hash of its file name.

    Args:
        size_px: side of the squares.
        need_captions: leave out pictures whose caption is empty.

    Raises:
        TrainingError: fewer than two pictures can be used, or the captions file is broken.
    """

    def __init__(self, folder: Path, size_px: int, say: Callable[[str], None], need_captions: bool = True) -> None:
        self.size_px = size_px
        pictures: list[tuple[str, Image.Image, str]] = []
        left_out: list[str] = []
        for path, caption in _captions(folder):
            if need_captions and not caption:
                left_out.append(f"{path.name}: its caption is empty")
                continue
            try:
                with Image.open(path) as image:
                    pictures.append((path.name, _scale(image, size_px), caption))
            except (OSError, UnidentifiedImageError, Image.DecompressionBombError, ValueError) as error:
                left_out.append(f"{path.name}: {error}")
        for line in left_out[:MAX_NAMED]:
            say(f"left out {line}")
        if len(left_out) > MAX_NAMED:
            say(f"left out {len(left_out) - MAX_NAMED} more")
        if len(pictures) < 2:
            raise TrainingError(f"{folder}: {len(pictures)} usable pictures, at least 2 are needed ({len(left_out)} left out)")
        pictures.sort(key=lambda one: hashlib.sha256(one[0].encode()).digest())
        num_held_out = max(1, round(HELD_OUT_SHARE * len(pictures)))
        self.kept_back, self.trained = pictures[:num_held_out], pictures[num_held_out:]
        self.num_items = len(self.trained)

    def batch(self, seed: int, step: int, rank: int, count: int) -> list[Image.Image]:
        """``count`` square RGB training pictures."""
        rng = python_random(seed, step, rank, "pictures")
        return [self._crop(rng.choice(self.trained)[1], rng.random()) for _ in range(count)]

    def held_out(self, count: int) -> list[Image.Image]:
        """Up to ``count`` pictures that are never trained on, cropped in the middle."""
        return [self._crop(image, 0.5) for _, image, _ in self.kept_back[:count]]

    def held_out_pairs(self, count: int) -> list[tuple[Image.Image, str]]:
        """The same pictures with their captions."""
        return [(self._crop(image, 0.5), caption) for _, image, caption in self.kept_back[:count]]

    def item(self, index: int, number: int) -> tuple[Image.Image, str]:
        """Crop ``number`` of the ``index``-th training picture and its caption; crop 0 is the middle."""
        _, image, caption = self.trained[index]
        return self._crop(image, 0.5 if number == 0 else python_random(0, number, index, "cached").random()), caption

    def _crop(self, image: Image.Image, share: float) -> Image.Image:
        left, top = round((image.width - self.size_px) * share), round((image.height - self.size_px) * share)
        return image.crop((left, top, left + self.size_px, top + self.size_px))


def _scale(image: Image.Image, size_px: int) -> Image.Image:
    """RGB with a shorter side of ``size_px``; what is transparent becomes white."""
    turned = ImageOps.exif_transpose(image)
    if "A" in turned.getbands() or "transparency" in turned.info:
        rgba = turned.convert("RGBA")
        turned = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    rgb = turned.convert("RGB")
    scale = size_px / min(rgb.size)
    return rgb.resize((max(size_px, round(rgb.width * scale)), max(size_px, round(rgb.height * scale))), Image.Resampling.BICUBIC)


def _captions(folder: Path) -> list[tuple[Path, str]]:
    """The pictures of a folder and their captions, sorted by name."""
    if not folder.is_dir():
        raise TrainingError(f"{folder}: no such folder")
    path = folder / CAPTIONS
    if path.exists():
        found = []
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                entry = json.loads(line)
                name, caption = entry["file"], entry["caption"]
                if not isinstance(name, str) or not isinstance(caption, str):
                    raise TypeError("file and caption must be strings")
            except (ValueError, KeyError, TypeError) as error:
                raise TrainingError(f'{path}, line {number}: {error!r}; expected {{"file": ..., "caption": ...}}') from error
            found.append((folder / name, " ".join(caption.split())))
        return sorted(found)
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    return [(file, _words(file.stem)) for file in files]


def _words(stem: str) -> str:
    """``a_red_cat-01`` -> ``a red cat``: a number at the end only tells files apart; a bare number is no caption."""
    return " ".join(re.sub(r"(^|[-_. ]+)\d+$", "", stem).replace("_", " ").replace("-", " ").split())
