"""Latents and caption states, made once and kept on disk: a denoiser's training then pays for the denoiser alone.

Shard n holds picture n of every item of the data: its latents and the states of its captions. Shards are made when
the schedule first asks for them, so that training begins after a few and not after all of them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .autoencoder import CPU, encode
from .errors import TrainingError
from .processes import wait_for_all
from .seeds import python_random
from .sheets import to_tensor
from .sources import Source
from .text import encode_texts, load_minilm

CHUNK = 64  # pictures and captions that are encoded at a time


class LatentCache:
    """Latents (scaled) and caption states of a source under one autoencoder.

    Args:
        folder: shards are kept in a subfolder whose name depends on ``key`` and on the autoencoder's weights.
        key: names data, size and whatever else decides what is in a shard.
        rank: of several processes, number 0 makes the shards.
    """

    def __init__(
        self,
        folder: Path,
        source: Source,
        autoencoder: Any,
        key: str,
        say: Callable[[str], None],
        device: torch.device = CPU,
        rank: int = 0,
    ) -> None:
        self.source, self.say, self.device, self.rank = source, say, device, rank
        self.folder = folder / f"latents-{fingerprint(autoencoder, key)}"
        self.autoencoder = autoencoder.eval().to(device)
        self.scale: float = autoencoder.config.scaling_factor
        self.shards: list[tuple[torch.Tensor, np.ndarray[Any, Any]]] = []
        self.tokenizer, encoder = load_minilm()
        self.encoder = encoder.to(device)
        self.empty = encode_texts(self.tokenizer, self.encoder, [""])[0]

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """(n, 3, size, size) in -1..1 -> scaled latents (n, channels, size / f, size / f)."""
        return torch.cat([encode(self.autoencoder, part.to(self.device)).cpu() for part in pixels.split(CHUNK)]) * self.scale

    @torch.no_grad()
    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """The way back, on the CPU."""
        return torch.cat([self.autoencoder.decode(part.to(self.device) / self.scale).sample.cpu() for part in z.split(CHUNK)])

    def states(self, captions: list[str]) -> torch.Tensor:
        """(n, tokens, width) text states."""
        parts = [captions[i : i + CHUNK] for i in range(0, len(captions), CHUNK)]
        return torch.cat([encode_texts(self.tokenizer, self.encoder, part) for part in parts])

    def batch(self, seed: int, step: int, rank: int, count: int, num_shards: int, dropout: float) -> tuple[torch.Tensor, torch.Tensor]:
        """(count, channels, h, w) latents and (count, tokens, width) states from the first ``num_shards`` shards."""
        while len(self.shards) < num_shards:
            self.shards.append(self._shard(len(self.shards)))
        rng = python_random(seed, step, rank, "latents")
        latents, states = [], []
        for _ in range(count):
            z, texts = self.shards[rng.randrange(num_shards)]
            index = rng.randrange(self.source.num_items)
            dropped = rng.random() < dropout
            latents.append(z[index].float())
            states.append(self.empty if dropped else torch.from_numpy(texts[index].astype(np.float32)))
        return torch.stack(latents), torch.stack(states)

    def _shard(self, number: int) -> tuple[torch.Tensor, np.ndarray[Any, Any]]:
        """Latents in fp16, in memory, and states in fp16, mapped from the file: they are the larger part by far."""
        latents_file, states_file = (self.folder / f"{number:03}-{what}.npy" for what in ("latents", "states"))
        if self.rank == 0 and not (latents_file.exists() and states_file.exists()):
            self.say(f"encoding picture {number} of each of {self.source.num_items} items")
            self._make(number, latents_file, states_file)
        wait_for_all()  # the other processes read what rank 0 wrote
        return torch.from_numpy(np.load(latents_file)), np.load(states_file, mmap_mode="r")

    def _make(self, number: int, latents_file: Path, states_file: Path) -> None:
        latents, states = [], []
        for first in range(0, self.source.num_items, CHUNK):
            items = [self.source.item(i, number) for i in range(first, min(first + CHUNK, self.source.num_items))]
            latents.append(self.encode(to_tensor([image for image, _ in items])).half().numpy())
            states.append(self.states([caption for _, caption in items]).half().numpy())
        _write(latents_file, np.concatenate(latents))
        _write(states_file, np.concatenate(states))


def _write(path: Path, array: np.ndarray[Any, Any]) -> None:
    """Atomic: a shard that is there is whole.

    Raises:
        TrainingError: the disk is full, or the folder cannot be written.
    """
    scratch = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with scratch.open("wb") as file:
            np.save(file, array)
        os.replace(scratch, path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise TrainingError(f"{path}: latents cannot be saved: {error}") from error


def fingerprint(model: torch.nn.Module, key: str = "") -> str:
    """Twelve digits that change with a weight or with the key."""
    digest = hashlib.sha256(key.encode())
    for name, weight in model.state_dict().items():
        digest.update(name.encode() + weight.float().numpy().tobytes())
    return digest.hexdigest()[:12]
