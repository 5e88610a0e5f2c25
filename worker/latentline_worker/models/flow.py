"""What the families of flow matching share: their scheduler's configuration, and its shift with the size of the picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from latentline.jobs import ResolvedRequest
from latentline_worker.samplers import SamplerTable, names_for, sampler_table


def with_flow(config: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler's configuration that says that it is one of flow matching; the FlowMatch classes leave it to their name."""
    return {**config, "prediction_type": "flow_prediction"}


def mu_of(config: Mapping[str, Any], num_tokens: int, max_shift: float) -> float | None:
    """The shift of the noise levels for a picture of so many tokens: the larger it is, the more noise hides it.

    As ``calculate_shift`` of diffusers' pipelines: a line through (base_image_seq_len, base_shift) and (max_image_seq_len, max_shift).

    Args:
        config: of the scheduler.
        num_tokens: latent patches.
        max_shift: where the configuration names none.

    Returns:
        None for a scheduler whose shift does not depend on the size.
    """
    if not config.get("use_dynamic_shifting"):
        return None
    fewest, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", max_shift)
    slope = (high - low) / (most - fewest)
    return float(num_tokens * slope + (low - slope * fewest))


def names_with_levels(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The schedulers of a family whose pipeline gives its own noise levels; FlowMatchHeunDiscreteScheduler takes none."""
    return tuple(name for name in names_for(config) if name != "heun")


def table_with_levels(request: ResolvedRequest, config: Mapping[str, Any], num_tokens: int) -> SamplerTable:
    """The table of a request where the pipeline gives its own noise levels, 1 to 1 / steps, before they are shifted.

    Raises:
        CompileError: the scheduler cannot be used in this way; the message says why.
    """
    steps = request.num_inference_steps
    levels = np.linspace(1.0, 1 / steps, steps).tolist()
    return sampler_table(request.scheduler, config, steps, sigmas=levels, mu=mu_of(config, num_tokens, max_shift=1.15))
