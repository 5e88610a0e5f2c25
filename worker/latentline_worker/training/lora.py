"""Train an adapter: low-rank updates of a denoiser's attention, on a folder of pictures in one style.

LoRA (Hu et al. 2021, arXiv:2106.09685) by peft; the denoiser itself stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict

from .autoencoder import CPU
from .denoiser import DenoiserTask
from .errors import TrainingError
from .latents import LatentCache, fingerprint
from .recipe import Schedule, at_least, check_objective

ADAPTER = "adapter"  # the folder with the result, below the run


@dataclass(frozen=True)
class LoraRecipe:
    """An adapter's training; what is not explained here means what it means for a denoiser.

    Args:
        rank: of the updates.
        alpha: the updates are scaled by alpha / rank.
        targets: ends of the names of the linear layers that get an update.
        prediction: what the denoiser predicts.
    """

    schedule: Schedule
    rank: int = 8
    alpha: int = 8
    targets: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])
    size_px: int = 128
    prediction: str = "flow"
    density_mean: list[float] = field(default_factory=lambda: [0.0])
    density_until: list[float] = field(default_factory=lambda: [1.0])
    density_std: float = 1.0
    caption_dropout: float = 0.1
    compositions: int = 1
    first_compositions: int = 1
    next_composition_steps: int = 100

    def check(self) -> None:
        """Raises: TrainingError: a value makes no sense; the message names it."""
        self.schedule.check()
        at_least(self, rank=1, alpha=1, size_px=16)
        check_objective(self)
        if not self.targets:
            raise TrainingError("targets: got []; allowed: at least one name, such as to_q")
        if self.schedule.ema_decay:
            raise TrainingError(f"schedule.ema_decay: got {self.schedule.ema_decay}; allowed: 0, an adapter is not averaged")


class LoraTask(DenoiserTask):
    """Adapter training as the loop takes it: the loss of the denoiser, gradients for the updates alone.

    Args:
        denoiser: a U-Net of diffusers; it is given the adapter.

    Raises:
        TrainingError: a name in ``targets`` is no linear layer of it.
    """

    def __init__(self, recipe: LoraRecipe, cache: LatentCache, denoiser: Any, device: torch.device = CPU) -> None:
        base = fingerprint(denoiser)
        denoiser.requires_grad_(False)
        linear = [name for name, module in denoiser.named_modules() if isinstance(module, torch.nn.Linear)]
        for target in recipe.targets:
            if not any(name == target or name.endswith(f".{target}") for name in linear):
                raise TrainingError(f"targets: got {target!r}; allowed: ends of the names of the denoiser's linear layers")
        torch.manual_seed(recipe.schedule.seed)
        denoiser.add_adapter(LoraConfig(r=recipe.rank, lora_alpha=recipe.alpha, target_modules=recipe.targets))
        super().__init__(recipe, cache, denoiser, device)
        self.inputs["denoiser"] = base

    def finish(self, folder: Path) -> dict[str, float]:
        """Write ``folder/adapter``, which ``load_lora_weights`` of a diffusers pipeline reads."""
        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(self.model))
        StableDiffusionPipeline.save_lora_weights(folder / ADAPTER, layers, **_collate_lora_metadata({"unet": self.model}))
        for path in (folder / ADAPTER).glob("*.safetensors"):
            path.chmod(0o644)  # safetensors writes them readable by the owner alone
        return self.sample(folder, self.recipe.schedule.steps)
