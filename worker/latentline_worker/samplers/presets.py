"""The contract's scheduler names as diffusers schedulers, with the model's own noise schedule."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

import diffusers

from .compile import CompileError, compile_scheduler
from .table import SamplerTable

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


def make_scheduler(name: str, config: Mapping[str, Any]) -> Any:
    """The diffusers scheduler of this name, with the model's ``config``.

    DDIM and LCM clip the predicted sample by default, which is wrong for latents, so the default here is not to clip. A
    config that sets ``clip_sample=True`` keeps it, and the compiler refuses it.

    Raises:
        CompileError: the name is not known.
    """
    if name not in PRESETS:
        raise CompileError(f"unknown scheduler {name!r}; known: {', '.join(PRESETS)}")
    class_name, options = PRESETS[name]
    cls = getattr(diffusers, class_name)
    kept = {key: value for key, value in config.items() if not key.startswith("_")}
    kept = {"clip_sample": False} | kept | options
    accepted = cls._get_init_keys(cls)
    return cls(**{key: value for key, value in kept.items() if key in accepted})


@functools.lru_cache(maxsize=2048)
def _table(name: str, config_json: str, num_inference_steps: int) -> SamplerTable:
    return compile_scheduler(make_scheduler(name, json.loads(config_json)), num_inference_steps)


def sampler_table(name: str, config: Mapping[str, Any], num_inference_steps: int) -> SamplerTable:
    """The compiled table, cached by (name, config, step count).

    Raises:
        CompileError: see :func:`compile_scheduler`.
    """
    return _table(name, json.dumps(dict(config), sort_keys=True, default=str), num_inference_steps)
