"""Where training pictures come from: the built data set, or a folder of pictures with captions."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from PIL import Image

from .compositions import Composition
from .manifest import KINDS, held_out, load_catalogue, load_sprites
from .pictures import render
from .seeds import python_random
from .splits import Split


class Source(Protocol):
    """Pictures as functions of (seed, step, rank)."""

    num_items: int

    def batch(self, seed: int, step: int, rank: int, count: int) -> list[Image.Image]:
        """``count`` square RGB training pictures."""

    def held_out(self, count: int) -> list[Image.Image]:
        """The same ``count`` pictures, or fewer where there are no more, each time; none of them is trained on."""

    def held_out_pairs(self, count: int) -> list[tuple[Image.Image, str]]:
        """Up to ``count`` pictures with captions that a denoiser is measured on, always the same ones."""

    def item(self, index: int, number: int) -> tuple[Image.Image, str]:
        """Training picture ``number`` of item ``index`` and its caption, always the same: what is encoded and cached."""


class BuiltData:
    """The data set of ``latentline train data``: sprites, composed as they are drawn.

    Args:
        size_px: side of the pictures.
    """

    def __init__(self, folder: Path, size_px: int) -> None:
        self.size_px = size_px
        self.catalogue = load_catalogue(folder)
        self.sprites = load_sprites(folder, self.catalogue)
        self.trained = [sprite for sprite in self.catalogue.sprites if sprite.split == "train"]
        self.num_items = len(self.trained)

    def batch(self, seed: int, step: int, rank: int, count: int) -> list[Image.Image]:
        rng = python_random(seed, step, rank, "pictures")
        drawn = [self.catalogue.draw(rng.choice(self.trained), rng) for _ in range(count)]
        return [render(composition, self.sprites, self.size_px, rng) for composition in drawn]

    def held_out(self, count: int) -> list[Image.Image]:
        """Single objects of concepts that are held out for the test."""
        return self._of_nouns("test", count)

    def held_out_pairs(self, count: int) -> list[tuple[Image.Image, str]]:
        """Validation combinations of trained concepts; a quarter of each layout, one layout after the other in turn."""
        drawn = [held_out(self.catalogue, "validation", layout, -(-count // len(KINDS))) for layout in KINDS]
        mixed = [composition for group in zip(*drawn, strict=False) for composition in group][:count]
        rngs = [python_random(0, number, 0, "held out pairs") for number in range(count)]
        return [(render(c, self.sprites, self.size_px, rng), c.caption) for c, rng in zip(mixed, rngs, strict=False)]

    def composition(self, index: int, number: int) -> Composition:
        """Composition ``number`` of the ``index``-th trained sprite."""
        return self.catalogue.draw(self.trained[index], python_random(0, number, index, "cached"))

    def item(self, index: int, number: int) -> tuple[Image.Image, str]:
        composition = self.composition(index, number)
        return render(composition, self.sprites, self.size_px, python_random(0, number, index, "painted")), composition.caption

    def _of_nouns(self, split: Split, count: int) -> list[Image.Image]:
        sprites = [sprite for sprite in self.catalogue.sprites if sprite.split == split]
        pictures = []
        for number in range(count):
            rng = python_random(0, number, 0, f"held out/{split}")
            pictures.append(
                render(self.catalogue.draw(sprites[number % len(sprites)], rng, split, "single"), self.sprites, self.size_px, rng)
            )
        return pictures
