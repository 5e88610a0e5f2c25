"""Exchanges the models that an engine holds, between two of its steps."""

from __future__ import annotations

import torch

from latentline_worker.models.base import Family

from .engine import Engine
from .failures import release_memory
from .network import Network


def add(engine: Engine, family: Family) -> None:
    """Let the engine run jobs of a model, without a recorded forward. On the engine's thread, or before it is started."""
    model = family.info.id
    engine.families[model], engine.networks[model] = family, Network(family, engine.fixed_rows, record=False)
    if model in engine.memory.footprints:
        engine.memory.footprints[model].family = family


def remove(engine: Engine, model: str) -> None:
    """Let go of a model of which no request is unfinished: its weights, lanes and cached texts. As :func:`add`.

    What was measured of it stays, so that it needs no warm-up when it comes back.

    Raises:
        RuntimeError: a request of it is unfinished.
    """
    if engine.intake.has_of(model):
        raise RuntimeError(f"{model}: has unfinished requests")
    for key in [key for key in engine.lanes if key.model == model]:
        engine.lanes.drop(key)
    engine.conditioner.forget(model)
    if model in engine.memory.footprints:
        engine.memory.footprints[model].family = None
    device = engine.families[model].device
    del engine.families[model], engine.networks[model]
    if device.type == "cuda":
        torch.cuda.current_stream().synchronize()  # the memory may be given to another stream, which loads the next model
    release_memory(device)
