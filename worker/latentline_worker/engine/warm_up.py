"""What is measured before the first job: memory, and what steps of several sizes cost."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from latentline_worker.models.base import Family
from latentline_worker.samplers import sampler_table

from .conditioning import Conditioner
from .decoder import Decoder
from .memory import Memory
from .network import Network
from .request import LaneKey, Request, Work

if TYPE_CHECKING:
    from .engine import Engine

log = logging.getLogger(__name__)

# Up to here every doubling of the rows is measured, whatever the times say, so that a single outlier does not stop the search.
CALIBRATED_ROWS = 16


@torch.inference_mode()
def measure(family: Family, conditioner: Conditioner, network: Network, decoder: Decoder, memory: Memory) -> LaneKey:
    """Run each part once at the model's own size, and learn what memory it takes.

    Returns:
        The lane of the model's own size.

    Raises:
        OutOfMemory: not even one row of this size fits.
    """
    info = family.info
    for error in conditioner.encode_some([""]).values():
        raise error
    conditioning = conditioner.get("")
    assert conditioning is not None
    prompt_embeds = conditioning.prompt_embeds
    shape = family.latent_shape(info.default_width, info.default_height)
    key = LaneKey(info.id, shape, len(prompt_embeds))
    x, t = torch.zeros(1, *shape, device=family.device), torch.full((1,), 500.0, device=family.device)
    network(x, t, prompt_embeds[None])  # so that one-time allocations and kernel set-up are not measured
    # The bare forward: the network's own may be padded to more rows.
    memory.measure(key, lambda: family.denoise(x, t, prompt_embeds[None]), lambda: decoder.decode_now(x))
    memory.check(key, prompt_embeds.shape[-1])
    network.trace(torch.randn(2, *shape, device=family.device), t.expand(2), prompt_embeds.expand(2, -1, -1))
    return key


def calibrate(engine: Engine, key: LaneKey) -> None:
    """Find the lane's row budget with a few real steps of growing batches, so that no client waits for the search.

    Args:
        engine: idle and not started.
        key: of the lane.
    """
    table = sampler_table("ddim", engine.family.scheduler_config, 50)
    # Unguided images need one row each, so that every row count can be tried.
    crowd: list[Request] = []
    cost, rows, budget = engine.planner.cost, 1, 0
    while cost.budget(key) > budget or rows <= CALIBRATED_ROWS:
        cost.explore(key, min(rows, CALIBRATED_ROWS))
        budget, rows = cost.budget(key), 2 * rows
        while len(crowd) < budget:
            crowd.append(engine.submit(Work("warm-up", key.model, "", "", key.latent_shape, table, 1.0, (0,), decode=False)))
        for _ in range(4):
            engine.step()
    cost.explore(key, 1)
    for request in crowd:
        request.cancel("warm-up")
    engine.step()
    log.info("%d rows a step are enough for latents of %s", cost.budget(key), "x".join(map(str, key.latent_shape)))
