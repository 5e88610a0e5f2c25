"""Sets of pictures compared: kernel distance, diversity across seeds, the nearest training sprite."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from .foreground import FILL, Pixels, cut_out, foreground
from .hog import hog

SIDE_PX = 64  # pictures are compared at this size
COLOUR_CELLS = 8
NEAREST_PX = 32

Pictures = npt.NDArray[np.uint8]


def picture_features(pictures: Pictures) -> torch.Tensor:
    """(n, size, size, 3) -> (n, features): edges of the whole picture, and its mean colours in 8x8 cells.

    Both halves have about the same length, so that neither decides alone.
    """
    x = torch.from_numpy(pictures.astype(np.float32)).permute(0, 3, 1, 2) / 255
    x = F.interpolate(x, (SIDE_PX, SIDE_PX), mode="area")
    edges = hog(x.mean(dim=1))
    colours = F.adaptive_avg_pool2d(x, COLOUR_CELLS).flatten(1)
    return torch.cat([edges / edges.shape[1] ** 0.5, colours / colours.shape[1] ** 0.5], dim=1)


def kid(found: torch.Tensor, real: torch.Tensor) -> float:
    """Kernel distance, unbiased (Binkowski et al. 2018, arXiv:1801.01401): cubic kernel, 0 for equal distributions.

    Args:
        found, real: (n, features) and (m, features); both are scaled by the real ones' mean and deviation.

    The features are these edges and colours and no Inception network: compare the figures with each other only.
    """
    middle, spread = real.mean(dim=0), real.std(dim=0) + 1e-3
    x, y = ((one - middle).double() / spread for one in (found, real))

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    xx, yy, xy = kernel(x, x), kernel(y, y), kernel(x, y)
    n, m = len(x), len(y)
    within = (xx.sum() - xx.diagonal().sum()) / (n * (n - 1)) + (yy.sum() - yy.diagonal().sum()) / (m * (m - 1))
    return float(within - 2 * xy.mean())


def spread_of_seeds(by_seed: list[torch.Tensor]) -> list[float]:
    """For each prompt, the mean distance between its pictures of different seeds; (n, features) for each seed."""
    pairs = [(by_seed[a] - by_seed[b]).norm(dim=1) for a in range(len(by_seed)) for b in range(a)]
    return [float(value) for value in torch.stack(pairs).mean(dim=0)]


def spread_of_prompts(features: torch.Tensor) -> float:
    """The mean distance between pictures of different prompts, (n, features)."""
    n = len(features)
    return float(torch.cdist(features, features).sum() / (n * (n - 1)))


def silhouettes(pictures: Pictures) -> torch.Tensor:
    """(n, size, size, 3) pictures of one object each -> (n, values): its brightness without the background."""
    size = pictures.shape[1]
    whole = (slice(0, size), slice(0, size))
    objects = np.stack([cut_out(pixels, foreground(pixels), whole, NEAREST_PX) for pixels in pictures])
    return torch.from_numpy(objects.astype(np.float32)).mean(dim=3).flatten(1)


def sprite_silhouettes(sprites: list[Pixels], alphas: list[npt.NDArray[np.uint8]]) -> torch.Tensor:
    """The same of sprites, whose foreground is what is opaque."""
    made = []
    for rgb, alpha in zip(sprites, alphas, strict=True):
        mask = alpha > FILL
        made.append(cut_out(rgb, mask, (slice(0, len(mask)), slice(0, len(mask))), NEAREST_PX))
    return torch.from_numpy(np.stack(made).astype(np.float32)).mean(dim=3).flatten(1)


def nearest(found: torch.Tensor, library: torch.Tensor) -> tuple[list[float], list[int]]:
    """Root mean square difference of 255 to the nearest of a library, and which one that is."""
    distances, places = torch.cdist(found, library).min(dim=1)
    return [float(d) for d in distances / found.shape[1] ** 0.5], [int(place) for place in places]
