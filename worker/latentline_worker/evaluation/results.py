"""Many pictures' answers as figures with intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .intervals import Figure, share
from .measures import Seen
from .prompts import Prompt

# What is reported, in the order of the report: name -> the answer of one picture, None where its prompt does not ask.
MEASURES: dict[str, Callable[[Seen], float | None]] = {
    "R@1": lambda seen: seen.recall(1),
    "R@5": lambda seen: seen.recall(5),
    "background": lambda seen: float(seen.background),
    "object colour": lambda seen: seen.colour,
    "count": lambda seen: None if seen.count is None else float(seen.count),
    "place": lambda seen: None if seen.place is None else float(seen.place),
    "order of two": lambda seen: None if seen.order is None else float(seen.order),
}


@dataclass(frozen=True)
class Row:
    """One line of a table: whose pictures, and their figures by measure."""

    name: str
    figures: dict[str, Figure]


def figures_of(by_seed: Sequence[Sequence[Seen]]) -> dict[str, Figure]:
    """Figures by measure; ``by_seed`` holds, for each seed, one answer for each prompt.

    A prompt's value is its mean over the seeds.
    """
    found = {}
    for name, read in MEASURES.items():
        values = []
        for answers in zip(*by_seed, strict=True):
            read_ones = [value for value in map(read, answers) if value is not None]
            if read_ones:
                values.append(float(np.mean(read_ones)))
        if values:
            found[name] = share(values)
    return found


def by_layout(prompts: list[Prompt], by_seed: Sequence[Sequence[Seen]]) -> list[Row]:
    """The same for each kind of picture, groups by their number."""
    rows = []
    for kind in dict.fromkeys(_kind(prompt) for prompt in prompts):
        chosen = [index for index, prompt in enumerate(prompts) if _kind(prompt) == kind]
        rows.append(Row(kind, figures_of([[seen[index] for index in chosen] for seen in by_seed])))
    return rows


def _kind(prompt: Prompt) -> str:
    composition = prompt.composition
    return {"single": "one large object", "placed": "a small object at a place", "pair": "two things"}.get(
        composition.layout, f"a group of {composition.count}"
    )
