"""The tensors of a lane: gather rows, one forward, one fused sampler update, scatter."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from latentline_worker.models.base import Family
from latentline_worker.samplers import MAX_MEMORY

from .request import Request


class Lane:
    """Fixed slots for the images of one latent shape, and the step over any subset of them.

    ``history`` is (slots, 2 * MAX_MEMORY + 1, c * h * w) float32: past latents newest first, past network outputs
    newest first, and this step's noise: one batched product with the coefficient rows is the sampler update
    of all jobs, whatever their samplers. It stays float32 when the network runs in half precision.
    """

    def __init__(self, family: Family, shape: tuple[int, int, int]) -> None:
        self.family = family
        self.shape = shape
        self._free: list[int] = []
        self._generators: dict[int, torch.Generator] = {}
        self._history = torch.zeros(0, 2 * MAX_MEMORY + 1, int(np.prod(shape)), device=family.device)
        self._cond: torch.Tensor | None = None
        self._uncond: torch.Tensor | None = None

    def join(self, request: Request) -> None:
        """Give every image of the request a slot with its first latents (drawn as diffusers draws them)."""
        work = request.work
        if len(self._free) < request.num_images:
            self._grow(max(4, request.num_images, len(self._history)), work.cond)
        assert self._cond is not None and self._uncond is not None  # _grow made them
        for seed in work.seeds:
            slot = self._free.pop()
            request.slots.append(slot)
            # On the CPU whatever the device, so that a seed means the same picture everywhere.
            generator = self._generators[slot] = torch.Generator().manual_seed(seed)
            self._history[slot].zero_()
            self._history[slot, 0] = self._draw(generator) * work.table.init_noise_sigma
            self._cond[slot] = work.cond
            if work.uncond is not None:
                self._uncond[slot] = work.uncond

    def leave(self, request: Request) -> None:
        """Free the request's slots."""
        for slot in request.slots:
            del self._generators[slot]
        self._free.extend(request.slots)
        request.slots = []

    def latents(self, request: Request) -> torch.Tensor:
        """(images, c, h, w): where the request's latents stand, copied."""
        return self._history[request.slots, 0].view(-1, *self.shape).clone()

    @torch.no_grad()
    def step(self, requests: Sequence[Request]) -> None:
        """Advance every request by one network call. Raises before anything is changed, or not at all."""
        assert self._cond is not None and self._uncond is not None  # a request joined
        device = self.family.device
        images = [(r, slot) for r in requests for slot in r.slots]
        slots = torch.tensor([slot for _, slot in images], device=device)
        per_image = np.array(
            [(r.work.table.input_scale[r.step], r.work.table.timesteps[r.step], r.work.guidance_scale) for r, _ in images], dtype=np.float32
        )
        scale, timesteps, guidance = torch.from_numpy(per_image).to(device).unbind(1)
        coefficients = np.stack([r.work.table.coefficients[r.step] for r, _ in images]).astype(np.float32)

        history = self._history[slots]
        x = (history[:, 0] * scale[:, None]).view(-1, *self.shape)
        guided = torch.tensor([i for i, (r, _) in enumerate(images) if r.guided], dtype=torch.long, device=device)
        m = self.family.denoise(
            torch.cat([x, x[guided]]),
            torch.cat([timesteps, timesteps[guided]]),
            torch.cat([self._cond[slots], self._uncond[slots[guided]]]),
        ).float()
        m, m_uncond = m[: len(images)], m[len(images) :]
        m[guided] = m_uncond + guidance[guided].view(-1, 1, 1, 1) * (m[guided] - m_uncond)

        history[:, MAX_MEMORY + 1 : -1] = history[:, MAX_MEMORY:-2].clone()
        history[:, MAX_MEMORY] = m.flatten(1)
        for i, (_, slot) in enumerate(images):
            if coefficients[i, -1] != 0:
                history[i, -1] = self._draw(self._generators[slot]).to(device)
        x_next = torch.bmm(torch.from_numpy(coefficients).to(device)[:, None], history)[:, 0]
        history[:, 1:MAX_MEMORY] = history[:, : MAX_MEMORY - 1].clone()
        history[:, 0] = x_next
        self._history[slots] = history

    def finite(self, request: Request) -> bool:
        """Whether the request's latents are all finite numbers."""
        return bool(torch.isfinite(self._history[request.slots, 0]).all())

    def _draw(self, generator: torch.Generator) -> torch.Tensor:
        # In the network's own type, as diffusers draws it: the same seed then gives the same numbers.
        return torch.randn((1, *self.shape), generator=generator, dtype=self.family.dtype).float().flatten()

    def _grow(self, count: int, states: torch.Tensor) -> None:
        start = len(self._history)
        self._free.extend(range(start, start + count))

        def extend(old: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
            fresh = like.new_zeros(count, *like.shape)
            return fresh if old is None else torch.cat([old, fresh])

        self._history = extend(self._history, self._history.new_zeros(self._history.shape[1:]))
        self._cond, self._uncond = extend(self._cond, states), extend(self._uncond, states)
