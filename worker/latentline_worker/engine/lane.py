"""The tensors of a lane: gather rows, run the network once, guide, advance all samplers at once, commit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from latentline_worker.models.base import Family, Row
from latentline_worker.models.transfer import to_device
from latentline_worker.samplers import MAX_ORDER

from .checkpoint import Checkpoint
from .clock import StepClock
from .network import ADAPTER, Network
from .noise import Noise, draws_undone_on_error
from .request import LaneKey, Request
from .rows import MAX_BRANCHES, zeros

GROWTH = 8  # slots added at a time where there is plenty of memory
OUTPUTS = MAX_ORDER  # place in the history of the newest network output
NOISE = 2 * MAX_ORDER  # place in the history of this step's noise
HISTORY = 2 * MAX_ORDER + 1


@dataclass
class _Step:
    """What one step reads, gathered on the device. Nothing in it is shared with the lane."""

    slots: torch.Tensor  # (images,)
    guided: torch.Tensor  # (guided images,) places among the images
    noisy: torch.Tensor  # (noisy images,) places among the images whose sampler draws noise in this step
    noises: list[Noise]  # their generators
    history: torch.Tensor  # (images, HISTORY, c * h * w)
    used: npt.NDArray[np.intp]  # places in the history that any image's coefficients use
    coefficients: torch.Tensor  # (images, HISTORY)
    guidance: torch.Tensor  # (guided images, 1, 1, 1)
    x: torch.Tensor  # (rows, c, h, w) network input: the images, then the guided ones again for their unconditional branch
    timesteps: torch.Tensor  # (rows,)
    rows: Row  # what else the network is given: (rows, ...) by name


class Lane:
    """Slots for the images of one latent shape, and the step over any subset of them.

    ``history`` is (slots, 2 * MAX_ORDER + 1, c * h * w) float32: past latents newest first, past network outputs newest
    first, and this step's noise. Its sum, weighted with each job's coefficients, is the sampler update of all jobs at
    once, whatever their samplers. It is float32 also when the network runs in half precision. What the network is given
    beside the latents lies in one table per name, (slots, guidance branches, ...).

    All that a step reads is on the device already, except one small table of numbers, the places of its rows, and fresh
    noise. These are sent from pinned memory, so that the host does not wait for what it has queued before. For the same
    reason no tensor is indexed with a list or a mask.
    """

    def __init__(self, family: Family, key: LaneKey, network: Network, clock: StepClock) -> None:
        self.family = family
        self.shape = key.latent_shape
        self._network = network
        self._clock = clock
        self._free: list[int] = []
        self._noises: dict[int, Noise] = {}  # by slot
        self._slots: dict[Request, torch.Tensor] = {}  # (images,) each request's slots, on the device
        self._history = torch.zeros(0, HISTORY, key.num_latents, device=family.device)
        self._signature = key.signature
        self._rows = self._empty_rows(0)  # name -> (slots, MAX_BRANCHES, ...)
        self._adapters = torch.zeros(0, dtype=torch.int64, device=family.device)  # (slots,) of the model's bank

    @property
    def num_used(self) -> int:
        """Slots that hold an image."""
        return self.num_slots - len(self._free)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_slots(self) -> int:
        return len(self._history)

    @property
    def num_bytes(self) -> int:
        """Of all slots."""
        return sum(tensor.nbytes for tensor in (self._history, self._adapters, *self._rows.values()))

    def join(self, request: Request, rows: Sequence[Row]) -> None:
        """Give every image of the request a slot with its first latents, drawn as diffusers draws them.

        Args:
            request: its ``slots`` are written; there is a free one for each of its images (:meth:`grow`).
            rows: one per guidance branch.
        """
        work = request.work
        for i, seed in enumerate(work.seeds):
            slot = self._free.pop()
            request.slots.append(slot)
            noise = self._noises[slot] = Noise(seed, self.shape, self.family.dtype)
            first = self.family.start(work.request, i, noise.generator).float().flatten()
            self._history[slot].zero_()  # zero coefficients do not cancel what an earlier job left: 0 * NaN is NaN
            self._history[slot, 0] = to_device(first, self.family.device) * work.table.init[1]
            self._adapters[slot] = request.adapter_slot or 0
            for branch, row in enumerate(rows):
                for name, tensor in row.items():
                    self._rows[name][slot, branch] = tensor
        self._slots[request] = to_device(torch.tensor(request.slots), self.family.device)
        if work.resume is not None:
            self._restore(request, work.resume)

    def leave(self, request: Request) -> None:
        """Free the request's slots."""
        for slot in request.slots:
            self._noises.pop(slot, None)
        self._slots.pop(request, None)  # a request that failed to join has none
        self._free.extend(request.slots)
        request.slots = []

    def latents(self, request: Request) -> torch.Tensor:
        """(images, c, h, w) current latents, copied."""
        return self._history[self._slots[request], 0].view(-1, *self.shape).clone()

    def snapshot(self, request: Request) -> torch.Tensor:
        """(images, 2 * order, c * h * w) copy of the history that the sampler needs, on the device: a checkpoint's content."""
        order = request.work.table.order
        history = self._history[self._slots[request]]
        return torch.cat([history[:, :order], history[:, OUTPUTS : OUTPUTS + order]], 1)

    def _restore(self, request: Request, checkpoint: Checkpoint) -> None:
        table = request.work.table
        history = to_device(torch.from_numpy(checkpoint.history), self.family.device)
        for slot, past in zip(request.slots, history, strict=True):
            self._history[slot, : table.order] = past[: table.order]
            self._history[slot, OUTPUTS : OUTPUTS + table.order] = past[table.order :]
            self._noises[slot].skip(int(table.draws[: checkpoint.step].sum()))
        request.step = checkpoint.step

    def denoised(self, request: Request) -> torch.Tensor:
        """(images, c, h, w) clean latents that the last network call predicted. Only after a first step."""
        table, n = request.work.table, request.step - 1
        scale, (from_x, from_m) = float(table.input_scale[n]), table.denoised[n]
        history = self._history[self._slots[request]]
        x0 = float(from_x) * scale * history[:, 1] + float(from_m) * history[:, OUTPUTS]
        return x0.view(-1, *self.shape)

    @torch.inference_mode()
    def step(self, requests: Sequence[Request], most_rows: int) -> int:
        """Advance every request by one network call.

        A step that raises has changed nothing, the noise generators included: trying it again gives the same picture.

        Returns:
            The most rows that went through the network in one call: ``most_rows`` or fewer.
        """
        self._clock.mark()
        step = self._gather(requests)
        self._clock.mark()
        m, rows = self._network(step.x, step.timesteps, step.rows, most_rows)
        self._clock.mark()
        m = self._guide(step, m)
        with draws_undone_on_error(step.noises):
            self._advance(step, m)
            self._clock.mark()  # before the commit: on CUDA it makes an event, for which there may be no memory
            self._commit(step)
        self._clock.end_step()
        return rows

    def _gather(self, requests: Sequence[Request]) -> _Step:
        """Read the rows and their numbers. The only other transfer to the device is that of the noise."""
        images = [(r, slot) for r in requests for slot in r.slots]
        count = len(images)
        guided = [i for i, (r, _) in enumerate(images) if r.work.guided]
        noisy = [i for i, (r, _) in enumerate(images) if r.work.table.draws[r.step]]
        # Per image: [input scale, timestep, guidance, coefficients].
        numbers = np.empty((count, 3 + HISTORY), dtype=np.float32)
        for i, (r, _) in enumerate(images):
            table = r.work.table
            numbers[i, :3] = table.input_scale[r.step], table.timesteps[r.step], r.work.request.guidance_scale
            numbers[i, 3:] = table.coefficients[r.step]
        sent = to_device(torch.from_numpy(numbers), self.family.device)
        places = to_device(torch.tensor([slot for _, slot in images] + guided + noisy), self.family.device)
        slots, guided_at, noisy_at = places.split([count, len(guided), len(noisy)])
        scale, timesteps, guidance = sent[:, 0], sent[:, 1], sent[guided_at, 2].view(-1, 1, 1, 1)
        history = self._history[slots]
        x = (history[:, 0] * scale[:, None]).view(-1, *self.shape)
        rows = {name: torch.cat([table[slots, 0], table[slots[guided_at], 1]]) for name, table in self._rows.items()}
        if any(r.adapter_slot for r in requests):  # else the forward is the one without adapters
            adapters = self._adapters[slots]
            rows[ADAPTER] = torch.cat([adapters, adapters[guided_at]])
        return _Step(
            slots=slots,
            guided=guided_at,
            noisy=noisy_at,
            noises=[self._noises[images[i][1]] for i in noisy],
            history=history,
            used=np.flatnonzero(numbers[:, 3:].any(0)),
            coefficients=sent[:, 3:],
            guidance=guidance,
            x=torch.cat([x, x[guided_at]]),
            timesteps=torch.cat([timesteps, timesteps[guided_at]]),
            rows=rows,
        )

    def _guide(self, step: _Step, m: torch.Tensor) -> torch.Tensor:
        """(rows, c, h, w) network outputs -> (images, c, h, w), each image's branches combined."""
        count = len(step.slots)
        m, m_uncond = m[:count], m[count:]
        if len(step.guided):
            m[step.guided] = self.family.guide(m[step.guided], m_uncond, step.guidance)
        return m

    def _advance(self, step: _Step, m: torch.Tensor) -> None:
        """Shift this step's copy of the history and put in the output, the noise and the new latents."""
        history = step.history
        history[:, OUTPUTS + 1 : NOISE] = history[:, OUTPUTS : NOISE - 1].clone()
        history[:, OUTPUTS] = m.flatten(1)
        if step.noises:
            history[step.noisy, NOISE] = to_device(torch.stack([noise.draw() for noise in step.noises]), self.family.device)
        # Term by term over those that any sampler uses: a batched matrix product may sum in another order for
        # another batch size, and then a picture would depend on the jobs beside it.
        x_next = torch.zeros_like(history[:, 0])
        for j in step.used:
            x_next.addcmul_(step.coefficients[:, j, None], history[:, j])
        history[:, 1:MAX_ORDER] = history[:, : MAX_ORDER - 1].clone()
        history[:, 0] = x_next

    def _commit(self, step: _Step) -> None:
        """Write the new history into the lane: the one write of a step, so it happens as a whole or not at all."""
        self._history[step.slots] = step.history

    def _empty_rows(self, count: int) -> dict[str, torch.Tensor]:
        return zeros(self._signature, (count, MAX_BRANCHES), self.family.device)

    def grow(self, count: int) -> None:
        """Add slots."""
        start = len(self._history)
        # All are made before any is kept: memory may run out in each of them.
        history = torch.cat([self._history, self._history.new_zeros(count, *self._history.shape[1:])])
        rows = {name: torch.cat([self._rows[name], more]) for name, more in self._empty_rows(count).items()}
        adapters = torch.cat([self._adapters, self._adapters.new_zeros(count)])
        self._history, self._rows, self._adapters = history, rows, adapters
        self._free.extend(range(start, start + count))
