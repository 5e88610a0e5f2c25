"""What is measured on all pictures of a setting together: kernel distance, diversity, nearest training sprite."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from latentline_worker.training.sources import BuiltData

from .foreground import Pixels
from .intervals import Figure, mean, share
from .likeness import kid, nearest, picture_features, silhouettes, spread_of_prompts, spread_of_seeds, sprite_silhouettes
from .prompts import Prompt


@dataclass(frozen=True)
class Distances:
    """Kernel distances to real renders of the prompts, by whose pictures; and spreads of the drawn ones.

    Args:
        kid: name -> one value for each seed or set.
        seeds: distance between the pictures of one prompt.
        renders: the same between two renders of one prompt, which differ in size and place alone.
        prompts: between pictures of different prompts.
    """

    kid: dict[str, list[float]]
    seeds: Figure
    renders: Figure
    prompts: float


def distances(by_seed: list[Pixels], real: Pixels, again: Pixels, through: Pixels) -> Distances:
    """Compare drawn pictures, for each seed (n, size, size, 3), with renders of the same prompts.

    Args:
        again: other renders of the same prompts.
        through: the renders through the autoencoder.
    """
    drawn = [picture_features(pictures) for pictures in by_seed]
    truth, other, decoded = (picture_features(pictures) for pictures in (real, again, through))
    return Distances(
        kid={
            "the model, by seed": [kid(one, truth) for one in drawn],
            "real renders through the autoencoder": [kid(decoded, truth)],
            "other real renders": [kid(other, truth)],
        },
        seeds=mean(spread_of_seeds(drawn)) if len(drawn) > 1 else Figure(0.0, 0.0, 0.0, 0),
        renders=mean(spread_of_seeds([truth, other])),
        prompts=spread_of_prompts(drawn[0]),
    )


@dataclass(frozen=True)
class Neighbours:
    """The nearest training sprite of pictures that show one object.

    Args:
        distance: root mean square difference of brightness, of 255, without the background.
        same_noun, same_style: how often the nearest sprite is of the noun, and of the style, that was asked for.
    """

    distance: Figure
    same_noun: Figure
    same_style: Figure


def neighbours(pictures: Pixels, prompts: list[Prompt], source: BuiltData) -> Neighbours:
    """Neighbours of the pictures whose prompts ask for one object; recoloured things are compared by brightness alone."""
    chosen = [index for index, prompt in enumerate(prompts) if prompt.composition.layout in ("single", "placed")]
    images = [source.sprites[sprite.file] for sprite in source.trained]
    library = sprite_silhouettes(
        [np.asarray(image.convert("RGB")) for image in images], [np.asarray(image.getchannel("A")) for image in images]
    )
    found, places = nearest(silhouettes(pictures[chosen]), library)
    asked = [prompts[index].composition.things[0].sprite for index in chosen]
    sprites = [source.trained[place] for place in places]
    return Neighbours(
        mean(found),
        share([float(a.concept.noun == b.concept.noun) for a, b in zip(asked, sprites, strict=True)]),
        share([float(a.style == b.style) for a, b in zip(asked, sprites, strict=True)]),
    )
