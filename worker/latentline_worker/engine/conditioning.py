"""Prompt -> text states, cached: the same few negative prompts and popular prompts come again and again."""

from __future__ import annotations

import threading
from collections import OrderedDict

import torch

from latentline_worker.models.base import Family

CACHE_ENTRIES = 512  # 32 x 384 fp32 states weigh 48 KiB each, SD 1.5's 77 x 768 in fp16 116 KiB


class Conditioner:
    """Encodes texts on the caller's thread, one caller at a time, off the denoise thread."""

    def __init__(self, family: Family) -> None:
        self._family = family
        self._cache: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._lock = threading.Lock()

    @torch.no_grad()
    def encode(self, text: str) -> torch.Tensor:
        """(tokens, width) states of one text, on the device."""
        with self._lock:
            states = self._cache.pop(text, None)
            if states is None:
                states = self._family.encode([text])[0]
            self._cache[text] = states  # newest last
            if len(self._cache) > CACHE_ENTRIES:
                self._cache.popitem(last=False)
            return states
