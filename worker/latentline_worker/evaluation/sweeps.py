"""Guidance, sampler and steps, chosen on the validation prompts: the test prompts never choose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from .drawing import Model, Settings
from .intervals import Figure
from .measures import look
from .probe import Probe
from .prompts import Prompt
from .results import figures_of

GUIDANCES = (1.0, 2.0, 3.0, 4.5, 6.0)
STEPS = (4, 8, 12, 20, 50)
FIRST = Settings(sampler="dpmpp_2m", steps=20, guidance=3.0)  # what is kept while the others vary
# Of a distilled model, which has its guidance within.
FEW_STEPS = (1, 2, 4, 8)
FIRST_DISTILLED = Settings(sampler="euler", steps=4, guidance=1.0)
CRITERION = "R@5"
TOLERANCE = 0.01  # fewer steps are chosen where they cost no more than this


@dataclass(frozen=True)
class Point:
    """One setting of a sweep and its figures by measure."""

    settings: Settings
    figures: dict[str, Figure]


@dataclass(frozen=True)
class Choice:
    """What was chosen, and the sweeps that chose it: name of the setting -> its points."""

    settings: Settings
    sweeps: dict[str, list[Point]]
    given: tuple[str, ...]

    def origin(self, name: str) -> str:
        """Where a setting comes from, as the report says it."""
        return "given" if name in self.given else "chosen" if name in self.sweeps else "the model's own"


def choose(model: Model, prompts: list[Prompt], probe: Probe, given: dict[str, object]) -> Choice:
    """Vary one setting after the other with seed 0: guidance, then the sampler, then the steps; of a distilled model the steps alone.

    The highest R@5 wins; of the steps, the fewest within a point of the highest.

    Args:
        given: settings that are fixed from outside and not chosen.
    """
    settings = replace(FIRST_DISTILLED if model.distilled else FIRST, **given)  # type: ignore[arg-type]
    if settings.sampler not in model.samplers and "sampler" not in given:
        settings = replace(settings, sampler=model.samplers[0])
    sweeps: dict[str, list[Point]] = {}

    def sweep(name: str, values: tuple[object, ...], best: Callable[[list[Point]], Point]) -> None:
        nonlocal settings
        if name not in given:
            points = [_point(model, prompts, probe, replace(settings, **{name: value})) for value in values]  # type: ignore[arg-type]
            sweeps[name] = points
            settings = best(points).settings

    if not model.distilled:
        sweep("guidance", GUIDANCES, _highest)
        sweep("sampler", model.samplers, _highest)
    sweep("steps", FEW_STEPS if model.distilled else STEPS, _fewest)
    return Choice(settings, sweeps, tuple(given))


def _point(model: Model, prompts: list[Prompt], probe: Probe, settings: Settings) -> Point:
    pictures = model.draw("validation", prompts, settings, seed=0)
    return Point(settings, figures_of([look(pictures, prompts, probe)]))


def _highest(points: list[Point]) -> Point:
    return max(points, key=lambda point: point.figures[CRITERION].mean)


def _fewest(points: list[Point]) -> Point:
    bound = _highest(points).figures[CRITERION].mean - TOLERANCE
    return min((point for point in points if point.figures[CRITERION].mean >= bound), key=lambda point: point.settings.steps)
