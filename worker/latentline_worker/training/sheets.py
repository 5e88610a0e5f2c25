"""Sheets of pictures: what a training looks like at a step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

GAP_PX = 2


def to_tensor(images: list[Image.Image]) -> torch.Tensor:
    """RGB images of one size -> (n, 3, height, width) in -1..1."""
    array = np.stack([np.asarray(image, dtype=np.float32) for image in images])
    return torch.from_numpy(array).permute(0, 3, 1, 2) / 127.5 - 1.0


def to_images(pixels: torch.Tensor) -> list[Image.Image]:
    """(n, 3, height, width) in -1..1, clipped -> RGB images."""
    array = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(one) for one in array]


def save_sheet(path: Path, images: list[Image.Image], columns: int) -> None:
    """Write images of one size as a grid, row by row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = images[0].size
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + GAP_PX) - GAP_PX, rows * (height + GAP_PX) - GAP_PX), "white")
    for index, image in enumerate(images):
        sheet.paste(image, (index % columns * (width + GAP_PX), index // columns * (height + GAP_PX)))
    sheet.save(path)
