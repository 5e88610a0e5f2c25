"""Recipes: TOML files that say what is trained and how. Unknown keys and impossible values are refused by name."""

from __future__ import annotations

import dataclasses
import inspect
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from .errors import TrainingError

R = TypeVar("R")
PREDICTIONS = ("flow", "v_prediction", "epsilon")
AUTOENCODERS = ("AutoencoderTiny", "AutoencoderKL")
PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class Schedule:
    """What every training has. All lengths are steps, never seconds: a slow machine trains the same model.

    Args:
        steps: length of the whole training.
        batch: pictures a step and process.
        learning_rate: peak, after ``warmup_steps`` of linear rise; a half cosine then ends at 2% of it.
        muon_learning_rate: peak for the weights that Muon takes; 0 leaves all of them to AdamW.
        ema_decay: of the averaged weights, which are the ones written at the end; 0 averages nothing.
        precision: bf16 runs the forward pass in autocast; faster where the device has instructions for it.
        sample_every_steps: a sheet of samples and a held-out measurement.
    """

    steps: int
    batch: int
    learning_rate: float
    seed: int = 0
    warmup_steps: int = 100
    muon_learning_rate: float = 0.0
    weight_decay: float = 0.0
    ema_decay: float = 0.0
    clip_norm: float = 1.0
    precision: str = "fp32"
    log_every_steps: int = 50
    sample_every_steps: int = 1000

    def check(self) -> None:
        """Raises: TrainingError: a value makes no sense; the message names it."""
        at_least(self, steps=1, batch=1, warmup_steps=0, log_every_steps=1, sample_every_steps=1, learning_rate=0.0)
        at_least(self, muon_learning_rate=0.0, weight_decay=0.0, clip_norm=0.0)
        if not 0 <= self.ema_decay < 1:
            raise TrainingError(f"ema_decay: got {self.ema_decay}; allowed: 0 up to, not including, 1")
        if self.precision not in PRECISIONS:
            raise TrainingError(f"precision: got {self.precision!r}; allowed: {', '.join(PRECISIONS)}")


@dataclass(frozen=True)
class AutoencoderRecipe:
    """An autoencoder's training.

    Args:
        model: class of diffusers and its arguments, for example ``{"class": "AutoencoderTiny", ...}``.
        size_px: side of the pictures.
        crop_px: side of the random crops that are trained on; held-out pictures are measured whole.
        moment_weight: weight of the penalty that keeps each latent channel near mean 0 and variance 1.
        kl_weight: weight of the Kullback-Leibler term; for ``AutoencoderKL`` alone.
    """

    model: dict[str, Any]
    schedule: Schedule
    size_px: int = 128
    crop_px: int = 64
    moment_weight: float = 0.02
    kl_weight: float = 1e-6

    def check(self) -> None:
        """Raises: TrainingError: a value makes no sense; the message names it."""
        self.schedule.check()
        check_model(self.model, AUTOENCODERS)
        at_least(self, size_px=16, crop_px=16, moment_weight=0.0, kl_weight=0.0)
        if self.crop_px > self.size_px:
            raise TrainingError(f"crop_px: got {self.crop_px}; allowed: at most size_px, {self.size_px}")


@dataclass(frozen=True)
class DenoiserRecipe:
    """A latent denoiser's training.

    Args:
        prediction: what the network predicts: ``flow`` (velocity of rectified flow), ``v_prediction`` or ``epsilon``.
        density_mean, density_std: the timestep's logit is normal with this mean and deviation; a higher mean trains
            more at high noise. Means follow each other at the shares of the training in ``density_until``.
        caption_dropout: share of the captions replaced by the empty one, for classifier-free guidance.
        compositions: pictures that are encoded and cached for each item of the data.
        first_compositions, next_composition_steps: how many of them are in use at the first step, and after how many
            steps one more is.
    """

    model: dict[str, Any]
    schedule: Schedule
    size_px: int = 128
    prediction: str = "flow"
    density_mean: list[float] = field(default_factory=lambda: [0.0])
    density_until: list[float] = field(default_factory=lambda: [1.0])
    density_std: float = 1.0
    caption_dropout: float = 0.1
    compositions: int = 24
    first_compositions: int = 4
    next_composition_steps: int = 500

    def check(self) -> None:
        """Raises: TrainingError: a value makes no sense; the message names it."""
        self.schedule.check()
        check_model(self.model, ("UNet2DConditionModel",))
        at_least(self, size_px=16)
        check_objective(self)


class Objective(Protocol):
    """What a recipe says of the denoiser's task; ``DenoiserRecipe`` explains each."""

    @property
    def schedule(self) -> Schedule: ...
    @property
    def prediction(self) -> str: ...
    @property
    def density_mean(self) -> list[float]: ...
    @property
    def density_until(self) -> list[float]: ...
    @property
    def density_std(self) -> float: ...
    @property
    def caption_dropout(self) -> float: ...
    @property
    def compositions(self) -> int: ...
    @property
    def first_compositions(self) -> int: ...
    @property
    def next_composition_steps(self) -> int: ...


def check_objective(recipe: Objective) -> None:
    """Raises: TrainingError: prediction, densities or dropout make no sense; the message names the key."""
    at_least(recipe, compositions=1, first_compositions=1, next_composition_steps=1, density_std=0.0)
    if recipe.prediction not in PREDICTIONS:
        raise TrainingError(f"prediction: got {recipe.prediction!r}; allowed: {', '.join(PREDICTIONS)}")
    if not 0 <= recipe.caption_dropout < 1:
        raise TrainingError(f"caption_dropout: got {recipe.caption_dropout}; allowed: 0 up to, not including, 1")
    until = recipe.density_until
    if len(until) != len(recipe.density_mean) or until != sorted(until) or until[-1:] != [1.0]:
        raise TrainingError(f"density_until: got {until}; allowed: one rising share for each density_mean, the last one 1.0")


def at_least(thing: object, **least: float) -> None:
    """Raises: TrainingError: a field of ``thing`` lies below its least value."""
    for name, bound in least.items():
        if getattr(thing, name) < bound:
            raise TrainingError(f"{name}: got {getattr(thing, name)}; allowed: {bound} or more")


def check_model(model: dict[str, Any], classes: tuple[str, ...]) -> None:
    """Raises: TrainingError: the class is none of ``classes``, or does not know one of the arguments."""
    import diffusers

    name = model.get("class")
    if name not in classes:
        raise TrainingError(f"model.class: got {name!r}; allowed: {', '.join(classes)}")
    known = inspect.signature(getattr(diffusers, str(name)).__init__).parameters
    if unknown := sorted(set(model) - set(known) - {"class"}):
        raise TrainingError(f"model.{unknown[0]}: {name} has no such argument")


def parse(text: str, kind: type[R], where: str) -> R:
    """A recipe from TOML text.

    Raises:
        TrainingError: it is no TOML, a key is unknown or missing, a value has the wrong type or makes no sense.
    """
    try:
        recipe = _fill(kind, tomllib.loads(text), "")
        recipe.check()  # type: ignore[attr-defined]
    except (tomllib.TOMLDecodeError, TrainingError) as error:
        raise TrainingError(f"{where}: {error}") from error
    return recipe


def load(path: Path, kind: type[R]) -> R:
    """A recipe from a file; raises as ``parse`` does."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"{path}: the recipe cannot be read: {error}") from error
    return parse(text, kind, str(path))


def _fill(kind: type[R], values: dict[str, Any], prefix: str) -> R:
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - set(fields)):
        raise TrainingError(f"{prefix}{unknown[0]}: no such key; known are {', '.join(fields)}")
    filled: dict[str, Any] = {}
    for name, f in fields.items():
        if name not in values:
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
                raise TrainingError(f"{prefix}{name} is missing")
        elif f.type == "Schedule":
            if not isinstance(values[name], dict):
                raise TrainingError(f"{prefix}{name}: must be a table")
            filled[name] = _fill(Schedule, values[name], f"{name}.")
        else:
            filled[name] = _typed(values[name], str(f.type), f"{prefix}{name}")
    return kind(**filled)


def _typed(value: Any, declared: str, name: str) -> Any:
    """The value as its field declares it; TOML writes 1 where a float is meant."""
    if declared == "float" and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if declared == "list[str]" and isinstance(value, list) and all(isinstance(v, str) for v in value):
        return value
    if declared == "list[float]" and isinstance(value, list) and all(type(v) in (int, float) for v in value):
        return [float(v) for v in value]
    if type(value).__name__ != declared.partition("[")[0] or declared.startswith("list["):
        raise TrainingError(f"{name}: got {value!r}; must be {declared}")
    return value
