"""Read a scheduler's coefficients off unit impulses.

The diffusers schedulers of this family are linear in their inputs. In one trajectory the first latents, each network
output and each noise draw are therefore given as different unit vectors: the components of every later latent show how it
depends on them. A small least-squares fit turns this into a recurrence of low order. The table is then checked against
the scheduler on random inputs, so that a scheduler that is not linear (thresholding, sample clipping) is refused and
never silently approximated.
"""

from __future__ import annotations

import copy
import inspect
import sys
import threading
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch

from .table import MAX_ORDER, SamplerTable

FIT_TOLERANCE = 1e-5  # relative; schedulers hold their sigmas in float32, which leaves about 2e-7
_PATCHING = threading.Lock()  # held while a scheduler module's noise source is replaced: the patch is process-wide

Array = npt.NDArray[np.float64]


class CompileError(ValueError):
    """The scheduler's configuration cannot be written as a linear recurrence; the message says why."""


def compile_scheduler(scheduler: Any, num_inference_steps: int) -> SamplerTable:
    """Compile a diffusers scheduler for one step count. The scheduler itself is left untouched.

    Raises:
        CompileError: it is not linear, needs a higher order than ``MAX_ORDER``, or refuses the step count.
    """
    name = type(scheduler).__name__
    for option in ("thresholding", "clip_sample"):
        if scheduler.config.get(option):
            raise CompileError(f"{name} with {option}=True is not linear in its inputs and cannot share a batch: set {option}=False")
    if not hasattr(scheduler, "alphas_cumprod") or not hasattr(scheduler, "scale_model_input"):
        raise CompileError(f"{name} has no variance-preserving noise schedule: it belongs to another family of models")
    scheduler = copy.deepcopy(scheduler)
    try:
        scheduler.set_timesteps(num_inference_steps)
        timesteps = scheduler.timesteps.clone()
        count = len(timesteps)
        dim = 1 + 2 * count  # the first latents, the network's outputs, the noise draws
        units = torch.eye(dim, dtype=torch.float64)
        x, scale, draws = _trajectory(scheduler, num_inference_steps, units[0], units[1 : 1 + count], units[1 + count :])
    except CompileError:
        raise
    except (ValueError, IndexError, RuntimeError, AssertionError, TypeError, ZeroDivisionError) as error:
        raise CompileError(f"{name} refuses {num_inference_steps} steps: {error}") from error
    coefficients, order = _fit(name, x, units[1 : 1 + count].numpy(), units[1 + count :].numpy())
    table = SamplerTable(
        num_steps=count,
        timesteps=timesteps.double().numpy(),
        input_scale=scale,
        coefficients=coefficients,
        init_noise_sigma=float(scheduler.init_noise_sigma),
        order=order,
        denoised=_denoised(scheduler, timesteps.double().numpy()),
        draws=draws,
    )
    _check(name, scheduler, num_inference_steps, table)
    return table


def _trajectory(
    scheduler: Any, steps: int, x0: torch.Tensor, m: torch.Tensor, z: torch.Tensor
) -> tuple[Array, Array, npt.NDArray[np.bool_]]:
    """Latents (count + 1, dim), input scales (count,) and noise draws (count,) of a run with given outputs ``m`` and noise ``z``."""
    scheduler.set_timesteps(steps)  # also resets the history of multistep schedulers
    x = x0.view(1, 1, 1, -1)
    shape = x.shape
    rows, scales = [x0.numpy()], []
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
        for n, t in enumerate(scheduler.timesteps):
            probe = torch.ones(shape, dtype=torch.float64)
            scales.append(float(scheduler.scale_model_input(probe, t).flatten()[0]))
            x = scheduler.step(m[n].view(shape), t, x, return_dict=False, **extra)[0].double()
            rows.append(x.flatten().numpy())
    return np.stack(rows), np.asarray(scales), np.isin(np.arange(len(m)), draws)


def _denoised(scheduler: Any, timesteps: Array) -> Array:
    """How network input and output combine to clean latents, by the noise schedule (Ho et al. 2020, arXiv:2006.11239, eq. 15).

    For previews. The network's input is variance-preserving for every scheduler of this family, even where its latents are not.
    """
    alpha_bar = scheduler.alphas_cumprod.double().numpy()
    a = np.interp(timesteps, np.arange(len(alpha_bar)), alpha_bar)
    signal, noise = np.sqrt(a), np.sqrt(1 - a)
    kind = scheduler.config.get("prediction_type", "epsilon")
    if kind == "v_prediction":  # Salimans and Ho 2022, arXiv:2202.00512
        return np.stack([signal, -noise], axis=1)
    if kind == "sample":
        return np.stack([np.zeros_like(a), np.ones_like(a)], axis=1)
    return np.stack([1 / signal, -noise / signal], axis=1)


def _fit(name: str, x: Array, m: Array, z: Array) -> tuple[Array, int]:
    """The coefficients and the order of the lowest-order recurrence that reproduces all latents."""
    worst = np.inf
    for order in range(1, MAX_ORDER + 1):
        table = np.zeros((len(m), 2 * MAX_ORDER + 1))
        worst = 0.0
        for n in range(len(m)):
            depth = min(order, n + 1)
            basis = np.stack([x[n - j] for j in range(depth)] + [m[n - j] for j in range(depth)] + [z[n]], axis=1)
            # Columns may differ by orders of magnitude (schedulers with latents in sigma space): fit them at unit length.
            length = np.linalg.norm(basis, axis=0)
            solution = np.linalg.lstsq(basis / length, x[n + 1], rcond=1e-10)[0]
            residual = np.linalg.norm(basis / length @ solution - x[n + 1])
            worst = max(worst, float(residual) / max(float(np.linalg.norm(x[n + 1])), 1e-12))
            solution = solution / length
            table[n, :depth] = solution[:depth]
            table[n, MAX_ORDER : MAX_ORDER + depth] = solution[depth : 2 * depth]
            table[n, -1] = solution[-1] if abs(solution[-1]) > 1e-9 else 0.0
        if worst < FIT_TOLERANCE:
            return table, order
    raise CompileError(f"{name} is no linear recurrence over {MAX_ORDER} steps (relative residual {worst:.1e})")


def _check(name: str, scheduler: Any, steps: int, table: SamplerTable) -> None:
    """Compare with the scheduler on random inputs large enough to show any clipping."""
    generator = torch.Generator().manual_seed(0)
    x0, *rest = torch.randn(1 + 2 * table.num_steps, 64, generator=generator, dtype=torch.float64) * 3
    m, z = torch.stack(rest[: table.num_steps]), torch.stack(rest[table.num_steps :])
    x0 = x0 * table.init_noise_sigma
    expected, _, _ = _trajectory(scheduler, steps, x0, m, z)
    x = np.zeros((table.num_steps + 1, 64))
    x[0] = x0.numpy()
    for n in range(table.num_steps):
        a, b, c = np.split(table.coefficients[n], [MAX_ORDER, 2 * MAX_ORDER])
        depth = min(MAX_ORDER, n + 1)
        x[n + 1] = sum(a[j] * x[n - j] + b[j] * m[n - j].numpy() for j in range(depth)) + c[0] * z[n].numpy()
    error = np.abs(x - expected).max() / np.abs(expected).max()
    if not error < 10 * FIT_TOLERANCE:
        raise CompileError(f"{name} is not linear in its inputs (error {error:.1e} on random inputs)")
