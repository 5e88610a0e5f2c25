"""Muon: momentum whose matrices are orthogonalised before they are applied.

Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/). ``torch.optim.Muon`` takes matrices only and
iterates in bf16, which is slow on CPUs without instructions for it; this one flattens convolutions to (out, in * height * width)
and iterates in the format that it is given. A test holds it equal to torch's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# Coefficients of the quintic iteration: five of them bring singular values in (0, 1] near to 1.
A, B, C = 3.4445, -4.7750, 2.0315
NS_STEPS = 5


def orthogonalise(g: Tensor) -> Tensor:
    """Newton-Schulz iteration towards the nearest semi-orthogonal matrix; (rows, columns) -> the same shape."""
    x: Tensor = g / g.norm().clamp(min=1e-7)
    if g.shape[0] > g.shape[1]:
        x = x.T
    for _ in range(NS_STEPS):
        gram = x @ x.T
        x = A * x + (B * gram + C * gram @ gram) @ x
    return x.T if g.shape[0] > g.shape[1] else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum with orthogonalised updates, for weights of two and more dimensions.

    Args:
        lr: step size; an update has a spectral norm of about ``lr * sqrt(max(1, rows / columns))``.
        dtype: of the iteration; momentum and weights keep their own.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 0.01,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.dtype = dtype
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Apply one update to every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state: dict[str, Any] = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                m = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(m, group["momentum"]).flatten(1)
                scale = max(1.0, update.shape[0] / update.shape[1]) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(orthogonalise(update.to(self.dtype)).to(p.dtype).view_as(p), alpha=-group["lr"] * scale)


def suits_muon(p: Tensor) -> bool:
    """Whether a weight is a matrix worth orthogonalising: both sides, once flattened, are at least 16."""
    return p.ndim >= 2 and p.shape[0] >= 16 and p[0].numel() >= 16
