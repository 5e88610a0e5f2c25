"""The weights that are kept for the next bundled model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from PIL import Image, ImageDraw

from latentline_worker import training
from latentline_worker.models import checksums
from latentline_worker.training.autoencoder import encode, psnr_db
from latentline_worker.training.export import place_of
from latentline_worker.training.inputs import find_recipe
from latentline_worker.training.recipe import DenoiserRecipe
from latentline_worker.training.sheets import to_tensor

WEIGHTS = Path(training.__file__).parent / "weights"
FOLDER = WEIGHTS / "emoji-autoencoder"


@pytest.mark.parametrize(("background", "colour"), [("white", "red"), ("blue", "yellow"), ("black", "orange")])
def test_the_autoencoder_brings_a_drawn_picture_back(background: str, colour: str) -> None:
    checksums.check(FOLDER)
    model = AutoencoderTiny.from_pretrained(FOLDER).float().eval()
    image = Image.new("RGB", (128, 128), background)
    ImageDraw.Draw(image).ellipse((20, 20, 108, 108), colour)
    x = to_tensor([image])
    with torch.no_grad():
        z = encode(model, x)
        output = model.decode(z).sample
    assert z.shape == (1, 4, 16, 16) and 0.2 < (z * model.config.scaling_factor).std() < 3
    assert psnr_db(output, x).item() > 20
    assert place_of(FOLDER) > 0


def test_the_denoiser_is_the_recipes_and_knows_its_place() -> None:
    checksums.check(WEIGHTS / "emoji-denoiser")
    model = UNet2DConditionModel.from_pretrained(WEIGHTS / "emoji-denoiser")
    recipe = find_recipe("emoji-denoiser", DenoiserRecipe)
    assert {name: model.config[name] for name in recipe.model if name != "class"} == {
        name: value for name, value in recipe.model.items() if name != "class"
    }
    assert 0 < place_of(WEIGHTS / "emoji-denoiser") <= recipe.schedule.steps
    assert all(torch.isfinite(p).all() for p in model.parameters())
