"""95% intervals. The pictures of one prompt resemble each other, so the prompt is the unit and not the picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

Z = 1.96
RESAMPLES = 2000


@dataclass(frozen=True)
class Figure:
    """A mean with its 95% interval over ``num`` prompts or pictures."""

    mean: float
    low: float
    high: float
    num: int

    def to_json(self) -> dict[str, float]:
        return {name: round(value, 5) for name, value in asdict(self).items()}


def share(values: Sequence[float]) -> Figure:
    """Wilson's interval (1927) of a share; each value is one prompt's share of successes, 0 to 1.

    A prompt counts once however many seeds it was drawn with: seeds of one prompt are not independent.
    """
    n, p = len(values), float(np.mean(values))
    middle = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    return Figure(p, max(0.0, middle - half), min(1.0, middle + half), n)


def mean(values: Sequence[float]) -> Figure:
    """The bootstrap interval (percentiles) of a mean, one value for each prompt or picture; always the same resamples."""
    array = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(0).integers(0, len(array), (RESAMPLES, len(array)))
    low, high = np.percentile(array[drawn].mean(axis=1), [2.5, 97.5])
    return Figure(float(array.mean()), float(low), float(high), len(array))
