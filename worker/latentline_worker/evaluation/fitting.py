"""How the frozen probe was made: `python -m latentline_worker.evaluation.fitting DATA AUTOENCODER FILE`.

Kept so that the probe can be understood and made anew for another data set; an evaluation never fits one.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny

from latentline_worker.training.compositions import Composition, Layout, Thing
from latentline_worker.training.concepts import BACKGROUNDS, OBJECT_COLOURS
from latentline_worker.training.manifest import load_catalogue, load_sprites
from latentline_worker.training.pictures import render
from latentline_worker.training.seeds import python_random

from .foreground import Pixels, cells, cut_out, foreground
from .probe import SIDE_PX, Probe, features, fit, save
from .reconstruction import reconstruct

RENDERS = 6  # of each sprite; half of them are seen through the autoencoder
PENALTY = 3.0
SIZE_PX = 128


def fit_probe(folder: Path, autoencoder: Any, renders: int = RENDERS) -> Probe:
    """A probe for all things of a data set, held-out ones included: it judges, it does not draw."""
    catalogue = load_catalogue(folder)
    sprites = load_sprites(folder, catalogue)
    rows, labels = [], []
    for number in range(renders):
        pictures, compositions = [], []
        for index, sprite in enumerate(catalogue.sprites):
            rng = python_random(0, number, index, "probe")
            colour = rng.choice(list(OBJECT_COLOURS)) if sprite.can_recolour and rng.random() < 0.5 else None
            layout: Layout = "single" if number % 3 else "count"
            background = rng.choice(list(BACKGROUNDS))
            composition = Composition(layout, (Thing(sprite, colour),), background, None, 1 if number % 3 else 4, "")
            pictures.append(np.asarray(render(composition, sprites, SIZE_PX, rng)))
            compositions.append(composition)
        if number % 2:
            pictures = list(reconstruct(autoencoder, np.stack(pictures)))
        rows.append(features(np.stack([_first_object(*both) for both in zip(pictures, compositions, strict=True)])))
        labels += [sprite.concept.noun for sprite in catalogue.sprites]
    return fit(torch.cat(rows), labels, PENALTY)


def _first_object(pixels: Pixels, composition: Composition) -> Pixels:
    return cut_out(pixels, foreground(pixels), cells(composition, pixels.shape[0])[0], SIDE_PX)


if __name__ == "__main__":
    data, autoencoder_folder, target = map(Path, sys.argv[1:])
    print(save(fit_probe(data, AutoencoderTiny.from_pretrained(autoencoder_folder).float()), target))
