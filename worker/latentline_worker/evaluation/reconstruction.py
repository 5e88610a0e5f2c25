"""What the autoencoder alone keeps of pictures that were never trained on."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from latentline_worker.training.autoencoder import encode

from .foreground import Pixels

BATCH = 32


@torch.no_grad()
def reconstruct(autoencoder: Any, pictures: npt.NDArray[np.uint8]) -> Pixels:
    """(n, size, size, 3) through the autoencoder and back."""
    parts = []
    for first in range(0, len(pictures), BATCH):
        x = torch.from_numpy(pictures[first : first + BATCH].astype(np.float32)).permute(0, 3, 1, 2) / 127.5 - 1
        decoded = autoencoder.decode(encode(autoencoder, x)).sample
        parts.append(((decoded.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())
    return np.concatenate(parts)


def psnr_db(found: npt.NDArray[np.uint8], wanted: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Peak signal-to-noise ratio of each picture in dB; (n, size, size, 3) -> (n,)."""
    error = np.square(found.astype(np.float64) - wanted).mean(axis=(1, 2, 3))
    return np.asarray(10 * np.log10(255**2 / np.maximum(error, 1e-6)))
