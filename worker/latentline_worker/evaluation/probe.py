"""The probe: which thing a cut-out object looks like, by ridge regression on its edges.

It sees no colour, so a thing in any colour is that thing. It was fitted once, on pictures of the data set's own
painter and on the autoencoder's reconstructions of them, before any picture of a denoiser was measured with it; its
weights lie beside this file, and their SHA-256 stands here. Another probe is refused: figures of two probes cannot be
compared.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .errors import EvaluationError
from .hog import hog

SIDE_PX = 64  # of the cut-out objects
PATH = Path(__file__).parent / "probe.safetensors"
SHA256 = "62c916f9e0e7d59d123fd23eb86ab0e1c81e8ce6e371f3ffad96bc70fb82b482"


@dataclass(frozen=True)
class Probe:
    """A linear reading of edges.

    Args:
        nouns: all that it tells apart, sorted.
        weights: (features + 1, nouns); the last row is the offset.
    """

    nouns: list[str]
    weights: torch.Tensor

    def scores(self, objects: npt.NDArray[np.uint8]) -> torch.Tensor:
        """(n, side, side, 3) cut-out objects -> (n, nouns), the highest for what each looks like."""
        return features(objects) @ self.weights

    def index(self, noun: str) -> int:
        """Column of a noun.

        Raises:
            EvaluationError: it does not know the noun.
        """
        try:
            return self.nouns.index(noun)
        except ValueError:
            raise EvaluationError(f"the probe does not know {noun!r}: it reads the things of the emoji data set") from None


def features(objects: npt.NDArray[np.uint8]) -> torch.Tensor:
    """(n, side, side, 3) -> (n, features + 1), the last one constant."""
    grey = torch.from_numpy(objects.astype(np.float32)).mean(dim=3) / 255
    return torch.cat([hog(grey), torch.ones(len(objects), 1)], dim=1)


def fit(x: torch.Tensor, labels: list[str], penalty: float) -> Probe:
    """Ridge regression in closed form, from features to one column of 0 and 1 for each noun.

    Args:
        x: (n, features + 1), as ``features`` gives them.
        labels: the nouns of the n objects.
    """
    nouns = sorted(set(labels))
    place = {noun: index for index, noun in enumerate(nouns)}
    y = torch.zeros(len(labels), len(nouns))
    y[torch.arange(len(labels)), torch.tensor([place[label] for label in labels])] = 1
    ridge = penalty * torch.eye(x.shape[1])
    ridge[-1, -1] = 0  # the offset is free
    weights: torch.Tensor = torch.linalg.solve(x.T @ x + ridge, x.T @ y)
    return Probe(nouns, weights)


def save(probe: Probe, path: Path) -> str:
    """Write a probe in fp16; its SHA-256."""
    save_file({"weights": probe.weights.half().contiguous()}, path, metadata={"nouns": json.dumps(probe.nouns)})
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load(path: Path = PATH, sha256: str = SHA256) -> Probe:
    """The frozen probe.

    Raises:
        EvaluationError: the file is missing or is not the one that was frozen.
    """
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != sha256:
            raise EvaluationError(f"{path}: its SHA-256 is {found}, the frozen probe's is {sha256}: figures could not be compared")
        with safe_open(path, "pt") as file:
            return Probe(json.loads(file.metadata()["nouns"]), file.get_tensor("weights").float())
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise EvaluationError(f"{path}: the probe cannot be read: {error}") from error
