"""The benchmark of latents against pixels, at a tiny budget: one command, resumable, a page with its pictures."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training import TINY_AUTOENCODER, TINY_DENOISER, write_data

from latentline_worker.training import denoiser
from latentline_worker.training.autoencoder import make_model

ROOT = Path(__file__).parents[2]
# Nearly nothing of the real one but its shape: three more levels above a tiny core.
CORE = dict(TINY_DENOISER, sample_size=32)


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    module: Any = importlib.import_module("benchmarks.latent_vs_pixel")
    for name in ("NUM_MEASURED", "NUM_SHOWN"):
        monkeypatch.setattr(denoiser, name, 2)
    monkeypatch.setattr(module, "PIXEL_LEVELS", {"channels": [8] * 2, "down": ["DownBlock2D"] * 2, "up": ["UpBlock2D"] * 2})
    monkeypatch.setattr(module, "COMPOSITIONS", 1)
    monkeypatch.setattr(module, "TIMED_STEPS", 1)
    monkeypatch.setattr(module, "BATCH", 2)
    sides = [module.Side(side.name, side.space, side.prediction, (4, 20) if side.space == "latents" else (20,)) for side in module.SIDES]
    monkeypatch.setattr(module, "SIDES", tuple(sides))
    recipe = module.find_recipe("emoji-denoiser", module.DenoiserRecipe)
    recipe.model.clear()
    recipe.model.update(CORE)
    monkeypatch.setattr(module, "find_recipe", lambda name, kind: recipe)
    return module


@pytest.mark.slow
def test_one_command_trains_measures_and_writes_the_page(benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_data(tmp_path / "data")
    make_model(TINY_AUTOENCODER, 0).save_pretrained(tmp_path / "vae")
    page = tmp_path / "docs" / "latent-vs-pixel.md"
    command = ["--data", data, "--autoencoder", tmp_path / "vae", "--out", tmp_path / "run", "--page", page]
    monkeypatch.setattr(sys, "argv", ["latent_vs_pixel", *map(str, command), "--minutes", "0", "--prompts", "4"])
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    benchmark.main()
    text, figures = page.read_text(), json.loads((tmp_path / "run" / "figures.json").read_text())
    for link in re.findall(r"\]\((\S+)\)", text):
        assert link == "training.md" or (page.parent / link).stat().st_size > 0
    assert len(re.findall(r"!\[", text)) == 4 and "0 CPU-minutes of training a side" in text
    latent, other, pixel = figures["sides"]
    assert (latent["values"], pixel["values"]) == (4 * 32 * 32, 3 * 128 * 128)
    assert [side["prediction"] for side in figures["sides"]] == ["flow", "v_prediction", "flow"]
    assert pixel["forward_gflop"] > latent["forward_gflop"] > 0 and pixel["activations_mib"] > latent["activations_mib"] > 0
    assert latent["parameters"] == other["parameters"] and set(latent["quality"]) == {"4", "20"}
    assert latent["quality"]["4"]["R@5"]["num"] == 4 and latent["steps"] == 2
    # Given again, nothing is trained or drawn anew.
    drawn = (tmp_path / "run" / "pixels-rectified-flow" / "drawn-20.npy").stat().st_mtime_ns
    benchmark.main()
    assert (tmp_path / "run" / "pixels-rectified-flow" / "drawn-20.npy").stat().st_mtime_ns == drawn
    again = json.loads((tmp_path / "run" / "figures.json").read_text())
    assert [side["quality"] for side in again["sides"]] == [side["quality"] for side in figures["sides"]]
    assert [side["cpu_minutes"] for side in again["sides"]] == [side["cpu_minutes"] for side in figures["sides"]]


def test_the_pixel_network_has_the_core_of_the_latent_one(benchmark: Any) -> None:
    model = benchmark.pixel_model(CORE, 128)
    network: Any = make_model(model, 0)
    assert network.config.block_out_channels == [8, 8, *CORE["block_out_channels"]]
    with torch.no_grad():
        assert network(torch.zeros(1, 3, 128, 128), torch.zeros(1), torch.zeros(1, 32, 384)).sample.shape == (1, 3, 128, 128)
