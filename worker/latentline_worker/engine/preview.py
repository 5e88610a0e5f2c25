"""Cheap pictures of unfinished latents: one linear map from latent channels to RGB, fitted to the VAE."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from latentline_worker.models.base import Family

NUM_SAMPLES = 8  # images; each gives rows * columns equations for 3 * (channels + 1) unknowns
SIDE = 16  # latents along a side of a sample, whatever the model: decoding them is cheap


class LatentToRgb:
    """(n, c, h, w) latents -> (n, h, w, 3) uint8, a pixel per latent.

    The map is fitted by least squares to the VAE's decodes of smooth random latents, averaged over each latent's pixels.
    It needs no data and no second network. It shows shapes and colours, but no texture.
    """

    def __init__(self, weights: torch.Tensor) -> None:
        self.weights = weights  # (c + 1, 3); the last row is the constant

    @classmethod
    @torch.inference_mode()
    def fit(cls, family: Family, channels: int) -> LatentToRgb:
        generator = torch.Generator().manual_seed(0)
        # Smooth at several scales, as pictures are: the VAE decodes white noise to texture.
        z = torch.stack([_smooth(channels, 2 + i, generator) for i in range(NUM_SAMPLES)]).to(family.device)
        pixels = torch.cat([family.decode(z[i : i + 1], tiled=False) for i in range(NUM_SAMPLES)])
        rgb = F.adaptive_avg_pool2d(pixels.permute(0, 3, 1, 2).float() / 255, (SIDE, SIDE))
        wanted = rgb.permute(0, 2, 3, 1).reshape(-1, 3)
        known = torch.cat([z, torch.ones_like(z[:, :1])], 1).permute(0, 2, 3, 1).reshape(-1, channels + 1)
        # Black and white values may have been clipped, and would bias the fit.
        inside = ((wanted > 0.01) & (wanted < 0.99)).all(1)
        if inside.sum() > 10 * (channels + 1):
            known, wanted = known[inside], wanted[inside]
        return cls(torch.linalg.lstsq(known.cpu(), wanted.cpu()).solution.to(family.device))

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        rgb = torch.einsum("nchw,cd->nhwd", latents.float(), self.weights[:-1]) + self.weights[-1]
        return (rgb.clamp(0, 1) * 255).round().to(torch.uint8)


def _smooth(channels: int, cells: int, generator: torch.Generator) -> torch.Tensor:
    """(channels, SIDE, SIDE) of unit variance, with about ``cells`` blobs along a side."""
    coarse = torch.randn(1, channels, cells, cells, generator=generator)
    smooth = F.interpolate(coarse, (SIDE, SIDE), mode="bicubic", align_corners=False)[0]
    return smooth / smooth.std()
