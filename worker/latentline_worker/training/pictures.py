"""Compositions as pixels: recolouring, placing, backgrounds."""

from __future__ import annotations

import random

import numpy as np
from PIL import Image

from .compositions import Composition
from .concepts import BACKGROUNDS, OBJECT_COLOURS

SPRITE_PX = 160  # larger than an object ever is in a 128 px picture: scaling never enlarges
GREY_SATURATION = 0.12  # pixels below it have no hue to replace: outlines, highlights, metal
KEPT_HUE_SPREAD = 0.12  # of the artwork's own differences in hue; shading stays visible and one colour is seen
# What the coloured pixels are raised to on average, of 255: brown artwork turned red would else still be brown.
LEAST_SATURATION, LEAST_VALUE = 155, 185
BACKGROUND_JITTER = 6  # of 255, each channel: a colour word means a small range and not one exact value


def grey_share(sprite: Image.Image) -> float:
    """Share of the opaque pixels of an RGBA picture whose saturation is below ``GREY_SATURATION``, 0 to 1."""
    rgb = np.asarray(sprite.convert("RGB").convert("HSV"))
    opaque = np.asarray(sprite.getchannel("A")) > 127
    return float((rgb[..., 1][opaque] < GREY_SATURATION * 255).mean()) if opaque.any() else 1.0


def recolour(sprite: Image.Image, colour: str) -> Image.Image:
    """The RGBA sprite with its hue replaced; dull artwork becomes brighter, alpha stays as it is."""
    hue, saturation, value = (np.array(band, dtype=np.float32) for band in sprite.convert("RGB").convert("HSV").split())
    alpha = np.asarray(sprite.getchannel("A"))
    coloured = (saturation >= GREY_SATURATION * 255) & (alpha > 0)
    if not coloured.any():
        return sprite
    angle = hue * (2 * np.pi / 256)
    weight = saturation * coloured
    mean = np.arctan2((np.sin(angle) * weight).sum(), (np.cos(angle) * weight).sum())
    difference = (angle - mean + np.pi) % (2 * np.pi) - np.pi
    turned = np.deg2rad(OBJECT_COLOURS[colour]) + KEPT_HUE_SPREAD * difference
    new_hue = np.where(coloured, turned * (256 / (2 * np.pi)) % 256, hue)
    saturation[coloured] *= max(1.0, LEAST_SATURATION / saturation[coloured].mean())
    value[coloured] *= max(1.0, LEAST_VALUE / value[coloured].mean())
    bands = [Image.fromarray(band.astype(np.uint8)) for band in (np.floor(new_hue), saturation.clip(0, 255), value.clip(0, 255))]
    result = Image.merge("HSV", bands).convert("RGB").convert("RGBA")
    result.putalpha(sprite.getchannel("A"))
    return result


def render(composition: Composition, sprites: dict[str, Image.Image], size_px: int, rng: random.Random) -> Image.Image:
    """Paint a composition.

    Args:
        sprites: file name in the manifest -> square RGBA picture.
        size_px: side of the square RGB picture that comes back.
        rng: decides sizes, places and the exact background within what the caption says.
    """
    background = tuple(
        min(255, max(0, c + rng.randint(-BACKGROUND_JITTER, BACKGROUND_JITTER))) for c in BACKGROUNDS[composition.background]
    )
    canvas = Image.new("RGB", (size_px, size_px), background)
    things = [
        sprites[thing.sprite.file] if thing.colour is None else recolour(sprites[thing.sprite.file], thing.colour)
        for thing in composition.things
    ]
    boxes = _boxes(composition, rng)
    for index, (side, x, y) in enumerate(boxes):
        side_px = round(side * size_px)
        scaled = things[index % len(things)].resize((side_px, side_px), Image.Resampling.BILINEAR)
        canvas.paste(scaled, (round(x * size_px - side_px / 2), round(y * size_px - side_px / 2)), scaled)
    return canvas


def _boxes(composition: Composition, rng: random.Random) -> list[tuple[float, float, float]]:
    """(side, centre x, centre y) of each object as shares of the picture's side."""
    if composition.layout == "single":
        side = rng.uniform(0.80, 0.92)
        slack = 0.35 * (1 - side)
        return [(side, 0.5 + rng.uniform(-slack, slack), 0.5 + rng.uniform(-slack, slack))]
    centres: list[tuple[float, float]]
    if composition.layout == "placed":
        side = rng.uniform(0.34, 0.46)
        centres = [{"left": (0.26, 0.5), "right": (0.74, 0.5), "top": (0.5, 0.26), "bottom": (0.5, 0.74)}[composition.place or "left"]]
        jitter = 0.04
    elif composition.layout == "pair":
        side = rng.uniform(0.38, 0.43)
        first, second = {"left of": ((0.26, 0.5), (0.74, 0.5)), "above": ((0.5, 0.26), (0.5, 0.74))}.get(
            {"right of": "left of", "below": "above"}.get(composition.place or "", composition.place or ""), ((0.26, 0.5), (0.74, 0.5))
        )
        centres = [second, first] if composition.place in ("right of", "below") else [first, second]
        jitter = 0.02
    else:
        side = rng.uniform(0.36, 0.42)
        centres = {
            2: [(0.26, 0.5), (0.74, 0.5)],
            3: [(0.5, 0.27), (0.26, 0.73), (0.74, 0.73)],
            4: [(0.26, 0.26), (0.74, 0.26), (0.26, 0.74), (0.74, 0.74)],
        }[composition.count]
        jitter = 0.025
    return [(side, x + rng.uniform(-jitter, jitter), y + rng.uniform(-jitter, jitter)) for x, y in centres]
