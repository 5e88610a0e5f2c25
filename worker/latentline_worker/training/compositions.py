"""Compositions: which objects stand where on which background, and the caption that says so.

A composition is drawn from a generator of its own and holds no pixels; ``pictures.render`` paints it. One object
fills the picture, or stands small at a place, or two to four of it stand in a group, or two things stand beside or
above each other.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from . import splits
from .concepts import (
    BACKGROUNDS,
    DEFAULT_BACKGROUND,
    DEFAULT_STYLE,
    OBJECT_COLOURS,
    PLACES,
    RELATIONS,
    Concept,
    counted_words,
    is_plural,
    object_words,
)

Layout = Literal["single", "placed", "count", "pair"]
# Shares of the layouts. Most pictures show one large object: that is what people ask for most.
LAYOUTS: dict[Layout, float] = {"single": 0.64, "placed": 0.10, "count": 0.12, "pair": 0.14}
RECOLOURED = 0.4  # of the objects that can be recoloured
DEFAULT_BACKGROUND_SHARE = 0.3
# Chance that a caption leaves out what is the default anyway, and the article of a single object.
LEAVES_OUT_DEFAULT, LEAVES_OUT_ARTICLE = 0.6, 0.15


@dataclass(frozen=True)
class Sprite:
    """One concept in one style, a line of the manifest.

    Args:
        grey: share of its opaque pixels that have no hue worth replacing.
    """

    concept: Concept
    style: str
    file: str
    grey: float
    split: splits.Split

    @property
    def can_recolour(self) -> bool:
        """Whether words and pixels allow another colour; mostly grey things would hardly change."""
        return self.concept.can_recolour and self.grey <= 0.6


@dataclass(frozen=True)
class Thing:
    """A sprite and the colour that it is given; None leaves its own."""

    sprite: Sprite
    colour: str | None

    @property
    def said_colour(self) -> str | None:
        """The colour as a caption says it: the given one, or the one in the label."""
        return self.colour or self.sprite.concept.own_colour


@dataclass(frozen=True)
class Composition:
    """A picture before it is painted. ``place`` is a place or a relation; ``count`` is 1 but for groups."""

    layout: Layout
    things: tuple[Thing, ...]
    background: str
    place: str | None
    count: int
    caption: str


class Catalogue:
    """The sprites of a data set and the rule which compositions belong to which split."""

    def __init__(self, sprites: Sequence[Sprite]) -> None:
        self.sprites = sprites
        self.by_style = {style: [s for s in sprites if s.style == style] for style in dict.fromkeys(s.style for s in sprites)}
        # Colours that artwork has by nature are never held out: else no picture of that artwork could be trained on.
        self.natural = {(s.concept.noun, s.concept.own_colour) for s in sprites}

    def keys(self, composition: Composition) -> list[str]:
        """The keys of ``splits`` that this picture's words fall under."""
        keys = []
        for thing in composition.things:
            noun, colour = thing.sprite.concept.noun, thing.said_colour
            if (noun, colour) not in self.natural:
                keys.append(f"colour|{noun}|{colour}")
            # The plain prompt ("a rocket") means the default background and stays in training.
            if colour is not None or composition.background != DEFAULT_BACKGROUND:
                keys.append(f"scene|{noun}|{colour}|{composition.background}")
        noun = composition.things[0].sprite.concept.noun
        if composition.layout == "placed":
            keys.append(f"place|{noun}|{composition.place}")
        elif composition.layout == "count":
            keys.append(f"count|{noun}|{composition.count}")
        elif composition.layout == "pair":
            keys.append(splits.pair_key(noun, composition.things[1].sprite.concept.noun))
        return keys

    def split(self, composition: Composition) -> splits.Split:
        """The split of a composition: the strictest among its nouns and keys."""
        return splits.split_of(self.keys(composition), (thing.sprite.split for thing in composition.things))

    def draw(self, sprite: Sprite, rng: random.Random, split: splits.Split = "train", layout: Layout | None = None) -> Composition:
        """A composition around this sprite that belongs to ``split``, by rejection.

        Raises:
            LookupError: 500 draws gave none; a held-out sprite has no training picture, for example.
        """
        for _ in range(500):
            found = self._draw(sprite, rng, layout)
            if self.split(found) == split:
                return found
        raise LookupError(f"no {split} picture of {sprite.file} in 500 draws")

    def _draw(self, sprite: Sprite, rng: random.Random, layout: Layout | None) -> Composition:
        chosen: Layout = layout or rng.choices(list(LAYOUTS), weights=list(LAYOUTS.values()))[0]
        plain = rng.random() < DEFAULT_BACKGROUND_SHARE
        background = DEFAULT_BACKGROUND if plain else rng.choice(list(BACKGROUNDS))
        things = [Thing(sprite, _colour(sprite, rng))]
        place: str | None = None
        count = 1
        if chosen == "placed":
            place = rng.choice(list(PLACES))
        elif chosen == "count" and not is_plural(sprite.concept.noun):
            count = rng.choice((2, 3, 4))
        elif chosen == "pair":
            other = rng.choice(self.by_style[sprite.style])
            while other.concept.noun == sprite.concept.noun:
                other = rng.choice(self.by_style[sprite.style])
            things.append(Thing(other, _colour(other, rng)))
            place = rng.choice(RELATIONS)
        elif chosen == "count":
            chosen = "single"  # "two grapes" would not say what the picture shows
        words = _caption(chosen, things, background, place, count, rng)
        return Composition(chosen, tuple(things), background, place, count, words)


def _colour(sprite: Sprite, rng: random.Random) -> str | None:
    if not sprite.can_recolour or rng.random() >= RECOLOURED:
        return None
    return rng.choice([colour for colour in OBJECT_COLOURS if colour != sprite.concept.own_colour])


def _caption(layout: Layout, things: list[Thing], background: str, place: str | None, count: int, rng: random.Random) -> str:
    noun, colour = things[0].sprite.concept.noun, things[0].said_colour
    words = counted_words(noun, colour, count) if count > 1 else object_words(noun, colour)
    if layout == "pair":
        words = f"{words} {place} {object_words(things[1].sprite.concept.noun, things[1].said_colour)}"
    elif layout == "placed":
        words = f"a small {words.removeprefix('a ').removeprefix('an ')} {PLACES[place or 'left']}"
        if is_plural(noun):
            words = words.removeprefix("a ")
    elif layout == "single" and rng.random() < LEAVES_OUT_ARTICLE:
        words = words.removeprefix("a ").removeprefix("an ")
    if background != DEFAULT_BACKGROUND or rng.random() >= LEAVES_OUT_DEFAULT:
        words = f"{words} on a{'n' if background == 'orange' else ''} {background} background"
    style = things[0].sprite.style
    if style != DEFAULT_STYLE or rng.random() >= LEAVES_OUT_DEFAULT:
        words = f"{words}, {style} style"
    return words
