"""Weights to keep: a training's model in half precision, small enough to commit, and enough to go on from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.training_utils import EMAModel

from latentline_worker.models import checksums

from . import state
from .autoencoder import make_model
from .errors import TrainingError

PLACE = "training.json"  # which step of which recipe the weights are from


def export(run: Path, target: Path) -> int:
    """Write the model of a training, finished or not, in fp16; its step.

    Averaged weights are taken where the recipe averages. An unfinished autoencoder is refused, because its scaling factor is
    measured at the end; so are an unfinished distillation and an adapter.

    Raises:
        TrainingError: ``run`` holds no training's state, or one that is refused.
    """
    found = state.read(run)
    if found is None:
        raise TrainingError(f"{run}: no training's state is there")
    if "rank" in found["recipe"]:
        raise TrainingError(f"{run}: an adapter is small and is written at the end of its training: take {run}/adapter")
    distilled = "windows" in found["recipe"]
    arguments = {"class": "UNet2DConditionModel"} if distilled else found["recipe"]["model"]
    name = "denoiser" if arguments["class"] == "UNet2DConditionModel" else "autoencoder"
    model: Any
    if (run / name).exists():
        model = getattr(diffusers, arguments["class"]).from_pretrained(run / name, local_files_only=True)
    elif name == "autoencoder" or distilled:
        what = "distillation" if distilled else "autoencoder"
        raise TrainingError(f"{run}: the {what} is at step {found['step']} of {found['recipe']['schedule']['steps']}: let it end first")
    else:
        model = make_model(arguments, 0)
        model.load_state_dict(found["model"])
        if found["ema"]:
            average = EMAModel(model.parameters())
            average.load_state_dict(found["ema"])
            average.copy_to(model.parameters())
    model.to(torch.float16).save_pretrained(target, safe_serialization=True)
    config = json.loads((target / "config.json").read_text())
    config.pop("_name_or_path", None)  # where it lay on the machine that trained it
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    place = {"step": found["step"], "recipe": found["recipe"]}
    (target / PLACE).write_text(json.dumps(place, indent=2, sort_keys=True) + "\n")
    for path in target.glob("*.safetensors"):
        path.chmod(0o644)  # safetensors writes them readable by the owner alone
    checksums.write(target)
    return int(found["step"])


def place_of(weights: Path) -> int:
    """The step that exported weights stand at; 0 for weights from elsewhere.

    Raises:
        TrainingError: the file that says so is broken.
    """
    path = weights / PLACE
    if not path.exists():
        return 0
    try:
        return int(json.loads(path.read_text())["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{path}: {error!r}") from error
