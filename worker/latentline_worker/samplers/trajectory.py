"""Runs a diffusers scheduler over network outputs and noise that are given, instead of a network's and a generator's."""

from __future__ import annotations

import inspect
import math
import sys
import threading
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch

_PATCHING = threading.Lock()  # held while a scheduler module's noise source is replaced: the patch is process-wide

Array = npt.NDArray[np.float64]


class CompileError(ValueError):
    """The scheduler's configuration cannot be written as a linear recurrence; the message says why."""


def is_flow(config: Any) -> bool:
    """Whether a scheduler's configuration is one of flow matching: the network predicts ``noise - original``."""
    return bool(config.get("prediction_type") == "flow_prediction")


@dataclass(frozen=True)
class Grid:
    """The timesteps of a trajectory.

    Args:
        steps: what users call ``num_inference_steps``; some schedulers make more network calls.
        start: the step to begin with, from a picture with as much noise as belongs there (img2img); None begins with noise alone.
        sigmas: (steps,) noise levels that the family's pipeline gives the scheduler; None leaves them to it.
        mu: the shift of the noise levels that goes with the picture's size.
    """

    steps: int
    start: int | None = None
    sigmas: tuple[float, ...] | None = None
    mu: float | None = None

    def set_on(self, scheduler: Any) -> torch.Tensor:
        """Prepare the scheduler, as diffusers' pipelines do (``retrieve_timesteps``); the (calls,) timesteps that are left to do.

        This also resets the history of multistep schedulers.
        """
        accepted = inspect.signature(scheduler.set_timesteps).parameters
        given: dict[str, Any] = {"num_inference_steps": self.steps}
        if self.sigmas is not None and not scheduler.config.get("use_flow_sigmas"):
            if "sigmas" not in accepted:
                raise CompileError(f"{type(scheduler).__name__} takes no noise levels, and this family of models gives its own")
            given = {"sigmas": list(self.sigmas)}
        if self.mu is not None:
            if "mu" in accepted:
                given["mu"] = self.mu
            elif scheduler.config.get("use_flow_sigmas"):
                scheduler.register_to_config(flow_shift=math.exp(self.mu))  # the same formula, as DPMSolverMultistepScheduler has it
            else:
                raise CompileError(f"{type(scheduler).__name__} cannot shift its noise levels with the size of the picture")
        scheduler.set_timesteps(**given)
        first = (self.start or 0) * scheduler.order
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        timesteps: torch.Tensor = scheduler.timesteps[first:]
        if not len(timesteps):
            raise CompileError(f"no step is left from step {self.start} of {self.steps}")
        return timesteps


@dataclass(frozen=True)
class Trajectory:
    """What a scheduler made of the inputs it was given, with N network calls."""

    timesteps: Array  # (N,)
    x: Array  # (N + 1, dim) latents
    input_scale: Array  # (N,)
    draws: npt.NDArray[np.bool_]  # (N,) whether a call drew noise
    noised: Array | None  # (N, 2) how the scheduler adds noise to a picture before call n; None for one from noise alone


def run(scheduler: Any, grid: Grid, x0: torch.Tensor, m: torch.Tensor, z: torch.Tensor) -> Trajectory:
    """Run the scheduler.

    Args:
        scheduler: is changed by it.
        grid: its timesteps; N of them.
        x0: (dim,) first latents, float64.
        m: (N, dim) network outputs.
        z: (N, dim) noise draws.

    Raises:
        CompileError: it draws noise more than once in a call.
    """
    timesteps = grid.set_on(scheduler)
    shape = (1, 1, 1, -1)
    x = x0.view(shape)
    rows, scales, noised = [x0.numpy()], [], []
    draws: list[int] = []
    extra: dict[str, Any] = {}
    parameters = inspect.signature(scheduler.step).parameters
    if "generator" in parameters:
        extra["generator"] = None
    if "eta" in parameters:
        extra["eta"] = 0.0  # the default of diffusers' pipelines

    def draw(*_: Any, **__: Any) -> torch.Tensor:
        draws.append(n)
        if draws.count(n) > 1:
            raise CompileError(f"{type(scheduler).__name__} draws noise more than once a step")
        return z[n].view(shape)

    with _PATCHING, mock.patch.object(sys.modules[type(scheduler).__module__], "randn_tensor", draw, create=True):
        for n, t in enumerate(timesteps):
            if grid.start is not None:
                noised.append(_add_noise(scheduler, timesteps[n : n + 1]))
            scales.append(_input_scale(scheduler, t, x.shape))
            x = scheduler.step(m[n].view(shape), t, x, return_dict=False, **extra)[0].double()
            rows.append(x.flatten().numpy())
    return Trajectory(
        timesteps.double().numpy(),
        np.stack(rows),
        np.asarray(scales),
        np.isin(np.arange(len(m)), draws),
        np.asarray(noised) if grid.start is not None else None,
    )


def _input_scale(scheduler: Any, t: torch.Tensor, shape: torch.Size) -> float:
    if not hasattr(scheduler, "scale_model_input"):  # flow matching: the network sees the latents as they are
        return 1.0
    return float(scheduler.scale_model_input(torch.ones(shape, dtype=torch.float64), t).flatten()[0])


def _add_noise(scheduler: Any, timestep: torch.Tensor) -> tuple[float, float]:
    """How much of the original and of the noise there is at a (1,) timestep. Read where the scheduler stands before that call."""
    one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)

    def noisy(original: torch.Tensor, noise: torch.Tensor) -> float:
        if hasattr(scheduler, "scale_noise"):  # flow matching, with another order of arguments
            return float(scheduler.scale_noise(original, timestep, noise))
        return float(scheduler.add_noise(original, noise, timestep))

    return noisy(one, zero), noisy(zero, one)
