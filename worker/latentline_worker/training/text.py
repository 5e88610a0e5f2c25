"""Caption states from the frozen text encoder."""

from __future__ import annotations

from typing import Any

import torch

from latentline_worker.models.bundled_model import MAX_TOKENS, load_minilm

__all__ = ["encode_texts", "load_minilm"]


@torch.no_grad()
def encode_texts(tokenizer: Any, encoder: torch.nn.Module, texts: list[str]) -> torch.Tensor:
    """(n, 32, 384) token states on the CPU, encoded exactly as ``StableDiffusionPipeline.encode_prompt`` does."""
    tokens = tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    device = next(encoder.parameters()).device
    states: torch.Tensor = encoder(tokens.input_ids.to(device), attention_mask=tokens.attention_mask.to(device))[0]
    return states.cpu()
