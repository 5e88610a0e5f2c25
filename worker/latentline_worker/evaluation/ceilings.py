"""What the measures say of pictures that are right: the data set's own renders of the prompts, and the autoencoder's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from latentline_worker.training.sources import BuiltData

from .foreground import Pixels
from .intervals import Figure, mean
from .measures import look
from .probe import Probe
from .prompts import Prompt, real_render
from .reconstruction import psnr_db, reconstruct
from .results import Row, figures_of

NUM_RECONSTRUCTED = 256


@dataclass(frozen=True)
class Reconstruction:
    """PSNR of held-out pictures through the autoencoder: what they show, the mean in dB, the worst picture."""

    name: str
    psnr_db: Figure
    worst_db: float


def renders(prompts: list[Prompt], source: BuiltData, purpose: str = "real") -> Pixels:
    """The data set's own pictures of the prompts, (n, size, size, 3)."""
    return np.stack([np.asarray(real_render(prompt, source.sprites, source.size_px, purpose)) for prompt in prompts])


def ceilings(prompts: list[Prompt], real: Pixels, autoencoder: Any, probe: Probe) -> list[Row]:
    """The measures' answers to real renders, and to the same after the autoencoder."""
    through = reconstruct(autoencoder, real)
    return [
        Row("real renders", figures_of([look(real, prompts, probe)])),
        Row("real renders through the autoencoder", figures_of([look(through, prompts, probe)])),
    ]


def reconstructions(
    source: BuiltData, real: Pixels, autoencoder: Any, count: int = NUM_RECONSTRUCTED
) -> tuple[list[Reconstruction], Pixels]:
    """PSNR on held-out things and on renders of the held-out prompts; and pictures beside their reconstructions."""
    things = _stack(source.held_out(count))
    rows, shown = [], []
    for name, pictures in (("things that are held out", things), ("held-out combinations of trained things", real)):
        found = reconstruct(autoencoder, pictures)
        values = psnr_db(found, pictures)
        rows.append(Reconstruction(name, mean(list(values)), float(values.min())))
        shown += [one for pair in zip(pictures[:12], found[:12], strict=True) for one in pair]
    return rows, np.stack(shown)


def _stack(images: list[Image.Image]) -> Pixels:
    return np.stack([np.asarray(image) for image in images])
