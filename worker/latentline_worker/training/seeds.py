"""Random numbers as functions of (seed, step, rank), so that a resumed run draws what the uninterrupted one would.

No generator lives from one step to the next. Each use has a purpose of its own, so that a draw added to one place
shifts no other.
"""

from __future__ import annotations

import hashlib
import random

import torch


def _number(seed: int, step: int, rank: int, purpose: str) -> int:
    digest = hashlib.sha256(f"{purpose}/{seed}/{step}/{rank}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # torch takes seeds of 63 bits


def python_random(seed: int, step: int, rank: int, purpose: str) -> random.Random:
    """A fresh generator for choices among pictures and captions."""
    return random.Random(_number(seed, step, rank, purpose))


def torch_random(seed: int, step: int, rank: int, purpose: str) -> torch.Generator:
    """A fresh generator on the CPU: noise is drawn there whatever the device is, and is then the same everywhere."""
    return torch.Generator().manual_seed(_number(seed, step, rank, purpose))
