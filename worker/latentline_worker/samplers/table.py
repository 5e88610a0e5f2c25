"""A sampler as numbers: one row of coefficients per call of the network."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

MAX_MEMORY = 4  # past latents and model outputs that a step may use (LMS and PNDM need four)


@dataclass(frozen=True)
class SamplerTable:
    """One trajectory of N network calls, x: latents, m: network outputs, z: fresh standard normal noise.

    ``x[n+1] = sum_j a[n,j] x[n-j] + sum_j b[n,j] m[n-j] + c[n] z[n]``, and the network sees
    ``input_scale[n] * x[n]`` at ``timesteps[n]``; ``x[0] = init_noise_sigma * z``.

    ``coefficients`` is (N, 2 * MAX_MEMORY + 1) float64: a (newest first), b (newest first), c.
    """

    num_steps: int
    timesteps: npt.NDArray[np.float64]
    input_scale: npt.NDArray[np.float64]
    coefficients: npt.NDArray[np.float64]
    init_noise_sigma: float
    memory: int
    denoised: npt.NDArray[np.float64]
    """(N, 2): the clean latents to which call n points are ``[n,0] * (network's input) + [n,1] * (its output)``."""
    draws: npt.NDArray[np.bool_]
    """(N,) whether call n draws noise: some schedulers draw what they then leave unused, and the generator moves on."""
