"""A tiny data set in the built form, tiny recipes, and a source without pictures of its own."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from latentline_worker.training import splits
from latentline_worker.training.concepts import STYLES, make_concept
from latentline_worker.training.distill import DistillRecipe
from latentline_worker.training.lora import LoraRecipe
from latentline_worker.training.manifest import HELD_BACK_STYLE, load_catalogue, write_prompts
from latentline_worker.training.recipe import AutoencoderRecipe, DenoiserRecipe, Schedule

LABELS = (
    "red apple", "green apple", "rocket", "banana", "cup with straw", "grapes", "otter", "llama", "shield", "bus", "key", "bell", "drum",
)  # fmt: skip
TINY_AUTOENCODER = {
    "class": "AutoencoderTiny",
    "encoder_block_out_channels": [16, 16, 16],
    "decoder_block_out_channels": [16, 16, 16],
    "num_encoder_blocks": [0, 1, 1],
    "num_decoder_blocks": [1, 1, 0],
}
TINY_KL = {
    "class": "AutoencoderKL",
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [8, 8],
    "norm_num_groups": 4,
    "latent_channels": 4,
}
TINY_DENOISER = {
    "class": "UNet2DConditionModel",
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": 384,
    "attention_head_dim": 8,
    "norm_num_groups": 4,
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 6,
}


def schedule(**changes: Any) -> Schedule:
    """Eight steps of two pictures."""
    small = Schedule(steps=8, batch=2, learning_rate=1e-3, warmup_steps=2, log_every_steps=2, sample_every_steps=5)
    return dataclasses.replace(small, **changes)


def autoencoder_recipe(model: dict[str, Any] = TINY_AUTOENCODER, **changes: Any) -> AutoencoderRecipe:
    """32 px pictures, 16 px crops; Muon for the tiny one's matrices."""
    return AutoencoderRecipe(model, schedule(muon_learning_rate=0.01, **changes), size_px=32, crop_px=16)


def denoiser_recipe(prediction: str = "flow", **changes: Any) -> DenoiserRecipe:
    """Two cached pictures an item, the second from step 4 on."""
    made = schedule(ema_decay=0.9, **changes)
    return DenoiserRecipe(TINY_DENOISER, made, 32, prediction, compositions=2, first_compositions=1, next_composition_steps=4)


def lora_recipe(**changes: Any) -> LoraRecipe:
    """Rank 4 on every attention."""
    return LoraRecipe(schedule(**changes), rank=4, alpha=4, size_px=32, compositions=2, next_composition_steps=4)


def distill_recipe(**changes: Any) -> DistillRecipe:
    """Two windows of two teacher steps."""
    return DistillRecipe(schedule(ema_decay=0.9, **changes), 32, windows=2, solver_steps=2, guidance=2.0, compositions=2)


def toml(recipe: AutoencoderRecipe | DenoiserRecipe | LoraRecipe | DistillRecipe) -> str:
    """The recipe as a TOML file."""

    def lines(values: dict[str, Any]) -> str:
        return "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())

    values = dataclasses.asdict(recipe)
    tables = {name: values.pop(name) for name in ("model", "schedule") if name in values}
    return lines(values) + "".join(f"\n[{name}]\n{lines(table)}" for name, table in tables.items())


def write_data(folder: Path) -> Path:
    """A data set as the builder leaves it: drawn shapes for ``LABELS`` in every style."""
    rows = []
    for style in (*STYLES, HELD_BACK_STYLE):
        for number, label in enumerate(LABELS):
            concept = make_concept(f"{number:x}", label)
            path = folder / "sprites" / style / f"{concept.key}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = Image.new("RGBA", (160, 160), (0, 0, 0, 0))
            box = (10 + 3 * number, 10, 150, 150 - 2 * len(style))
            ImageDraw.Draw(image).ellipse(box, (200, 15 * number, 40, 255))
            image.save(path)
            split = "lora" if style == HELD_BACK_STYLE else splits.split_of_noun(concept.noun, [label])
            row = {"file": str(path.relative_to(folder)), "key": concept.key, "label": label, "style": style, "grey": 0.0, "split": split}
            rows.append(row | {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_prompts(folder, load_catalogue(folder))
    return folder
