"""Loading diffusers folders: a complete one gives the same model, the error of a broken one names the file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from support.engines import embeds

from latentline.errors import ModelError
from latentline_worker.models import registry
from latentline_worker.models.sd import StableDiffusion

CPU = torch.device("cpu")


@pytest.fixture
def folder(pipeline: StableDiffusionPipeline, tmp_path: Path) -> Path:
    path = tmp_path / "my-model"
    pipeline.save_pretrained(path, safe_serialization=True)
    return path


def test_a_folder_is_served_under_its_name_and_equals_the_pipeline(folder: Path, family: StableDiffusion) -> None:
    loaded = registry.load(str(folder), CPU, torch.float32)
    assert loaded.info.id == "my-model"
    assert isinstance(loaded, StableDiffusion)
    assert loaded.scheduler_config["prediction_type"] == family.scheduler_config["prediction_type"]
    rows = {"prompt_embeds": embeds(loaded, "a cat")}
    assert torch.equal(rows["prompt_embeds"], embeds(family, "a cat"))
    assert loaded.revision == family.revision
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded.denoise(x, torch.tensor([500.0]), rows), family.denoise(x, torch.tensor([500.0]), rows))
        assert (loaded.decode(x, tiled=False) == family.decode(x, tiled=False)).all()


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_truncated_weights_are_named(folder: Path, part: str) -> None:
    (weights,) = (folder / part).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match=re.escape(str(weights))):
        registry.load(str(folder), CPU, torch.float32)


def test_weights_in_another_format_are_not_loaded(folder: Path) -> None:
    (weights,) = (folder / "unet").glob("*.safetensors")
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ModelError, match=r"unet: no \.safetensors file"):
        registry.load(str(folder), CPU, torch.float32)


@pytest.mark.parametrize("source", ["/no/such/folder", "a b c"])
def test_nothing_there(source: str) -> None:
    with pytest.raises(ModelError, match=r"no such model folder|neither"):
        registry.load(source, CPU, torch.float32)
