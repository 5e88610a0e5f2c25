"""Pictures of a model, drawn by a stock diffusers pipeline and kept: an evaluation that was stopped draws the rest."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from latentline_worker.models import bundled_model
from latentline_worker.models.sd import is_distilled
from latentline_worker.samplers import CompileError, is_flow, make_scheduler, sampler_table

from .errors import EvaluationError
from .foreground import Pixels
from .prompts import Prompt

BATCH = 8  # prompts that are drawn together
# The contract's samplers that draw a rectified flow in a stock pipeline; of other models those of the second list are tried.
FLOW_SAMPLERS = ("dpmpp_2m", "dpmpp_3m", "dpmpp_2s", "unipc", "deis", "sa_solver")
OTHER_SAMPLERS = ("ddim", "euler", "dpmpp_2m", "dpmpp_3m", "unipc", "deis")
# A distilled flow follows straight lines, one Euler step each. A stock pipeline takes them as the first order of DPM-Solver: it
# cannot use FlowMatchEulerDiscreteScheduler.
DISTILLED_SAMPLERS = ("euler",)


@dataclass(frozen=True)
class Settings:
    """How pictures are drawn; the sampler is one of the contract's names."""

    sampler: str
    steps: int
    guidance: float

    @property
    def name(self) -> str:
        return f"{self.sampler}-{self.steps:02}-{self.guidance:g}"


class Model:
    """A pipeline in fp32, and where its pictures are kept.

    Args:
        source: a diffusers folder, or the bundled model's id.
        out: pictures lie in ``out/pictures/SPLIT/SETTINGS/seed-N/NUMBER.png``.
        key: whatever else decides what the pictures are; another model or key in ``out`` is refused.

    Raises:
        EvaluationError: the model cannot be loaded, or ``out`` holds pictures of another one.
    """

    def __init__(self, source: str, out: Path, key: str, say: Callable[[str], None], device: torch.device) -> None:
        self.out, self.say, self.device = out, say, device
        self.pipeline = _load(source).to(device)
        self.pipeline.set_progress_bar_config(disable=True)
        self.config = dict(self.pipeline.scheduler.config)
        self.distilled = is_distilled(self.config)
        self.size_px = self.pipeline.unet.config.sample_size * self.pipeline.vae_scale_factor
        self._claim(_fingerprint(self.pipeline, key))

    @property
    def samplers(self) -> tuple[str, ...]:
        """Those that can draw with this model, its own kind of prediction and a usual number of steps."""
        if self.distilled:
            return DISTILLED_SAMPLERS
        usable = []
        for name in FLOW_SAMPLERS if is_flow(self.config) else OTHER_SAMPLERS:
            try:
                sampler_table(name, self.config, 8)
            except CompileError as error:
                self.say(f"{name} is left out: {error}")
            else:
                usable.append(name)
        return tuple(usable)

    def draw(self, split: str, prompts: list[Prompt], settings: Settings, seed: int) -> Pixels:
        """(n, size, size, 3) pictures, one for each prompt, all with the same seed; those that are kept are read.

        Raises:
            EvaluationError: a picture cannot be written or read.
        """
        folder = self.out / "pictures" / split / settings.name / f"seed-{seed}"
        files = [folder / f"{prompt.number:04}.png" for prompt in prompts]
        missing = [(prompt, file) for prompt, file in zip(prompts, files, strict=True) if not file.exists()]
        if missing:
            self.say(f"{split}, {settings.name}, seed {seed}: drawing {len(missing)} of {len(prompts)} pictures")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for first in range(0, len(missing), BATCH):
                part = missing[first : first + BATCH]
                for image, (_, file) in zip(self._draw([prompt.words for prompt, _ in part], settings, seed), part, strict=True):
                    scratch = file.with_suffix(".tmp")
                    image.save(scratch, "PNG")
                    os.replace(scratch, file)
            return np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
        except OSError as error:
            raise EvaluationError(f"{folder}: pictures cannot be kept there: {error}") from error

    def _draw(self, words: list[str], settings: Settings, seed: int) -> list[Image.Image]:
        own = type(self.pipeline.scheduler).from_config
        self.pipeline.scheduler = own(self.config) if self.distilled else make_scheduler(settings.sampler, self.config)
        drawn = self.pipeline(
            words,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            generator=[torch.Generator().manual_seed(seed) for _ in words],
        )
        images: list[Image.Image] = drawn.images
        return images

    def _claim(self, fingerprint: str) -> None:
        path = self.out / "model.json"
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                path.write_text(json.dumps({"fingerprint": fingerprint}) + "\n")
            known = json.loads(path.read_text()).get("fingerprint")
        except (OSError, ValueError, AttributeError) as error:
            raise EvaluationError(f"{path}: {error}") from error
        if known != fingerprint:
            raise EvaluationError(f"{self.out} holds the evaluation of another model or data set: use another folder")


def _load(source: str) -> Any:
    if source == bundled_model.MODEL_ID:
        return bundled_model.pipeline()
    if not Path(source).is_dir():
        raise EvaluationError(f"{source}: no such model folder; allowed: a diffusers folder or {bundled_model.MODEL_ID}")
    try:
        return StableDiffusionPipeline.from_pretrained(
            source,
            use_safetensors=True,
            local_files_only=True,
            dtype=torch.float32,
            safety_checker=None,
            requires_safety_checker=False,
        )
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise EvaluationError(f"{source}: no Stable Diffusion model in diffusers format: {str(error).splitlines()[0]}") from error


def _fingerprint(pipeline: Any, key: str) -> str:
    """Of all weights, the scheduler's configuration and the key."""
    digest = hashlib.sha256(key.encode())
    digest.update(json.dumps(dict(pipeline.scheduler.config), sort_keys=True, default=str).encode())
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        for name, weight in part.state_dict().items():
            # BertModel makes a pooler with random weights where the folder has none; pipelines do not use it.
            if not name.startswith("pooler."):
                digest.update(name.encode() + weight.float().cpu().numpy().tobytes())
    return digest.hexdigest()
