"""Read a scheduler's coefficients off unit impulses.

The diffusers schedulers of diffusion and flow-matching models are linear in their inputs. In one trajectory the first latents,
each network output and each noise draw are therefore given as different unit vectors: the components of every later latent
show how it depends on them. A small least-squares fit turns this into a recurrence of low order. The table is then checked
against the scheduler on random inputs, so that a scheduler that is not linear (thresholding, sample clipping) is refused and
never silently approximated.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .table import MAX_ORDER, SamplerTable
from .trajectory import Array, CompileError, Grid, is_flow, run

FIT_TOLERANCE = 1e-5  # relative; schedulers hold their sigmas in float32, which leaves about 2e-7
# Timesteps are rounded to whole numbers by some schedulers, so the noise level that one tells is this close to the true one.
SIGMA_TOLERANCE = 2e-3


def compile_scheduler(
    scheduler: Any,
    num_inference_steps: int,
    *,
    start: int | None = None,
    sigmas: Sequence[float] | None = None,
    mu: float | None = None,
) -> SamplerTable:
    """Compile a diffusers scheduler for one step count. The scheduler itself is left untouched.

    Args:
        scheduler: with the model's own configuration.
        num_inference_steps: of the whole schedule.
        start: the step to begin with, from a picture with noise added to it; None for noise alone, from the first step on.
        sigmas: (num_inference_steps,) noise levels; None for the scheduler's own.
        mu: shift of the noise levels for the picture's size.

    Raises:
        CompileError: it is not linear, needs a higher order than ``MAX_ORDER``, or refuses the step count.
    """
    name, grid = type(scheduler).__name__, Grid(num_inference_steps, start, None if sigmas is None else tuple(sigmas), mu)
    for option in ("thresholding", "clip_sample"):
        if scheduler.config.get(option):
            raise CompileError(f"{name} with {option}=True is not linear in its inputs and cannot share a batch: set {option}=False")
    flow = hasattr(scheduler, "scale_noise") or is_flow(scheduler.config)
    if not flow and not (hasattr(scheduler, "alphas_cumprod") and hasattr(scheduler, "scale_model_input")):
        raise CompileError(f"{name} has no noise schedule of diffusion or flow matching: it belongs to another family of models")
    scheduler = copy.deepcopy(scheduler)
    try:
        count = len(grid.set_on(scheduler))
        units = torch.eye(1 + 2 * count, dtype=torch.float64)  # the first latents, the network's outputs, the noise draws
        m, z = units[1 : 1 + count], units[1 + count :]
        found = run(scheduler, grid, units[0], m, z)
    except CompileError:
        raise
    except (ValueError, IndexError, RuntimeError, AssertionError, TypeError, ZeroDivisionError, np.linalg.LinAlgError) as error:
        raise CompileError(f"{name} refuses {num_inference_steps} steps: {error or type(error).__name__}") from error
    coefficients, order = _fit(name, found.x, m.numpy(), z.numpy())
    table = SamplerTable(
        num_steps=count,
        timesteps=found.timesteps,
        input_scale=found.input_scale,
        coefficients=coefficients,
        init=(0.0, float(getattr(scheduler, "init_noise_sigma", 1.0))) if found.noised is None else _pair(found.noised[0]),
        order=order,
        denoised=_denoised_by_flow(scheduler, found.timesteps) if flow else _denoised(scheduler, found.timesteps),
        draws=found.draws,
        renoise=None if found.noised is None else np.concatenate([found.noised[1:], [[1.0, 0.0]]]),
    )
    if flow and found.noised is not None:
        _check_noise(name, scheduler, found.timesteps, found.noised)
    _check(name, scheduler, grid, table)
    return table


def _pair(values: Array) -> tuple[float, float]:
    return float(values[0]), float(values[1])


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


def _flow_sigmas(scheduler: Any, timesteps: Array) -> Array:
    """The noise levels, 1 for noise alone."""
    sigmas: Array = timesteps / scheduler.config.num_train_timesteps
    return sigmas


def _denoised_by_flow(scheduler: Any, timesteps: Array) -> Array:
    """The same for flow matching, whose network predicts ``noise - original`` (Liu et al. 2022, arXiv:2209.03003)."""
    sigmas = _flow_sigmas(scheduler, timesteps)
    return np.stack([np.ones_like(sigmas), -sigmas], axis=1)


def _check_noise(name: str, scheduler: Any, timesteps: Array, noised: Array) -> None:
    """Noise must be added along the straight paths that the trajectory follows; SASolverScheduler adds another amount."""
    sigmas = _flow_sigmas(scheduler, timesteps)
    if np.abs(noised - np.stack([1 - sigmas, sigmas], axis=1)).max() > SIGMA_TOLERANCE:
        raise CompileError(f"{name} adds other noise to a picture than its own flow has: it cannot start from one")


def _fit(name: str, x: Array, m: Array, z: Array) -> tuple[Array, int]:
    """The coefficients and the order of the lowest-order recurrence that reproduces all latents."""
    if not np.isfinite(x).all():
        raise CompileError(f"{name} with this configuration gives values that are no numbers")
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


def _check(name: str, scheduler: Any, grid: Grid, table: SamplerTable) -> None:
    """Compare with the scheduler on random inputs large enough to show any clipping."""
    error = residual(scheduler, grid, table)
    if not error < 10 * FIT_TOLERANCE:
        raise CompileError(f"{name} is not linear in its inputs (error {error:.1e} on random inputs)")


def residual(scheduler: Any, grid: Grid, table: SamplerTable) -> float:
    """The largest difference between table and scheduler over a trajectory of random inputs, relative to its largest latent."""
    generator = torch.Generator().manual_seed(0)
    x0, *rest = torch.randn(1 + 2 * table.num_steps, 64, generator=generator, dtype=torch.float64) * 3
    m, z = torch.stack(rest[: table.num_steps]), torch.stack(rest[table.num_steps :])
    x0 = x0 * max(table.init)
    expected = run(scheduler, grid, x0, m, z).x
    x = np.zeros((table.num_steps + 1, 64))
    x[0] = x0.numpy()
    for n in range(table.num_steps):
        a, b, c = np.split(table.coefficients[n], [MAX_ORDER, 2 * MAX_ORDER])
        depth = min(MAX_ORDER, n + 1)
        x[n + 1] = sum(a[j] * x[n - j] + b[j] * m[n - j].numpy() for j in range(depth)) + c[0] * z[n].numpy()
    return float(np.abs(x - expected).max() / np.abs(expected).max())
