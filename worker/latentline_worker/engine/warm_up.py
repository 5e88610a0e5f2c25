"""What is measured before the first job: memory, and what steps of several sizes cost."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from latentline.errors import ConfigurationError, ModelError
from latentline.jobs import ModelInfo, ResolvedRequest
from latentline_worker.models.base import Family
from latentline_worker.samplers import CompileError

from .network import ADAPTER
from .request import LaneKey, Request, Work
from .rows import common_signature

if TYPE_CHECKING:
    from .engine import Engine

log = logging.getLogger(__name__)

# Up to here every doubling of the rows is measured, whatever the times say, so that a single outlier does not stop the search.
CALIBRATED_ROWS = 16
STEPS = 50  # of a job for calibration: more than are run


def warm_up(engine: Engine, family: Family) -> None:
    """Measure a model's memory and step costs at its own size, and run every part once.

    Args:
        engine: idle and not started.
        family: one of its models.

    Raises:
        ModelError: its scheduler configuration is none that the engine can run.
        OutOfMemory: not even one row of this size fits.
        ConfigurationError: the fixed rows of the reproducible mode do not fit.
    """
    key = measure(engine, family)
    engine.publisher.prepare_previews(key.model, key.latent_shape[0])
    if engine.fixed_rows is None:
        calibrate(engine, family, key)
    elif (rows := engine.memory.num_rows(key, engine.fixed_rows)) < engine.fixed_rows:
        raise ConfigurationError(f"reproducible_rows: got {engine.fixed_rows}; memory allows {rows}")


def request_of(info: ModelInfo, guidance_scale: float) -> ResolvedRequest:
    """An empty prompt at the model's own size."""
    return ResolvedRequest(
        version=1,
        model=info.id,
        prompt="",
        num_inference_steps=STEPS,
        guidance_scale=guidance_scale,
        scheduler=info.first_scheduler,
        seed=0,
    )


@torch.inference_mode()
def measure(engine: Engine, family: Family) -> LaneKey:
    """Run each part once at the model's own size, and learn what memory it takes.

    Returns:
        The lane of the model's own size.
    """
    try:
        work = Work.of(family, request_of(family.info, family.info.default_guidance_scale), "warm-up")
    except CompileError as problem:
        raise ModelError(f"{family.info.id}: its scheduler configuration cannot be used: {problem}") from problem
    encoded = []
    for text in work.texts:
        for error in engine.conditioner.encode_some([(family, text)]).values():
            raise error
        if found := engine.conditioner.get(family, text):
            encoded.append(found)
    rows = family.rows(work.request, encoded)
    key = LaneKey(work.model, work.latent_shape, common_signature(work.model, rows, len(work.texts)))
    network, memory, shape = engine.networks[work.model], engine.memory, work.latent_shape
    row = {name: tensor[None] for name, tensor in rows[0].items()}
    x, t = torch.zeros(1, *shape, device=family.device), torch.full((1,), 500.0, device=family.device)
    network(x, t, row)  # so that one-time allocations and kernel set-up are not measured
    # The bare forward: the network's own may be padded to more rows.
    memory.measure(
        family,
        key,
        family.num_pixels(x),
        denoise=lambda: family.denoise(x, t, row),
        decode=lambda: engine.decoder.decode_now(family, x),
        encode=lambda: family.encode(work.texts[:1]),
    )
    memory.check(Request(work, signature=key.signature))
    kinds = [row]
    if family.adapters and family.adapters.bank.num_layers:
        kinds.append({**row, ADAPTER: torch.zeros(1, dtype=torch.int64, device=family.device)})
    noise = torch.randn(2, *shape, device=family.device)
    for one in kinds:
        network.trace(noise, t.expand(2), {name: torch.cat([tensor, tensor]) for name, tensor in one.items()})
    rows_captured = memory.num_captured(key, engine.planner.cost.max_rows)
    with memory.charged():
        for one in kinds:
            network.capture(x, t, one, rows_captured)
    return key


def calibrate(engine: Engine, family: Family, key: LaneKey) -> None:
    """Find the lane's row budget with a few real steps of growing batches, so that no client waits for the search."""
    # Images without guidance need one row each, so that every row count can be tried.
    work = Work.of(family, request_of(family.info, 0.0), "warm-up", decode=False)
    crowd: list[Request] = []
    cost, rows, budget = engine.planner.cost, 1, 0
    while cost.budget(key) > budget or rows <= CALIBRATED_ROWS:
        cost.explore(key, min(rows, CALIBRATED_ROWS))
        budget, rows = cost.budget(key), 2 * rows
        while len(crowd) < budget:
            crowd.append(engine.submit(work))
        for _ in range(4):
            engine.step()
    cost.explore(key, 1)
    for request in crowd:
        request.cancel("warm-up")
    engine.step()
    log.info("%d rows a step are enough for latents of %s", cost.budget(key), "x".join(map(str, key.latent_shape)))
