"""What the authors of published few-step models say that they be run with, where their files do not say it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

_TRAILING = MappingProxyType({"timestep_spacing": "trailing"})


@dataclass(frozen=True)
class Advice:
    """Defaults of one model."""

    scheduler: str
    num_inference_steps: int
    guidance_scale: float
    scheduler_config: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """Options of the scheduler beside those of the model's folder."""


# By hub id, and by the beginning of a single file's name. Consistency models and FLUX.1-schnell say it in their configuration.
ADVICE: dict[str, Advice] = {
    "stabilityai/sdxl-turbo": Advice("euler_ancestral", 1, 0.0, _TRAILING),
    "stabilityai/sd-turbo": Advice("euler", 1, 0.0, _TRAILING),
    "ByteDance/SDXL-Lightning": Advice("euler", 4, 0.0, _TRAILING),
    "Tongyi-MAI/Z-Image-Turbo": Advice("euler", 8, 0.0),
}
_FILES = {
    r"sd_xl_turbo_1\.0.*": ADVICE["stabilityai/sdxl-turbo"],
    r"sd_turbo": ADVICE["stabilityai/sd-turbo"],
    r"sdxl_lightning_2step": Advice("euler", 2, 0.0, _TRAILING),
    r"sdxl_lightning_4step": ADVICE["ByteDance/SDXL-Lightning"],
    r"sdxl_lightning_8step": Advice("euler", 8, 0.0, _TRAILING),
}


def advice(source: str) -> Advice | None:
    """For a hub id, with or without a revision, or for a single file under the name that it was published with."""
    path = Path(source)
    if path.suffix == ".safetensors":
        return next((found for pattern, found in _FILES.items() if re.fullmatch(pattern, path.stem)), None)
    return ADVICE.get(source.partition("@")[0])
