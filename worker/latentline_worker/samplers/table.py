"""A sampler as a table: one row of coefficients per network call."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

MAX_ORDER = 4  # past latents, and past network outputs, that a step may use (LMS and PNDM need four)
DIGITS = 6  # decimals of a table that its digest sees


@dataclass(frozen=True)
class SamplerTable:
    """One trajectory of N network calls, x: latents, m: network outputs, z: fresh standard normal noise.

    ``x[n+1] = sum_j a[n,j] x[n-j] + sum_j b[n,j] m[n-j] + c[n] z[n]``, and the network sees
    ``input_scale[n] * x[n]`` at ``timesteps[n]``; ``x[0] = init[0] * original + init[1] * z``, where ``original`` are the
    latents of a picture to start from.

    ``coefficients`` is (N, 2 * MAX_ORDER + 1) float64: a (newest first), b (newest first), c.
    """

    num_steps: int
    timesteps: npt.NDArray[np.float64]
    input_scale: npt.NDArray[np.float64]
    coefficients: npt.NDArray[np.float64]
    init: tuple[float, float]
    """Of the original and of the noise; (0, sigma) for a trajectory from noise alone."""
    order: int
    """Past latents, and past network outputs, that its steps use: 1 to MAX_ORDER."""
    denoised: npt.NDArray[np.float64]
    """(N, 2): the clean latents that call n predicts are ``[n,0] * (network's input) + [n,1] * (its output)``."""
    draws: npt.NDArray[np.bool_]
    """(N,) whether call n draws noise. Some schedulers draw noise and do not use it; the generator advances all the same."""
    renoise: npt.NDArray[np.float64] | None = None
    """(N, 2): the original as noisy as the latents are after call n is ``[n,0] * original + [n,1] * (the first noise)``; the last
    row is (1, 0). None for a trajectory from noise alone."""

    @functools.cached_property
    def digest(self) -> str:
        """Of all that makes the trajectory, the same on every machine.

        The coefficients are rounded first: they come from a least-squares fit, whose last bits depend on the CPU.
        """
        found = hashlib.sha256(f"{self.num_steps} {self.order}".encode())
        for values in (self.timesteps, self.input_scale, self.coefficients, self.init, self.draws):
            found.update((np.round(np.asarray(values, dtype=np.float64), DIGITS) + 0.0).tobytes())  # adding 0 turns -0 into 0
        return found.hexdigest()
