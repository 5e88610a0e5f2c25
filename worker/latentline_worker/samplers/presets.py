"""The contract's scheduler names as diffusers schedulers, with the model's own noise schedule."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import diffusers

from .compile import compile_scheduler
from .table import SamplerTable
from .trajectory import CompileError, is_flow

# name -> (diffusers class, options). The keys are latentline.jobs.SCHEDULERS; a test holds them equal.
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "lms": ("LMSDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2_ancestral": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2, "use_karras_sigmas": False}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2, "use_karras_sigmas": True}),
    "dpmpp_3m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 3, "use_karras_sigmas": False}),
    "dpmpp_2s": ("DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "deis": ("DEISMultistepScheduler", {"algorithm_type": "deis", "solver_type": "logrho"}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "sa_solver": ("SASolverScheduler", {"algorithm_type": "data_prediction"}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
}

# Of the same names for models of flow matching: classes of its own, or a solver's mode for it. The other names have none.
_FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
FLOW_PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2, **_FLOW}),
    "dpmpp_3m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 3, **_FLOW}),
    "dpmpp_2s": ("DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2, **_FLOW}),
    "deis": ("DEISMultistepScheduler", {"algorithm_type": "deis", "solver_type": "logrho", **_FLOW}),
    "unipc": ("UniPCMultistepScheduler", _FLOW),
    "sa_solver": ("SASolverScheduler", {"algorithm_type": "data_prediction", **_FLOW}),
    "lcm": ("FlowMatchLCMScheduler", {}),
}


def names_for(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The scheduler names that have a meaning for a model with this scheduler configuration."""
    return tuple(FLOW_PRESETS if is_flow(config) else PRESETS)


def make_scheduler(name: str, config: Mapping[str, Any]) -> Any:
    """The diffusers scheduler of this name, with the model's ``config``.

    DDIM and LCM clip the predicted sample by default, which is wrong for latents, so the default here is not to clip. A
    config that sets ``clip_sample=True`` keeps it, and the compiler refuses it.

    Raises:
        CompileError: the name is not known, or has no meaning for flow matching.
    """
    presets = FLOW_PRESETS if is_flow(config) else PRESETS
    if name not in presets:
        problem = "has no meaning for a model of flow matching" if name in PRESETS else "is not a known scheduler"
        raise CompileError(f"{name!r} {problem}; known: {', '.join(presets)}")
    class_name, options = presets[name]
    cls = getattr(diffusers, class_name)
    kept = {key: value for key, value in config.items() if not key.startswith("_")}
    if is_flow(config):  # one shift under two names
        shift = kept.get("shift", kept.get("flow_shift", 1.0))
        kept |= {"shift": shift, "flow_shift": shift}
    kept = {"clip_sample": False} | kept | options
    accepted = cls._get_init_keys(cls)
    return cls(**{key: value for key, value in kept.items() if key in accepted})


@functools.lru_cache(maxsize=2048)
def _table(
    name: str, config_json: str, num_inference_steps: int, start: int | None, sigmas: tuple[float, ...] | None, mu: float | None
) -> SamplerTable:
    return compile_scheduler(make_scheduler(name, json.loads(config_json)), num_inference_steps, start=start, sigmas=sigmas, mu=mu)


def sampler_table(
    name: str,
    config: Mapping[str, Any],
    num_inference_steps: int,
    *,
    start: int | None = None,
    sigmas: Sequence[float] | None = None,
    mu: float | None = None,
) -> SamplerTable:
    """The compiled table, cached by all arguments: see :func:`compile_scheduler`.

    Raises:
        CompileError: the scheduler cannot be used in this way; the message says why.
    """
    key = json.dumps(dict(config), sort_keys=True, default=str)
    return _table(name, key, num_inference_steps, start, None if sigmas is None else tuple(sigmas), mu)
