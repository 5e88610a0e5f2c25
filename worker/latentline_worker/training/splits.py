"""Which concepts and which combinations of words are held out. Final: another answer here means training anew.

Every decision is the hash of words, so it depends on no order, no random state and no other concept. A picture
belongs to the strictest split that any of its keys falls into: test, then validation, then train. Training draws
only pictures of the train split.

A key is what a caption says about content, never the style: a combination that is held out is held out in all
three styles. Keys of a picture:

==================  =======================================  =====================================
key                 example                                  what its test pictures ask
==================  =======================================  =====================================
noun                ``noun|rocket``                          can the autoencoder do unseen things
noun, colour        ``colour|rocket|blue``                   colour binding: never seen blue
noun, colour, back  ``scene|rocket|None|green``              the three never seen together
noun, place         ``place|rocket|left``                    position
noun, count         ``count|rocket|3``                       counting
noun, noun          ``pair|cup|rocket``                      two things never seen together
==================  =======================================  =====================================
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterable
from functools import cache
from importlib import resources
from typing import Literal

Split = Literal["train", "validation", "test"]
SALT = "latentline-2026-11"
# Kind of key -> share of the keys that go to validation and to test.
HELD_OUT: dict[str, tuple[float, float]] = {
    "noun": (0.02, 0.04),
    "colour": (0.03, 0.06),
    "scene": (0.04, 0.08),
    "place": (0.04, 0.08),
    "count": (0.04, 0.08),
    "pair": (0.04, 0.08),
}


@cache
def core_names() -> frozenset[str]:
    """Names that the 64 px model knows: they stay in training, so that its prompts go on working."""
    text = resources.files(__package__).joinpath("concepts.csv").read_text()
    return frozenset(name for row in csv.reader(io.StringIO(text)) for name in row[1:] if name)


def split_of_key(key: str) -> Split:
    """The split that one key falls into.

    Args:
        key: kind and words, separated by ``|``, as the table above shows.
    """
    validation, test = HELD_OUT[key.partition("|")[0]]
    u = int.from_bytes(hashlib.sha256(f"{SALT}/{key}".encode()).digest()[:8], "big") / 2**64
    return "test" if u < test else "validation" if u < test + validation else "train"


def split_of_noun(noun: str, labels: Iterable[str]) -> Split:
    """The split of a noun and of all concepts that carry it; a noun with a core name among its labels is trained."""
    return "train" if core_names() & {noun, *labels} else split_of_key(f"noun|{noun}")


def split_of(keys: Iterable[str], nouns: Iterable[Split] = ()) -> Split:
    """The strictest split among the keys of a picture and the splits of its nouns."""
    found = {*nouns, *(split_of_key(key) for key in keys)}
    return "test" if "test" in found else "validation" if "validation" in found else "train"


def single_keys(noun: str, colour: str | None, background: str) -> list[str]:
    """Keys of one object on a background, wherever it stands and however many of it there are."""
    keys = [f"scene|{noun}|{colour}|{background}"]
    return [f"colour|{noun}|{colour}", *keys] if colour else keys


def pair_key(first: str, second: str) -> str:
    """One key for both orders."""
    return "pair|" + "|".join(sorted((first, second)))
