"""A job's state between two steps as bytes, so that another worker goes on from there.

What a job carries is its sampler's history: a few past latents and network outputs. The noise generators need no bytes:
they are seeded anew and draw as often as they had.
"""

from __future__ import annotations

import json
import threading
import time
import zlib
from dataclasses import dataclass

import numpy as np
import torch

from .request import Work

FORMAT = 1
SHARE = 0.01  # of the time since the last one: what taking and writing a checkpoint may cost
MAX_BYTES = 32 << 20  # of one checkpoint; eight 2048 px images with four past latents stay below


@dataclass(frozen=True)
class Checkpoint:
    """``history`` is (images, 2 * memory, c * h * w) float32: past latents newest first, past outputs newest first."""

    step: int  # network calls done
    history: torch.Tensor

    def to_bytes(self, work: Work) -> bytes | None:
        """Compressed, with what it belongs to; None when it would be larger than ``MAX_BYTES``. Waits for the device."""
        values = self.history.cpu().numpy()
        if values.nbytes > MAX_BYTES:
            return None
        head = json.dumps({"format": FORMAT, "step": self.step, "shape": values.shape, "of": _identity(work)}).encode()
        # Level 1: latents are noise to a compressor; only what is still zero goes away.
        return len(head).to_bytes(4, "big") + head + zlib.compress(values.tobytes(), 1)

    @classmethod
    def from_bytes(cls, data: bytes | None, work: Work) -> Checkpoint | None:
        """None when there is none, or when it is of other work or of another version: the job then starts at step 0."""
        if not data:
            return None
        try:
            length = int.from_bytes(data[:4], "big")
            head = json.loads(data[4 : 4 + length])
            if head["format"] != FORMAT or head["of"] != _identity(work):
                return None
            values = np.frombuffer(zlib.decompress(data[4 + length :]), dtype=np.float32).reshape(head["shape"])
            return cls(int(head["step"]), torch.from_numpy(values.copy()))
        except (ValueError, KeyError, TypeError, zlib.error):
            return None


class Pace:
    """When a job's next checkpoint is due: every ``every_s`` seconds, and less often where they cost more than ``SHARE``."""

    def __init__(self, every_s: float) -> None:
        self.every_s = every_s
        self._cost_s = 0.0  # of one checkpoint, lately
        self._lock = threading.Lock()

    def due(self, last: float) -> bool:
        """Whether a job whose last checkpoint was at ``last`` (``time.monotonic()``) should have another."""
        return time.monotonic() - last >= max(self.every_s, self._cost_s / SHARE)

    def spent(self, seconds: float) -> None:
        """Taking or writing one took this long."""
        with self._lock:
            self._cost_s += 0.2 * (seconds - self._cost_s)


def _identity(work: Work) -> list[object]:
    """What must be equal for a history to mean the same."""
    table = work.table
    return [work.model, list(work.latent_shape), table.num_steps, table.memory, list(work.seeds), work.guidance_scale]
