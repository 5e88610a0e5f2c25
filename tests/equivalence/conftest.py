"""A tiny Stable Diffusion with random weights, and the same model as plain diffusers runs it."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline
from support.engines import make_engine
from support.tiny import tiny_pipeline

from latentline_worker.engine.memory import Memory
from latentline_worker.models.sd import StableDiffusion


@pytest.fixture(scope="session", params=["epsilon", "v_prediction"])
def pipeline(request: pytest.FixtureRequest) -> StableDiffusionPipeline:
    return tiny_pipeline(request.param)


@pytest.fixture
def family(pipeline: StableDiffusionPipeline) -> StableDiffusion:
    return StableDiffusion(
        "tiny",
        vae=pipeline.vae,
        unet=pipeline.unet,
        text_encoder=pipeline.text_encoder,
        tokenizer=pipeline.tokenizer,
        scheduler_config=dict(pipeline.scheduler.config),
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


@pytest.fixture
def measured(family: StableDiffusion) -> Memory:
    """What a warm-up without a limit finds."""
    engine = make_engine(family, max_rows=1)
    engine.warm_up()
    return engine.memory
