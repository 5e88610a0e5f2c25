"""What the training pictures show and how captions call it: nouns, colours, articles, plurals.

A concept is one emoji. Its CLDR label becomes a noun and, where the label begins with a colour, the colour of
its artwork: "green apple" is an apple that is green. A recoloured red apple and the green apple then have the
same words, so held-out combinations can be stated in words and not in file names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# Hue in degrees that recolouring gives to an object. Black, white, grey and brown are no hues.
OBJECT_COLOURS = {"red": 0, "orange": 28, "yellow": 52, "green": 125, "blue": 215, "purple": 272, "pink": 328}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (20, 20, 24),
    "grey": (150, 152, 158),
    "red": (222, 60, 60),
    "orange": (250, 155, 50),
    "yellow": (252, 220, 90),
    "green": (90, 185, 105),
    "blue": (70, 130, 230),
    "purple": (145, 90, 205),
    "pink": (250, 165, 200),
    "brown": (135, 90, 60),
}
STYLES = ("3d", "flat", "cartoon")
# What a caption means that names no style or background: one answer keeps short prompts crisp.
DEFAULT_STYLE, DEFAULT_BACKGROUND = "3d", "white"
COUNT_WORDS = {2: "two", 3: "three", 4: "four"}
PLACES = {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}
RELATIONS = ("left of", "right of", "above", "below")
COLOUR_WORDS = frozenset({*OBJECT_COLOURS, *BACKGROUNDS})
# emojibase group -> used: 0 smileys, 3 animals and nature, 4 food, 5 travel, 6 activities, 7 objects. Left out are
# 1 people, 2 skin tones and hair, 8 symbols and 9 flags.
GROUPS = frozenset({0, 3, 4, 5, 6, 7})
IRREGULAR = {"mouse": "mice", "goose": "geese", "wolf": "wolves", "leaf": "leaves", "knife": "knives", "tooth": "teeth", "ox": "oxen"}
SAME_IN_PLURAL = frozenset({"sheep", "deer", "bison", "fish", "shrimp", "squid", "moose"})
# CLDR labels that are no noun, or that say a meaning and not what is drawn.
SAID_BETTER = {
    "bowling": "bowling ball",
    "construction": "construction barrier",
    "cooking": "frying pan with egg",
    "dashing away": "puff of smoke",
    "high voltage": "lightning bolt",
    "hot beverage": "cup of coffee",
    "hourglass done": "hourglass",
    "hourglass not done": "hourglass with flowing sand",
    "locked": "locked padlock",
    "locked with key": "padlock with key",
    "locked with pen": "padlock with pen",
    "tennis": "tennis ball",
    "unlocked": "unlocked padlock",
}
ARTICLE_EXCEPTIONS = {"hourglass": "an", "unicorn": "a", "ewe": "a", "euro": "a", "one": "a", "oncoming": "an", "x": "an", "e": "an"}


@dataclass(frozen=True)
class Concept:
    """One thing that all styles draw.

    Args:
        key: code points in hexadecimal, without variation selectors, for example ``1f34e``.
        label: the CLDR label, for example ``red apple``.
        noun: the label without a colour at its beginning.
        own_colour: that colour, or None.
        can_recolour: whether the words allow another colour (the pixels must allow it as well).
    """

    key: str
    label: str
    noun: str
    own_colour: str | None
    can_recolour: bool


def make_concept(key: str, label: str) -> Concept:
    """The concept of a CLDR label; clock faces, whose label is only a time, get a noun."""
    label = label.replace("’", "'").lower()
    label = SAID_BETTER.get(label, label)
    if time := re.fullmatch(r"(\w+) o'clock|(\w+-thirty)", label):
        label = f"clock showing {time[0]}"
    first, _, rest = label.partition(" ")
    if first in COLOUR_WORDS and rest:
        return Concept(key, label, rest, first, can_recolour=not COLOUR_WORDS & set(rest.split()))
    # A colour in the middle ("light blue heart") leaves no way to say another one.
    return Concept(key, label, label, None, can_recolour=not COLOUR_WORDS & set(re.split(r"[ -]", label)))


def is_plural(noun: str) -> bool:
    """Whether the noun takes no article: "grapes" and "shopping bags" do not, "smiling face with hearts" does."""
    head = _head(noun)[0].split()[-1]
    return head.endswith("s") and not head.endswith(("ss", "us", "is", "'s", "ros"))


def article(phrase: str) -> str:
    """``a`` or ``an``, whichever the phrase takes."""
    first = re.split(r"[ \-']", phrase)[0]
    return ARTICLE_EXCEPTIONS.get(first) or ("an" if first[:1] in "aeiou" or first == "8" else "a")


def plural(noun: str) -> str:
    """``face with tears of joy`` -> ``faces with tears of joy``: the head noun changes."""
    head, tail = _head(noun)
    words = head.split()
    last = words[-1]
    if last in IRREGULAR:
        last = IRREGULAR[last]
    elif last not in SAME_IN_PLURAL:
        if last.endswith(("s", "x", "ch", "sh")):
            last += "es"
        elif last.endswith("y") and last[-2:-1] not in "aeiou":
            last = last[:-1] + "ies"
        else:
            last += "s"
    return " ".join([*words[:-1], last]) + tail


def object_words(noun: str, colour: str | None) -> str:
    """``a red apple``, ``grapes``: one thing with its article."""
    phrase = f"{colour} {noun}" if colour else noun
    return phrase if is_plural(noun) else f"{article(phrase)} {phrase}"


def counted_words(noun: str, colour: str | None, count: int) -> str:
    """``three red apples``."""
    return " ".join(word for word in (COUNT_WORDS[count], colour, plural(noun)) if word)


def _head(noun: str) -> tuple[str, str]:
    """The words before the first preposition or participle, and the rest with its blank."""
    found = re.search(
        r" (with|without|of|in|on|at|over|behind|and|but|from|showing|holding|blowing|screaming|increasing|decreasing|tilted) ", f"{noun} "
    )
    return (noun, "") if found is None or found.start() == 0 else (noun[: found.start()], noun[found.start() :])
