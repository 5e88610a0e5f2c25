"""The built data set's files: the manifest of sprites, the prompts that are held out, and the check for leaks."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from .compositions import Catalogue, Composition, Layout, Sprite
from .concepts import make_concept
from .errors import TrainingError
from .seeds import python_random
from .splits import Split

MANIFEST = "manifest.jsonl"
HELD_BACK_STYLE = "twemoji"  # in no training picture: an adapter can learn it later
PROMPTS_OF_A_KIND = {"validation": 50, "test": 150}
KINDS: tuple[Layout, ...] = ("single", "placed", "count", "pair")


def rows(folder: Path) -> list[dict[str, Any]]:
    """The manifest's lines.

    Raises:
        TrainingError: there is no manifest, or a line is no JSON.
    """
    path = folder / MANIFEST
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise TrainingError(f"{path} cannot be read ({error}): build the data set with `latentline train data`") from error


def load_catalogue(folder: Path) -> Catalogue:
    """All sprites of the training styles; the held-back style is left out."""
    return Catalogue(
        [
            Sprite(make_concept(row["key"], row["label"]), row["style"], row["file"], row["grey"], row["split"])
            for row in rows(folder)
            if row["style"] != HELD_BACK_STYLE
        ]
    )


def load_sprites(folder: Path, catalogue: Catalogue) -> dict[str, Image.Image]:
    """File name in the manifest -> RGBA picture, all in memory (about 100 KB each).

    Raises:
        TrainingError: a picture is missing or broken; the message names it.
    """
    pictures = {}
    for sprite in catalogue.sprites:
        try:
            with Image.open(folder / sprite.file) as image:
                pictures[sprite.file] = image.convert("RGBA")
        except OSError as error:
            raise TrainingError(f"{folder / sprite.file} cannot be read: {error}") from error
    return pictures


def held_out(catalogue: Catalogue, split: Split, layout: Layout, count: int) -> list[Composition]:
    """``count`` compositions of trained concepts whose combination is held out, always the same ones."""
    trained = [sprite for sprite in catalogue.sprites if sprite.split == "train"]
    found: list[Composition] = []
    seen: set[str] = set()
    number = 0
    while len(found) < count and number < 50 * count:
        rng = python_random(0, number, 0, f"prompts/{split}/{layout}")
        number += 1
        try:
            composition = catalogue.draw(rng.choice(trained), rng, split, layout)
        except LookupError:
            continue  # this sprite has no such combination; the next draw takes another
        if composition.layout != layout:
            continue  # plural nouns make no groups
        if all(thing.sprite.split == "train" for thing in composition.things) and composition.caption not in seen:
            seen.add(composition.caption)
            found.append(composition)
    return found


def write_prompts(folder: Path, catalogue: Catalogue) -> None:
    """``prompts-validation.jsonl`` (choosing settings) and ``prompts-test.jsonl`` (reporting)."""
    for split, count in PROMPTS_OF_A_KIND.items():
        lines = []
        for layout in KINDS:
            for composition in held_out(catalogue, "test" if split == "test" else "validation", layout, count):
                things = [{"noun": t.sprite.concept.noun, "key": t.sprite.concept.key, "colour": t.said_colour} for t in composition.things]
                line: dict[str, Any] = {
                    "prompt": composition.caption,
                    "layout": composition.layout,
                    "things": things,
                    "style": composition.things[0].sprite.style,
                }
                line |= {"background": composition.background, "place": composition.place, "count": composition.count}
                lines.append(json.dumps(line | {"keys": catalogue.keys(composition)}, sort_keys=True))
        (folder / f"prompts-{split}.jsonl").write_text("".join(line + "\n" for line in lines))


def find_leaks(folder: Path, trained: Iterable[Composition]) -> list[str]:
    """What of the held-out part stands in training, one sentence each; an empty list is what is wanted.

    Checked are: files are what the manifest says; a concept and a noun lie in one split; no picture of one split
    is, byte for byte, a picture of another; no trained composition has a held-out noun, key, or caption.
    """
    leaks: list[str] = []
    lines = [row for row in rows(folder) if row["style"] != HELD_BACK_STYLE]
    catalogue = load_catalogue(folder)
    belongs: dict[str, set[str]] = defaultdict(set)
    for row in lines:
        if hashlib.sha256((folder / row["file"]).read_bytes()).hexdigest() != row["sha256"]:
            leaks.append(f"{row['file']} is not the file that the manifest describes")
        for what in (f"concept {row['key']}", f"noun {make_concept(row['key'], row['label']).noun}", f"picture {row['sha256']}"):
            belongs[what].add(row["split"])
    leaks += [f"{what} stands in {' and '.join(sorted(found))}" for what, found in belongs.items() if len(found) > 1]
    asked = {
        json.loads(line)["prompt"]: split
        for split in PROMPTS_OF_A_KIND
        for line in (folder / f"prompts-{split}.jsonl").read_text().splitlines()
    }
    for composition in trained:
        if (split := catalogue.split(composition)) != "train":
            leaks.append(f"the {split} combination {composition.caption!r} is trained")
        if composition.caption in asked:
            leaks.append(f"the {asked[composition.caption]} prompt {composition.caption!r} is a training caption")
    return leaks
