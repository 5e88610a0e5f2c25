"""Text -> rows, cached: the same few negative prompts and popular prompts come again and again."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch

from latentline_worker.models.base import Encoded, Family, Text

from .failures import run_in_parts

CACHE_ENTRIES = 512  # 32 x 384 fp32 embeds take 48 KiB each, SD 1.5's 77 x 768 in fp16 116 KiB
MICRO_BATCH = 8  # texts of one call: a denoise step waits for one such call at most
LEAST_ENTRIES = MICRO_BATCH + 2  # of the cache, however large they are: those of the first job that waits, and a whole call's

ModelText = tuple[str, Text]  # the id of the model that encodes it, and the text


class Conditioner:
    """Encodes texts in micro-batches and caches the newest. Used by the thread that owns the device.

    Args:
        micro_batch: texts of one call; 1 in the reproducible mode, where no result may depend on the texts beside it.
        cache_bytes: what the cached texts may take; the newest few stay in any case, for the jobs that wait for them.
    """

    def __init__(self, micro_batch: int = MICRO_BATCH, cache_bytes: int = sys.maxsize) -> None:
        self._micro_batch, self._cache_bytes = micro_batch, cache_bytes
        self._cache: OrderedDict[ModelText, Encoded] = OrderedDict()
        self.num_bytes = 0  # of the cached texts
        self.num_encoded = 0  # texts so far, cached or not

    def get(self, family: Family, text: Text) -> Encoded | None:
        """The cached result, or None."""
        key = family.info.id, text
        if key in self._cache:
            self._cache.move_to_end(key)
        return self._cache.get(key)

    def forget(self, model: str) -> None:
        """Drop the texts of a model."""
        for key in [key for key in self._cache if key[0] == model]:
            self.num_bytes -= _num_bytes(self._cache.pop(key))

    def encode_some(self, wanted: Iterable[tuple[Family, Text]]) -> dict[ModelText, Exception]:
        """Encode one micro-batch of the texts that are not cached: those of the first one's model.

        Returns:
            The texts that cannot be encoded, with their errors. Nothing is remembered of them.
        """
        unknown = [(family, text) for family, text in wanted if (family.info.id, text) not in self._cache]
        failures: dict[ModelText, Exception] = {}
        if unknown:
            first = unknown[0][0]
            texts = list(dict.fromkeys(text for family, text in unknown if family is first))[: self._micro_batch]
            run_in_parts(
                texts,
                lambda part: self._encode(first, part),
                lambda text, error: failures.__setitem__((first.info.id, text), error),
                device=first.device,
            )
        while len(self._cache) > (CACHE_ENTRIES if self.num_bytes <= self._cache_bytes else LEAST_ENTRIES):
            _, dropped = self._cache.popitem(last=False)
            self.num_bytes -= _num_bytes(dropped)
        return failures

    @torch.inference_mode()
    def _encode(self, family: Family, texts: Sequence[Text]) -> None:
        with family.adapters.on_texts([text.adapters for text in texts]) if family.adapters else nullcontext():
            results = family.encode(texts)
        for text, encoded in zip(texts, results, strict=True):
            # Copied, because each may be a view of the whole micro-batch's result, which it would keep in memory.
            row = {name: tensor.clone() for name, tensor in encoded.row.items()}
            kept = self._cache[family.info.id, text] = replace(encoded, row=row)
            self.num_bytes += _num_bytes(kept)
            self.num_encoded += 1


def _num_bytes(encoded: Encoded) -> int:
    return sum(tensor.nbytes for tensor in encoded.row.values())
