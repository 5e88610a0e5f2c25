"""A job's state between two steps as bytes, so that another worker can resume it.

The state is the sampler's history: a few past latents and network outputs. The noise generators need no bytes: they are
seeded again and advanced by as many draws as the job has made.
"""

from __future__ import annotations

import json
import math
import threading
import time
import zlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

FORMAT = 3  # an older one is not read: its identity says too little, and the job starts anew
SHARE = 0.01  # Upper bound on checkpoint cost, as a share of run time.
MAX_BYTES = 32 << 20  # of one checkpoint; eight 2048 px images with four past latents stay below


class Resumable(Protocol):
    """Work that a checkpoint may belong to (``request.Work``)."""

    @property
    def identity(self) -> str:
        """A digest that must be equal for a history to mean the same."""
        ...


@dataclass(frozen=True)
class Checkpoint:
    """Complete in host memory: any thread may read it, and none waits for the device.

    ``history`` is (images, 2 * order, c * h * w) float32: past latents newest first, past network outputs newest first.
    """

    step: int  # network calls done
    history: npt.NDArray[np.float32]

    def to_bytes(self, work: Resumable) -> bytes | None:
        """Compressed, with the identity of the work; None when it would be larger than ``MAX_BYTES``."""
        values = self.history
        if values.nbytes > MAX_BYTES:
            return None
        head = json.dumps({"format": FORMAT, "step": self.step, "shape": values.shape, "of": work.identity}).encode()
        return len(head).to_bytes(4, "big") + head + _compress(values)

    @classmethod
    def from_bytes(cls, data: bytes | None, work: Resumable) -> Checkpoint | None:
        """The checkpoint, or None: no data, damaged data, another format or other work. The job then starts at step 0."""
        if not data:
            return None
        try:
            length = int.from_bytes(data[:4], "big")
            head = json.loads(data[4 : 4 + length])
            if head["format"] != FORMAT or head["of"] != work.identity:
                return None
            values = _decompress(data[4 + length :], math.prod(head["shape"])).reshape(head["shape"])
            return cls(int(head["step"]), values)
        except (ValueError, KeyError, TypeError, zlib.error):
            return None


class CheckpointSchedule:
    """When the next checkpoint of a job is due: every ``every_s`` seconds, or less often if all jobs' checkpoints would cost
    more than ``SHARE`` of the time. Costs may be recorded by any thread.
    """

    def __init__(self, every_s: float) -> None:
        self.every_s = every_s
        self.taken_s = self.written_s = 0.0  # moving averages: what taking and writing one checkpoint costs
        self.total_s = 0.0  # cost of all checkpoints so far
        self.num_taken = 0
        self._lock = threading.Lock()

    def due(self, last: float, num_jobs: int) -> bool:
        """Whether a job needs another checkpoint.

        Args:
            last: ``time.monotonic()`` of the job's last one.
            num_jobs: jobs in flight, each of which has checkpoints.
        """
        return time.monotonic() - last >= max(self.every_s, num_jobs * (self.taken_s + self.written_s) / SHARE)

    def record_taken(self, seconds: float) -> None:
        """Copying one job's state took the engine's thread this long."""
        with self._lock:
            self.num_taken += 1
            self.taken_s += 0.2 * (seconds - self.taken_s)
            self.total_s += seconds

    def record_written(self, seconds: float) -> None:
        """Compressing and sending one took this much of a core's time."""
        with self._lock:
            self.written_s += 0.2 * (seconds - self.written_s)
            self.total_s += seconds


def _compress(values: npt.NDArray[np.float32]) -> bytes:
    """Compress the byte with sign and exponent of each float32, and keep the other three as they are.

    Latents are noise: their mantissas do not get smaller, and trying costs ten times as much as this does.
    """
    planes = np.ascontiguousarray(values, dtype="<f4").reshape(-1).view(np.uint8).reshape(-1, 4).T
    coder = zlib.compressobj(1, strategy=zlib.Z_HUFFMAN_ONLY)
    return planes[:3].tobytes() + coder.compress(planes[3].tobytes()) + coder.flush()


def _decompress(data: bytes, count: int) -> npt.NDArray[np.float32]:
    planes = np.frombuffer(data[: 3 * count] + zlib.decompress(data[3 * count :]), dtype=np.uint8).reshape(4, count)
    return np.ascontiguousarray(planes.T).view("<f4").reshape(count)
