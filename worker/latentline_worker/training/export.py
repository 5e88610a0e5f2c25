"""Write the trained parts as the bundled model: fp16 safetensors and the noise schedule."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel

from .denoiser import SCHEDULE


def export(work: Path, out: Path) -> None:
    """Copy ``work/vae`` and ``work/unet`` into ``out`` in half precision, with the scheduler's configuration."""
    for name, cls in (("vae", AutoencoderKL), ("unet", UNet2DConditionModel)):
        cls.from_pretrained(work / name).to(torch.float16).save_pretrained(out / name, safe_serialization=True)
        config = json.loads((out / name / "config.json").read_text())
        config.pop("_name_or_path", None)  # where it lay on the machine that trained it
        (out / name / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    # steps_offset says nothing with this spacing; pipelines warn about any other value.
    # "trailing" starts at the noisiest timestep, which few-step runs need (Lin et al. 2023, arXiv:2305.08891).
    DPMSolverMultistepScheduler(**SCHEDULE, timestep_spacing="trailing", steps_offset=1).save_pretrained(out / "scheduler")
    for path in out.rglob("*.safetensors"):
        path.chmod(0o644)  # safetensors writes them readable by the owner alone
