"""Objects and background told apart: pictures of the data set stand on one plain colour.

Pictures are (height, width, 3) uint8 arrays.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from latentline_worker.training.compositions import Composition

Pixels = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

BORDER_PX = 3  # no object of the data set reaches into it
DIFFERENT = 28  # of 255, in any channel: above what the autoencoder leaves of a plain background
SMALLEST_SHARE = 0.12  # of the largest object's area; what is smaller is a detached part or a speck
GROWTH_PX = 2  # parts of one object that lie this close belong together
FILL = 128  # what stands for the background once it is removed


def background_rgb(pixels: Pixels) -> npt.NDArray[np.float64]:
    """The median colour of the picture's border, (3,)."""
    inner = np.zeros(pixels.shape[:2], dtype=bool)
    inner[BORDER_PX:-BORDER_PX, BORDER_PX:-BORDER_PX] = True
    median: npt.NDArray[np.float64] = np.median(pixels[~inner], axis=0)
    return median


def foreground(pixels: Pixels) -> Mask:
    """Where the picture differs from its background."""
    return np.asarray(np.abs(pixels - background_rgb(pixels)).max(axis=2) > DIFFERENT)


def cells(composition: Composition, size_px: int) -> list[tuple[slice, slice]]:
    """The parts of a picture in which the objects are asked to stand: (rows, columns) for each, things in their order.

    One object has the whole picture.
    """
    half = size_px // 2
    low, high, whole = slice(0, half), slice(half, size_px), slice(0, size_px)
    if composition.layout == "pair":
        beside = composition.place in ("left of", "right of")
        both = [(whole, low), (whole, high)] if beside else [(low, whole), (high, whole)]
        return both[::-1] if composition.place in ("right of", "below") else both
    if composition.layout == "count":
        return {
            2: [(whole, low), (whole, high)],
            3: [(low, whole), (high, low), (high, high)],
            4: [(low, low), (low, high), (high, low), (high, high)],
        }[composition.count]
    return [(whole, whole)]


def cut_out(pixels: Pixels, mask: Mask, cell: tuple[slice, slice], side: int) -> Pixels:
    """The object in a cell as a (side, side, 3) square around its box, with a grey background; all grey where there is none."""
    part, inside = pixels[cell], mask[cell]
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    if not len(rows):
        return np.full((side, side, 3), FILL, dtype=np.uint8)
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    kept = np.where(inside[box][..., None], part[box], FILL).astype(np.uint8)
    height, width = kept.shape[:2]
    longer = max(height, width)
    square = np.full((longer, longer, 3), FILL, dtype=np.uint8)
    top, left = (longer - height) // 2, (longer - width) // 2
    square[top : top + height, left : left + width] = kept
    return np.asarray(Image.fromarray(square).resize((side, side), Image.Resampling.BILINEAR))


def count_objects(mask: Mask) -> int:
    """How many objects stand apart: parts whose boxes overlap count as one, specks as none."""
    labels, found = ndimage.label(ndimage.binary_dilation(mask, iterations=GROWTH_PX))
    areas = ndimage.sum_labels(mask, labels, range(1, found + 1)) if found else []
    boxes: list[list[Any]] = []
    for box, area in zip(ndimage.find_objects(labels), areas, strict=True):
        boxes.append([box[0].start, box[0].stop, box[1].start, box[1].stop, float(area)])
    merged = True
    while merged:
        merged = False
        for i in range(len(boxes)):
            for j in range(i + 1, len(boxes)):
                if _overlap(boxes[i], boxes[j]):
                    a, b = boxes[i], boxes.pop(j)
                    boxes[i] = [min(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), max(a[3], b[3]), a[4] + b[4]]
                    merged = True
                    break
            if merged:
                break
    largest = max((box[4] for box in boxes), default=0.0)
    return sum(box[4] >= SMALLEST_SHARE * largest for box in boxes)


def _overlap(a: list[Any], b: list[Any]) -> bool:
    """Whether two boxes share more than a fifth of the smaller one: neighbours in a group may just touch."""
    height, width = min(a[1], b[1]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[2], b[2])
    if height <= 0 or width <= 0:
        return False
    smaller = min((box[1] - box[0]) * (box[3] - box[2]) for box in (a, b))
    return bool(height * width > 0.2 * smaller)
