"""Texts of unlike lengths in one batch, for networks that mask padding: each is padded to one of a few lengths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .base import Encoded, Row
from .transfer import to_device

# Jobs share a batch where their texts are padded to equal lengths. Most texts fit into the first two. Padding all of them to the last would
# add a tenth to the tokens of a picture of 1024 px, which has 4096.
LENGTHS = (64, 128, 256, 512)


def padded(states: torch.Tensor, counts: Sequence[int]) -> list[Row]:
    """The rows of a micro-batch of texts: ``prompt_embeds`` (length, d), of which ``num_tokens`` () are the text, and zeros.

    Args:
        states: (texts, tokens, d), each text's before its padding.
        counts: tokens of each; known on the host, so that nothing waits for the device.
    """
    numbers = to_device(torch.tensor(counts), states.device)
    return [
        {"prompt_embeds": _to_length(one[:count], next(length for length in LENGTHS if length >= count)), "num_tokens": number}
        for one, count, number in zip(states, counts, numbers, strict=True)
    ]


def levelled(encoded: Sequence[Encoded]) -> list[Row]:
    """The rows of a job's guidance branches, padded to the longest of them."""
    length = max(len(one.row["prompt_embeds"]) for one in encoded)
    return [{**one.row, "prompt_embeds": _to_length(one.row["prompt_embeds"], length)} for one in encoded]


def _to_length(states: torch.Tensor, length: int) -> torch.Tensor:
    return F.pad(states, (0, 0, 0, length - len(states)))
