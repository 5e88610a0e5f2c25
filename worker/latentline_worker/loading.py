"""A model onto its device, and the first run that nobody has to wait for."""

from __future__ import annotations

import logging

import torch

from latentline_worker.models import registry
from latentline_worker.models.base import Family

from .engine.conditioning import Conditioner
from .engine.decoder import Decoder
from .engine.engine import Engine
from .engine.request import Work
from .samplers import sampler_table
from .settings import WorkerSettings

log = logging.getLogger(__name__)


def load_model(settings: WorkerSettings) -> Family:
    """Load the configured model onto the one visible device.

    Raises:
        ModelError: missing or broken; the message names the file.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = settings.dtype if settings.dtype != "auto" else ("float16" if device.type == "cuda" else "float32")
    return registry.load(settings.model, device, getattr(torch, name))


def warm_up(family: Family, engine: Engine, conditioner: Conditioner, decoder: Decoder) -> None:
    """One short guided job through every part, so that allocators and kernels are ready before the first client."""
    info = family.info
    states = conditioner.encode("")
    work = Work(
        job_id="warm-up",
        latent_shape=family.latent_shape(info.default_width, info.default_height),
        table=sampler_table("ddim", family.scheduler_config, 2),
        guidance_scale=2.0,
        seeds=(0,),
        cond=states,
        uncond=states,
    )
    decoder.decode(engine.submit(work).future.result()[0]).result()
