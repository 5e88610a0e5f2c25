"""Text -> states, cached: the same few negative prompts and popular prompts come again and again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from latentline_worker.models.base import Family

CACHE_ENTRIES = 512  # 32 x 384 fp32 states weigh 48 KiB each, SD 1.5's 77 x 768 in fp16 116 KiB
MICRO_BATCH = 8  # texts of one call: what a denoise step may have to wait for


@dataclass(frozen=True)
class Conditioning:
    """What the denoiser sees of a text."""

    states: torch.Tensor  # (tokens, width), on the device
    tokens: tuple[int, int]  # in the text; of these, read


class Conditioner:
    """Encodes texts in micro-batches and keeps the newest. Used by the thread that owns the device.

    Args:
        family: the loaded model; its encoder is the other half of the cache's key.
        micro_batch: texts of one call; 1 in the reproducible mode, where no result may depend on its neighbours.
    """

    def __init__(self, family: Family, micro_batch: int = MICRO_BATCH) -> None:
        self._family = family
        self._micro_batch = micro_batch
        self._cache: OrderedDict[str, Conditioning] = OrderedDict()

    def get(self, text: str) -> Conditioning | None:
        """A text that has been encoded lately."""
        if text in self._cache:
            self._cache.move_to_end(text)
        return self._cache.get(text)

    @torch.inference_mode()
    def encode_some(self, texts: Iterable[str]) -> None:
        """One micro-batch of those texts that are not known yet."""
        unknown = list(dict.fromkeys(text for text in texts if text not in self._cache))[: self._micro_batch]
        if not unknown:
            return
        for text, states in zip(unknown, self._family.encode(unknown), strict=True):
            self._cache[text] = Conditioning(states.clone(), self._family.count_tokens(text))
        while len(self._cache) > CACHE_ENTRIES:
            self._cache.popitem(last=False)
