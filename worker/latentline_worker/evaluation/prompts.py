"""The held-out prompts of a built data set, with what their pictures have to show."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from latentline_worker.training.compositions import Catalogue, Composition, Sprite, Thing
from latentline_worker.training.manifest import KINDS
from latentline_worker.training.pictures import render
from latentline_worker.training.seeds import python_random

from .errors import EvaluationError


@dataclass(frozen=True)
class Prompt:
    """A line of ``prompts-test.jsonl`` or ``prompts-validation.jsonl``.

    Args:
        number: its place in the file, from 0.
        composition: layout, things, colours, background, place and count that the words ask for.
    """

    number: int
    composition: Composition

    @property
    def words(self) -> str:
        return self.composition.caption

    @property
    def nouns(self) -> list[str]:
        """What is asked for, one noun for each thing."""
        return [thing.sprite.concept.noun for thing in self.composition.things]


def load_prompts(folder: Path, split: str, catalogue: Catalogue, limit: int | None = None) -> list[Prompt]:
    """The prompts of a split in the order of their file.

    Args:
        limit: take so many, the first ones of each layout; for trials.

    Raises:
        EvaluationError: the file is missing or broken, or names a sprite that the data set does not have.
    """
    path = folder / f"prompts-{split}.jsonl"
    sprites = {(sprite.style, sprite.concept.key): sprite for sprite in catalogue.sprites}
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        prompts = [Prompt(number, _composition(line, sprites)) for number, line in enumerate(lines)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvaluationError(f"{path} cannot be used ({error!r}): build the data set with `latentline train data`") from error
    if limit is None:
        return prompts
    groups = [[prompt for prompt in prompts if prompt.composition.layout == kind][: -(-limit // len(KINDS))] for kind in KINDS]
    return sorted((prompt for group in groups for prompt in group), key=lambda prompt: prompt.number)[:limit]


def _composition(line: dict[str, Any], sprites: dict[tuple[str, str], Sprite]) -> Composition:
    things = []
    for thing in line["things"]:
        sprite = sprites[line["style"], thing["key"]]
        own = thing["colour"] == sprite.concept.own_colour
        things.append(Thing(sprite, None if own else thing["colour"]))
    return Composition(line["layout"], tuple(things), line["background"], line["place"], line["count"], line["prompt"])


def real_render(prompt: Prompt, sprites: dict[str, Image.Image], size_px: int, purpose: str) -> Image.Image:
    """The picture that the data set's own painter makes of a prompt; another ``purpose`` gives other sizes and places."""
    return render(prompt.composition, sprites, size_px, python_random(0, prompt.number, 0, f"evaluation/{purpose}"))
