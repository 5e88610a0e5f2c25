"""One folder that any diffusers program loads: autoencoder, denoiser, text encoder and scheduler."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

from latentline_worker.models import checksums

from . import distill, objectives
from .errors import TrainingError
from .export import PLACE
from .inputs import class_name, load_model
from .text import load_minilm


def package(autoencoder: Path, denoiser: Path, target: Path) -> None:
    """Write ``target``, in fp16, with the sums of its files.

    Args:
        denoiser: of a finished run (``RUN/denoiser``) or exported: both say what the denoiser predicts.

    Raises:
        ModelError: a part is no model of its kind.
        TrainingError: the parts do not fit each other, nothing says what the denoiser predicts, or ``target`` is in use or
            cannot be written.
    """
    vae: Any = load_model(autoencoder, class_name(autoencoder))
    unet: Any = load_model(denoiser, "UNet2DConditionModel")
    channels = vae.config.latent_channels
    if channels != unet.config.in_channels:
        raise TrainingError(f"{denoiser}: takes {unet.config.in_channels} latent channels, {autoencoder} makes {channels}")
    scheduler = _scheduler(denoiser)
    if target.exists() and any(target.iterdir()):
        raise TrainingError(f"{target}: not empty; a package is written into a new folder")
    tokenizer, encoder = load_minilm()
    pipeline = StableDiffusionPipeline(vae, encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False)
    try:
        pipeline.to(dtype=torch.float16).save_pretrained(target, safe_serialization=True)
        if (denoiser / PLACE).exists():
            shutil.copy(denoiser / PLACE, target / PLACE)
        for path in target.rglob("config.json"):
            _mend(path)
        for path in target.rglob("*.safetensors"):
            path.chmod(0o644)  # safetensors writes them readable by the owner alone
        checksums.write(target)
    except OSError as error:
        raise TrainingError(f"{target}: the package cannot be written: {error}") from error


def prediction_of(denoiser: Path) -> str | None:
    """What a denoiser predicts, as its training left it: ``flow``, ``v_prediction`` or ``epsilon``; None where nothing says so."""
    config = _read(denoiser.parent / "scheduler" / "scheduler_config.json")
    if config:
        return {"flow_prediction": "flow"}.get(config["prediction_type"], str(config["prediction_type"]))
    recipe = _read(denoiser / PLACE).get("recipe", {})
    return "flow" if "windows" in recipe else recipe.get("prediction")


def _scheduler(denoiser: Path) -> Any:
    if (denoiser.parent / "scheduler" / "scheduler_config.json").exists():
        return DPMSolverMultistepScheduler.from_pretrained(denoiser.parent / "scheduler")
    prediction = prediction_of(denoiser)
    if prediction is None:
        raise TrainingError(f"{denoiser}: nothing says what it predicts: give RUN/denoiser of a finished run, or exported weights")
    return distill.make_scheduler() if "windows" in _read(denoiser / PLACE)["recipe"] else objectives.make_scheduler(prediction)


def _read(path: Path) -> dict[str, Any]:
    """A JSON file, or nothing where there is none.

    Raises:
        TrainingError: it is broken.
    """
    if not path.exists():
        return {}
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise TrainingError(f"{path}: {error}") from error
    return found


def _mend(path: Path) -> None:
    """Drop where the part lay on the machine that made it, and the precision that transformers would load it in.

    Without a ``dtype`` diffusers loads its parts in fp32, whatever their files hold, and transformers in what is written here.
    """
    config = json.loads(path.read_text())
    config.pop("_name_or_path", None)
    if "dtype" in config:
        config["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
