"""What `latentline train` writes runs in a worker: the same pictures as from a stock pipeline, with the defaults that suit it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from support.engines import make_engine, run, work
from support.training import TINY_AUTOENCODER, TINY_DENOISER

from latentline_worker.models import registry
from latentline_worker.models.base import Family
from latentline_worker.samplers import make_scheduler
from latentline_worker.training import distill, objectives
from latentline_worker.training.autoencoder import make_model
from latentline_worker.training.package import package

CPU = torch.device("cpu")


def packaged(folder: Path, distilled: bool) -> Path:
    """A package of random weights, as a training leaves them."""
    make_model(TINY_AUTOENCODER, 0).save_pretrained(folder / "autoencoder")
    make_model(TINY_DENOISER, 1).save_pretrained(folder / "run" / "denoiser")
    scheduler = distill.make_scheduler() if distilled else objectives.make_scheduler("flow")
    scheduler.save_pretrained(folder / "run" / "scheduler")
    package(folder / "autoencoder", folder / "run" / "denoiser", folder / "model")
    return folder / "model"


@pytest.mark.parametrize("distilled", [False, True])
def test_a_trained_model_in_a_batch_equals_the_stock_pipeline(tmp_path: Path, distilled: bool) -> None:
    model = packaged(tmp_path, distilled)
    family: Family = registry.load(str(model), CPU, torch.float32)
    info = family.info
    defaults = (info.default_scheduler, info.default_num_inference_steps, info.default_guidance_scale)
    assert defaults == (("euler", 4, 0.0) if distilled else ("dpmpp_2m", 20, 5.0))
    one = work(family, "a rocket", info.default_scheduler, 4, info.default_guidance_scale, (5,), decode=True)
    mate = work(family, "a cat", "dpmpp_2m", 7, 3.0, (6, 7))
    made, _ = run(make_engine(family), one, mate)
    stock = StableDiffusionPipeline.from_pretrained(model, dtype=torch.float32, safety_checker=None)
    stock.set_progress_bar_config(disable=True)
    if not distilled:  # a stock pipeline cannot use the Euler scheduler of flow matching; the package's own takes the same steps
        stock.scheduler = make_scheduler(one.request.scheduler, stock.scheduler.config)
    arguments = {
        "num_inference_steps": 4,
        "guidance_scale": one.request.guidance_scale,
        "negative_prompt": "blurry" if one.request.guidance_scale > 1 else None,
    }
    expected = stock("a rocket", generator=torch.Generator().manual_seed(5), output_type="np", **arguments).images
    assert np.abs(made.result(0).numpy().astype(int) - np.round(expected * 255)).max() <= 1  # one step of rounding to 8 bits
