"""The parameters of a picture as existing image tools write and read them: A1111's names of samplers, and its text."""

from __future__ import annotations

from . import __version__
from .jobs import JobRecord

SAMPLER_NAMES = {
    "ddim": "DDIM",
    "ddpm": "DDPM",
    "pndm": "PNDM",
    "lms": "LMS",
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "heun": "Heun",
    "dpm2": "DPM2",
    "dpm2_ancestral": "DPM2 a",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_karras": "DPM++ 2M Karras",
    "dpmpp_3m": "DPM++ 3M",
    "dpmpp_2s": "DPM++ 2S",
    "deis": "DEIS",
    "unipc": "UniPC",
    "sa_solver": "SA-Solver",
    "lcm": "LCM",
    "tcd": "TCD",
}
"""Scheduler -> what these tools call it. One that is not here has its own name there."""


def sampler_name(scheduler: str) -> str:
    return SAMPLER_NAMES.get(scheduler, scheduler)


def parameters_text(record: JobRecord, seed: int, width: int, height: int) -> str:
    """The ``parameters`` text in the form that image tools read: prompt, negative prompt, one line of settings."""
    r = record.request
    lines = [r.prompt]
    if r.negative_prompt:
        lines.append(f"Negative prompt: {r.negative_prompt}")
    loras = "".join(f"LoRA: {lora.name} ({lora.scale:g}), " for lora in r.loras)
    lines.append(
        f"Steps: {r.num_inference_steps}, Sampler: {sampler_name(r.scheduler)}, CFG scale: {r.guidance_scale:g}, "
        f"Seed: {seed}, Size: {width}x{height}, Model: {r.model}, {loras}Version: latentline {__version__}"
    )
    return "\n".join(lines)
