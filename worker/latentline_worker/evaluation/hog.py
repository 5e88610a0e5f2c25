"""Histograms of oriented gradients (Dalal and Triggs 2005): what a picture's edges look like, by cell."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

CELL_PX = 8
NUM_ORIENTATIONS = 9  # of 180 degrees: an edge counts alike from dark to light and from light to dark
CLIP = 0.2  # of a block's norm, as in the paper: one strong edge does not silence the others


def hog(grey: torch.Tensor) -> torch.Tensor:
    """(n, side, side) in 0..1, side a multiple of 8 -> (n, (side / 8 - 1)^2 * 36) features.

    Each 2x2 block of cells is normalised by itself; neighbouring blocks overlap.
    """
    padded = F.pad(grey.unsqueeze(1), (1, 1, 1, 1), mode="replicate")[:, 0]
    dx = padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]
    dy = padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]
    strength = torch.hypot(dx, dy)
    place = (torch.atan2(dy, dx) % math.pi) * (NUM_ORIENTATIONS / math.pi)
    lower = place.floor()
    share = place - lower
    bins = torch.zeros(len(grey), NUM_ORIENTATIONS, *grey.shape[1:])
    lower = lower.long() % NUM_ORIENTATIONS
    bins.scatter_add_(1, lower.unsqueeze(1), (strength * (1 - share)).unsqueeze(1))
    bins.scatter_add_(1, ((lower + 1) % NUM_ORIENTATIONS).unsqueeze(1), (strength * share).unsqueeze(1))
    cells = F.avg_pool2d(bins, CELL_PX)
    blocks = F.unfold(cells, 2)  # (n, 36, blocks)
    blocks = blocks / (blocks.norm(dim=1, keepdim=True) + 1e-2)
    blocks = blocks.clamp(max=CLIP)
    blocks = blocks / (blocks.norm(dim=1, keepdim=True) + 1e-2)
    features: torch.Tensor = blocks.flatten(1)
    return features
