"""What one picture shows, against what its prompt asked for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from scipy import ndimage

from latentline_worker.training.concepts import BACKGROUNDS, OBJECT_COLOURS
from latentline_worker.training.pictures import GREY_SATURATION

from .foreground import Mask, Pixels, background_rgb, cells, count_objects, cut_out, foreground
from .probe import SIDE_PX, Probe
from .prompts import Prompt

SIZE_PX = 128  # the size that all distances in pixels here are meant for
EDGE_PX = 1  # colours at an object's edge are mixed with the background
LEAST_COLOURED = 0.02  # share of an object's pixels that must have a hue before its colour is read
SMALL_EXTENT = 0.7  # of the picture's side: an object that is asked to be small stays below it


@dataclass(frozen=True)
class Seen:
    """One picture's answers; None where the prompt does not ask.

    Args:
        ranks: for each thing, how many nouns the probe finds likelier; 0 is the right answer at once.
        background: whether its colour is the one asked for.
        colour: share of the coloured things whose colour is the one asked for.
        count: whether as many objects stand apart as asked for.
        place: whether the object is small and stands at the place asked for.
        order: of two things, whether they stand this way round rather than the other.
    """

    ranks: tuple[int, ...]
    background: bool
    colour: float | None
    count: bool | None
    place: bool | None
    order: bool | None

    def recall(self, k: int) -> float:
        """Share of the things asked for that are among the probe's first k answers."""
        return sum(rank < k for rank in self.ranks) / len(self.ranks)


def look(pictures: npt.NDArray[np.uint8], prompts: list[Prompt], probe: Probe) -> list[Seen]:
    """Measure pictures, (n, size, size, 3), one for each prompt; those of other sizes are scaled first."""
    return [_look(_scaled(pixels), prompt, probe) for pixels, prompt in zip(pictures, prompts, strict=True)]


def _scaled(pixels: Pixels) -> Pixels:
    if pixels.shape[0] == SIZE_PX:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((SIZE_PX, SIZE_PX), Image.Resampling.BILINEAR))


def _look(pixels: Pixels, prompt: Prompt, probe: Probe) -> Seen:
    composition = prompt.composition
    mask = foreground(pixels)
    parts = cells(composition, pixels.shape[0])
    scores = probe.scores(np.stack([cut_out(pixels, mask, part, SIDE_PX) for part in parts]))
    columns = [probe.index(noun) for noun in prompt.nouns]
    if composition.layout == "count":
        scores = scores.mean(dim=0, keepdim=True)  # several objects, one noun
    ranks = tuple(int((row > row[column]).sum()) for row, column in zip(scores, columns, strict=True))
    right = [
        object_colour(pixels, mask, part) == thing.said_colour
        for part, thing in zip(parts, composition.things, strict=False)
        if thing.said_colour in OBJECT_COLOURS
    ]
    return Seen(
        ranks=ranks,
        background=background_name(pixels) == composition.background,
        colour=sum(right) / len(right) if right else None,
        count=count_objects(mask) == composition.count if composition.layout == "count" else None,
        place=_place(mask) == composition.place if composition.layout == "placed" else None,
        order=_in_order(scores, columns) if composition.layout == "pair" else None,
    )


def background_name(pixels: Pixels) -> str:
    """The background colour of the data set that the picture's border is nearest to."""
    found = background_rgb(pixels)
    return min(BACKGROUNDS, key=lambda name: float(np.square(found - BACKGROUNDS[name]).sum()))


def object_colour(pixels: Pixels, mask: Mask, cell: tuple[slice, slice]) -> str | None:
    """The object colour of the data set that the mean hue in a cell is nearest to; None for what is grey."""
    inside = ndimage.binary_erosion(mask, iterations=EDGE_PX)[cell]
    hsv = np.asarray(Image.fromarray(pixels).convert("HSV"))[cell][inside].astype(np.float64)
    weight = hsv[:, 1] * (hsv[:, 1] >= GREY_SATURATION * 255)
    if not len(hsv) or (weight > 0).mean() < LEAST_COLOURED:
        return None
    angle = hsv[:, 0] * (2 * np.pi / 256)
    mean = np.rad2deg(np.arctan2((np.sin(angle) * weight).sum(), (np.cos(angle) * weight).sum()))
    return min(OBJECT_COLOURS, key=lambda name: abs((mean - OBJECT_COLOURS[name] + 180) % 360 - 180))


def _place(mask: Mask) -> str | None:
    """The side of the picture that a small object stands at; None for a large one, and for nothing."""
    rows, columns = np.nonzero(mask)
    if not len(rows) or max(np.ptp(rows), np.ptp(columns)) > SMALL_EXTENT * len(mask):
        return None
    y, x = (rows.min() + rows.max()) / 2 - len(mask) / 2, (columns.min() + columns.max()) / 2 - len(mask) / 2
    if abs(x) > abs(y):
        return "left" if x < 0 else "right"
    return "top" if y < 0 else "bottom"


def _in_order(scores: torch.Tensor, columns: list[int]) -> bool:
    first, second = columns
    return bool(scores[0, first] + scores[1, second] > scores[0, second] + scores[1, first])
