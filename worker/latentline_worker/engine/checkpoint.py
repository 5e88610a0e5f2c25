"""A job's state between two steps as bytes, so that another worker goes on from there.

What a job carries is its sampler's history: a few past latents and network outputs. The noise generators need no bytes:
they are seeded anew and draw as often as they had.
"""

from __future__ import annotations

import json
import math
import time
import zlib
from dataclasses import dataclass

import numpy as np
import torch

from .request import Work

FORMAT = 2
SHARE = 0.01  # of the time since the last one: what taking and writing a checkpoint may cost
MAX_BYTES = 32 << 20  # of one checkpoint; eight 2048 px images with four past latents stay below


@dataclass(frozen=True)
class Checkpoint:
    """``history`` is (images, 2 * memory, c * h * w) float32: past latents newest first, past outputs newest first."""

    step: int  # network calls done
    history: torch.Tensor

    def to_bytes(self, work: Work) -> bytes | None:
        """Compressed, with what it belongs to; None when it would be larger than ``MAX_BYTES``. Waits for the device."""
        if self.history.nbytes > MAX_BYTES:
            return None
        values = self.history.cpu().numpy()
        head = json.dumps({"format": FORMAT, "step": self.step, "shape": values.shape, "of": _identity(work)}).encode()
        return len(head).to_bytes(4, "big") + head + _compress(values)

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
            values = _decompress(data[4 + length :], math.prod(head["shape"])).reshape(head["shape"])
            return cls(int(head["step"]), torch.from_numpy(values))
        except (ValueError, KeyError, TypeError, zlib.error):
            return None


class Pace:
    """When a job's next checkpoint is due: every ``every_s`` seconds, and less often where all jobs' would cost over ``SHARE``."""

    def __init__(self, every_s: float) -> None:
        self.every_s = every_s
        self.taken_s = self.written_s = 0.0  # what taking and writing one costs, lately
        self.total_s = 0.0  # what all of them have cost
        self.num_taken = 0

    def due(self, last: float, num_jobs: int) -> bool:
        """Whether a job whose last checkpoint was at ``last`` (``time.monotonic()``) should have another.

        Args:
            num_jobs: jobs in flight, each of which has checkpoints.
        """
        return time.monotonic() - last >= max(self.every_s, num_jobs * (self.taken_s + self.written_s) / SHARE)

    def taken(self, seconds: float) -> None:
        """Copying one job's state took this long. Told by the engine's thread alone."""
        self.num_taken += 1
        self.taken_s += 0.2 * (seconds - self.taken_s)
        self.total_s += seconds

    def written(self, seconds: float) -> None:
        """Compressing and sending one took so much of a core's time. Told by the heartbeat's thread alone."""
        self.written_s += 0.2 * (seconds - self.written_s)
        self.total_s += seconds


def _compress(values: np.ndarray) -> bytes:
    """Of each float32 the byte with sign and exponent is compressed, the other three are kept as they are.

    Latents are noise: their mantissas do not get any smaller, and to try costs ten times what this does.
    """
    planes = np.ascontiguousarray(values, dtype="<f4").reshape(-1).view(np.uint8).reshape(-1, 4).T
    coder = zlib.compressobj(1, strategy=zlib.Z_HUFFMAN_ONLY)
    return planes[:3].tobytes() + coder.compress(planes[3].tobytes()) + coder.flush()


def _decompress(data: bytes, count: int) -> np.ndarray:
    planes = np.frombuffer(data[: 3 * count] + zlib.decompress(data[3 * count :]), dtype=np.uint8).reshape(4, count)
    return np.ascontiguousarray(planes.T).view("<f4").reshape(count)


def _identity(work: Work) -> list[object]:
    """What must be equal for a history to mean the same."""
    table = work.table
    return [work.model, list(work.latent_shape), table.num_steps, table.memory, list(work.seeds), work.guidance_scale]
