"""The tensors of a lane: gather rows, one forward, one fused sampler update, scatter."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from latentline_worker.models.base import Family
from latentline_worker.samplers import MAX_MEMORY

from .checkpoint import Checkpoint
from .clock import StepClock
from .network import Network
from .request import LaneKey, Request

GROWTH = 8  # slots added at a time


class Lane:
    """Slots for the images of one latent shape, and the step over any subset of them.

    ``history`` is (slots, 2 * MAX_MEMORY + 1, c * h * w) float32: past latents newest first, past network outputs
    newest first, and this step's noise: their sum, weighted with each job's coefficients, is the sampler update
    of all jobs at once, whatever their samplers. It stays float32 when the network runs in half precision. Everything a
    step reads lies on the device already, but for one small table of numbers and fresh noise, both sent without waiting.
    """

    def __init__(self, family: Family, key: LaneKey, network: Network, clock: StepClock) -> None:
        self.family = family
        self.shape = key.latent_shape
        self._network = network
        self._clock = clock
        self._free: list[int] = []
        self._generators: dict[int, torch.Generator] = {}
        self._history = torch.zeros(0, 2 * MAX_MEMORY + 1, key.num_latents, device=family.device)
        self._cond: torch.Tensor | None = None
        self._uncond: torch.Tensor | None = None

    @property
    def num_used(self) -> int:
        """Slots that hold an image."""
        return len(self._history) - len(self._free)

    def join(self, request: Request, cond: torch.Tensor, uncond: torch.Tensor | None) -> None:
        """Give every image of the request a slot with its first latents (drawn as diffusers draws them)."""
        work = request.work
        if len(self._free) < request.num_images:
            self._grow(max(GROWTH, request.num_images), cond)
        assert self._cond is not None and self._uncond is not None  # _grow made them
        for seed in work.seeds:
            slot = self._free.pop()
            request.slots.append(slot)
            # On the CPU whatever the device, so that a seed means the same picture everywhere.
            generator = self._generators[slot] = torch.Generator().manual_seed(seed)
            self._history[slot].zero_()
            self._history[slot, 0] = self._to_device(self._draw(generator)) * work.table.init_noise_sigma
            self._cond[slot] = cond
            if uncond is not None:
                self._uncond[slot] = uncond
        if work.resume is not None:
            self._restore(request, work.resume)

    def leave(self, request: Request) -> None:
        """Free the request's slots."""
        for slot in request.slots:
            del self._generators[slot]
        self._free.extend(request.slots)
        request.slots = []

    def latents(self, request: Request) -> torch.Tensor:
        """(images, c, h, w): where the request's latents stand, copied."""
        return self._history[request.slots, 0].view(-1, *self.shape).clone()

    def snapshot(self, request: Request) -> Checkpoint:
        """All that another worker needs to go on from here, still on the device."""
        memory = request.work.table.memory
        columns = [*range(memory), *range(MAX_MEMORY, MAX_MEMORY + memory)]
        return Checkpoint(request.step, self._history[request.slots][:, columns].clone())

    def _restore(self, request: Request, checkpoint: Checkpoint) -> None:
        table = request.work.table
        request.step = checkpoint.step
        history = checkpoint.history.to(self.family.device)
        for slot, past in zip(request.slots, history, strict=True):
            self._history[slot, : table.memory] = past[: table.memory]
            self._history[slot, MAX_MEMORY : MAX_MEMORY + table.memory] = past[table.memory :]
            for _ in range(int(table.draws[: checkpoint.step].sum())):
                self._draw(self._generators[slot])  # the generator then stands where it stood

    def denoised(self, request: Request) -> torch.Tensor:
        """(images, c, h, w): the clean latents that the last network call pointed to. Only after a first step."""
        table, n = request.work.table, request.step - 1
        scale, (from_x, from_m) = float(table.input_scale[n]), table.denoised[n]
        history = self._history[request.slots]
        x0 = float(from_x) * scale * history[:, 1] + float(from_m) * history[:, MAX_MEMORY]
        return x0.view(-1, *self.shape)

    @torch.inference_mode()
    def step(self, requests: Sequence[Request], most_rows: int) -> int:
        """Advance every request by one network call; the rows that went through the network in one go.

        Raises before anything is changed, or not at all.
        """
        assert self._cond is not None and self._uncond is not None  # a request joined
        self._clock.mark()
        images = [(r, slot) for r in requests for slot in r.slots]
        count = len(images)
        guided = [i for i, (r, _) in enumerate(images) if r.work.guided]
        # Per image: [input scale, timestep, guidance, coefficients].
        numbers = np.empty((count, 3 + 2 * MAX_MEMORY + 1), dtype=np.float32)
        for i, (r, _) in enumerate(images):
            table = r.work.table
            numbers[i, :3] = table.input_scale[r.step], table.timesteps[r.step], r.work.guidance_scale
            numbers[i, 3:] = table.coefficients[r.step]
        sent = self._to_device(torch.from_numpy(numbers))
        places = self._to_device(torch.tensor([slot for _, slot in images] + guided))
        slots, guided_at = places[:count], places[count:]
        scale, timesteps, guidance = sent[:, 0], sent[:, 1], sent[guided_at, 2].view(-1, 1, 1, 1)

        history = self._history[slots]
        x = (history[:, 0] * scale[:, None]).view(-1, *self.shape)
        x, timesteps = torch.cat([x, x[guided_at]]), torch.cat([timesteps, timesteps[guided_at]])
        states = torch.cat([self._cond[slots], self._uncond[slots[guided_at]]])
        self._clock.mark()
        m, rows = self._network(x, timesteps, states, most_rows)
        self._clock.mark()
        if guided:
            m, m_uncond = m[:count], m[count:]
            # Classifier-free guidance: Ho and Salimans 2022 (arXiv:2207.12598).
            m[guided_at] = m_uncond + guidance * (m[guided_at] - m_uncond)

        history[:, MAX_MEMORY + 1 : -1] = history[:, MAX_MEMORY:-2].clone()
        history[:, MAX_MEMORY] = m.flatten(1)
        noisy = [i for i, (r, _) in enumerate(images) if r.work.table.draws[r.step]]
        if noisy:
            history[noisy, -1] = self._to_device(torch.stack([self._draw(self._generators[images[i][1]]) for i in noisy]))
        # Term by term over those that any sampler uses: a batched matrix product may sum in another order for
        # another batch size, and then a picture would depend on its neighbours.
        x_next = torch.zeros_like(history[:, 0])
        for j in np.flatnonzero(numbers[:, 3:].any(0)):
            x_next.addcmul_(sent[:, 3 + j, None], history[:, j])
        history[:, 1:MAX_MEMORY] = history[:, : MAX_MEMORY - 1].clone()
        history[:, 0] = x_next
        self._history[slots] = history
        self._clock.mark()
        return rows

    def _draw(self, generator: torch.Generator) -> torch.Tensor:
        # In the network's own type, as diffusers draws it: the same seed then gives the same numbers.
        return torch.randn((1, *self.shape), generator=generator, dtype=self.family.dtype).float().flatten()

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.family.device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self.family.device, non_blocking=True)

    def _grow(self, count: int, states: torch.Tensor) -> None:
        def extend(old: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
            fresh = like.new_zeros(count, *like.shape)
            return fresh if old is None else torch.cat([old, fresh])

        start = len(self._history)
        # All or nothing: memory may run out in any of them.
        history = extend(self._history, self._history.new_zeros(self._history.shape[1:]))
        cond, uncond = extend(self._cond, states), extend(self._uncond, states)
        self._history, self._cond, self._uncond = history, cond, uncond
        self._free.extend(range(start, start + count))
