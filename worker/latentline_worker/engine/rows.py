"""What rows must have in common to share a forward: the names, shapes and types of their tensors."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from latentline.errors import ModelError
from latentline_worker.models.base import Row

from .request import Signature

MAX_BRANCHES = 2  # guidance branches of an image: conditional and unconditional


def signature_of(row: Row) -> Signature:
    """(name, shape, type) of each tensor, by name."""
    return tuple((name, tuple(row[name].shape), str(row[name].dtype).removeprefix("torch.")) for name in sorted(row))


def common_signature(model: str, rows: Sequence[Row], num_branches: int) -> Signature:
    """The signature of every row of an image.

    Args:
        model: whose rows they are, for the message.
        rows: one per guidance branch.
        num_branches: as many as the request has texts.

    Raises:
        ModelError: the branches differ, or there are too few or too many of them. A defect of the family: no batch can hold such rows.
    """
    if not 1 <= len(rows) == num_branches <= MAX_BRANCHES:
        allowed = f"one for each, at most {MAX_BRANCHES}"
        raise ModelError(f"{model} gave {len(rows)} rows for {num_branches} guidance branches; allowed: {allowed}")
    first, *others = (signature_of(row) for row in rows)
    for other in others:
        if other != first:
            raise ModelError(f"{model} gave guidance branches of different rows: {_written(first)} and {_written(other)}")
    return first


def zeros(signature: Signature, leading: tuple[int, ...], device: torch.device) -> dict[str, torch.Tensor]:
    """A tensor of zeros per name, with ``leading`` dimensions before its own."""
    return {name: torch.zeros((*leading, *shape), dtype=getattr(torch, dtype), device=device) for name, shape, dtype in signature}


@functools.lru_cache(maxsize=256)
def num_bytes(signature: Signature) -> int:
    """Bytes of one row."""
    return sum(tensor.nbytes for tensor in zeros(signature, (), torch.device("meta")).values())


def _written(signature: Signature) -> str:
    return ", ".join(f"{name} {'x'.join(map(str, shape)) or 'scalar'} {dtype}" for name, shape, dtype in signature) or "nothing"
