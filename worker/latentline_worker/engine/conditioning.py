"""Text -> prompt embeds, cached: the same few negative prompts and popular prompts come again and again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from latentline_worker.models.base import Family

from .failures import run_in_parts

CACHE_ENTRIES = 512  # 32 x 384 fp32 embeds take 48 KiB each, SD 1.5's 77 x 768 in fp16 116 KiB
MICRO_BATCH = 8  # texts of one call: a denoise step waits for one such call at most


@dataclass(frozen=True)
class Conditioning:
    """An encoded text."""

    prompt_embeds: torch.Tensor  # (tokens, width), on the device
    tokens: tuple[int, int]  # in the text, and how many of them the encoder reads


class Conditioner:
    """Encodes texts in micro-batches and caches the newest. Used by the thread that owns the device.

    Args:
        family: the loaded model.
        micro_batch: texts of one call; 1 in the reproducible mode, where no result may depend on the texts beside it.
    """

    def __init__(self, family: Family, micro_batch: int = MICRO_BATCH) -> None:
        self._family = family
        self._micro_batch = micro_batch
        self._cache: OrderedDict[str, Conditioning] = OrderedDict()

    def get(self, text: str) -> Conditioning | None:
        """The cached conditioning, or None."""
        if text in self._cache:
            self._cache.move_to_end(text)
        return self._cache.get(text)

    def encode_some(self, texts: Iterable[str]) -> dict[str, Exception]:
        """Encode one micro-batch of the texts that are not cached.

        Returns:
            The texts that cannot be encoded, with their errors. Nothing is remembered of them.
        """
        unknown = list(dict.fromkeys(text for text in texts if text not in self._cache))[: self._micro_batch]
        failures: dict[str, Exception] = {}
        run_in_parts(unknown, self._encode, failures.__setitem__, device=self._family.device)
        while len(self._cache) > CACHE_ENTRIES:
            self._cache.popitem(last=False)
        return failures

    @torch.inference_mode()
    def _encode(self, texts: Sequence[str]) -> None:
        for text, prompt_embeds in zip(texts, self._family.encode(texts), strict=True):
            self._cache[text] = Conditioning(prompt_embeds.clone(), self._family.count_tokens(text))
