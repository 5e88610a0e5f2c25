"""What begins with a trained denoiser: adapters, distillation, packages; at a thousandth of their size."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click.testing
import pytest
import torch
from diffusers import AutoencoderTiny, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from support.training import TINY_AUTOENCODER, TINY_DENOISER, denoiser_recipe, distill_recipe, lora_recipe, toml, write_data

from latentline.cli import main
from latentline_worker.models import checksums
from latentline_worker.training import commands, denoiser, distill, memory
from latentline_worker.training.autoencoder import make_model
from latentline_worker.training.denoiser import DenoiserTask
from latentline_worker.training.distill import DistillRecipe, DistillTask
from latentline_worker.training.errors import TrainingError
from latentline_worker.training.folders import FolderData
from latentline_worker.training.inputs import find_recipe
from latentline_worker.training.latents import LatentCache
from latentline_worker.training.loop import Training
from latentline_worker.training.lora import LoraRecipe, LoraTask
from latentline_worker.training.package import package, prediction_of
from latentline_worker.training.recipe import parse
from latentline_worker.training.sources import BuiltData
from latentline_worker.training.text import encode_texts, load_minilm

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def cache(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> LatentCache:
    return LatentCache(tmp_path_factory.mktemp("cache"), BuiltData(folder, 32), make_model(TINY_AUTOENCODER, 0), "key", quiet)


@pytest.fixture(scope="module")
def parts(cache: LatentCache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``vae`` and a finished run with ``run/denoiser`` and ``run/scheduler``."""
    path = tmp_path_factory.mktemp("parts")
    cache.autoencoder.save_pretrained(path / "vae")
    with torch.no_grad():
        DenoiserTask(denoiser_recipe(), cache, base()).finish(path / "run")
    return path


@pytest.fixture(autouse=True)
def few_pictures_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (denoiser, distill):
        monkeypatch.setattr(module, "NUM_MEASURED", 8)
        monkeypatch.setattr(module, "NUM_SHOWN", 4)


def quiet(line: str) -> None:
    pass


def base(seed: int = 0) -> Any:
    return make_model(TINY_DENOISER, seed)


def weights(model: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def stopped_and_resumed(make_task: Any, folder: Path, stop_at: int) -> torch.Tensor:
    def on_step(step: int, loss: float) -> None:
        if step == stop_at:
            first.stopping.set()

    first = Training(make_task(), folder, quiet, on_step)
    assert first.run() is False
    second = Training(make_task(), folder, quiet)
    assert second.resume() and second.step == stop_at and second.run()
    return weights(second.task.model)


def call(*args: object, code: int = 0) -> str:
    result = click.testing.CliRunner().invoke(main, ["train", *map(str, args)])
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == code, result.output
    return result.stderr


# Adapters


def test_an_adapter_learns_and_loads_in_plain_diffusers(cache: LatentCache, tmp_path: Path) -> None:
    task = LoraTask(lora_recipe(steps=60, learning_rate=1e-2, sample_every_steps=60), cache, base())
    before = {name: p.detach().clone() for name, p in task.model.named_parameters() if "lora" not in name}
    x0, text = cache.batch(7, 0, 0, 8, 2, 0.0)
    noise = torch.Generator().manual_seed(3)
    first = float(task._error(x0, text, 0, noise).detach())
    assert Training(task, tmp_path, quiet).run()
    assert float(task._error(x0, text, 0, noise.manual_seed(3)).detach()) < first
    assert all(torch.equal(before[name], p) for name, p in task.model.named_parameters() if name in before)
    with safe_open(tmp_path / "adapter" / "pytorch_lora_weights.safetensors", "pt") as file:
        assert all(name.startswith("unet.") and "lora" in name for name in file.keys())  # noqa: SIM118
    tokenizer, encoder = load_minilm()
    stock = StableDiffusionPipeline(
        cache.autoencoder, encoder, tokenizer, base(), denoiser.make_scheduler("flow"), None, None, requires_safety_checker=False
    )
    x, t, states = torch.randn(1, 4, 8, 8), torch.tensor([500.0]), text[:1]
    plain = stock.unet(x, t, states).sample
    stock.load_lora_weights(tmp_path / "adapter")
    adapted = stock.unet(x, t, states).sample
    torch.testing.assert_close(adapted, task.model(x, t, states).sample)
    assert not torch.allclose(adapted, plain, atol=1e-3)


def test_a_stopped_adapter_resumes_to_the_bit(cache: LatentCache, tmp_path: Path) -> None:
    whole = Training(LoraTask(lora_recipe(), cache, base()), tmp_path / "whole", quiet)
    assert whole.run()
    resumed = stopped_and_resumed(lambda: LoraTask(lora_recipe(), cache, base()), tmp_path / "parts", 5)
    assert torch.equal(resumed, weights(whole.task.model))


def test_the_adapter_command_takes_a_folder_and_names_what_it_leaves_out(folder: Path, parts: Path, tmp_path: Path) -> None:
    """From the pictures of the held-back style to a file that diffusers loads."""
    said = call("style", folder, tmp_path / "style", "--count", 6)
    assert "wrote 6 pictures with captions" in said
    (tmp_path / "style" / "broken.png").write_bytes(b"\x89PNG no picture")
    lines = (tmp_path / "style" / "captions.jsonl").read_text().splitlines()
    assert all("twemoji style" in json.loads(line)["caption"] for line in lines)
    lines += ['{"file": "broken.png", "caption": "a thing"}', '{"file": "other.png", "caption": " "}']
    (tmp_path / "style" / "captions.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "l.toml").write_text(toml(lora_recipe()))
    options = ("--data", tmp_path / "style", "--denoiser", parts / "run" / "denoiser", "--autoencoder", parts / "vae")
    said = call("lora", tmp_path / "l.toml", *options, "--out", tmp_path / "out", "--threads", 1)
    assert "left out broken.png" in said and "left out other.png: its caption is empty" in said and "step 8/8" in said
    assert (tmp_path / "out" / "adapter" / "pytorch_lora_weights.safetensors").exists()
    assert "going on at step 8 of 8" in call("lora", tmp_path / "l.toml", *options, "--out", tmp_path / "out", "--threads", 1)
    assert "an adapter is small" in call("export", tmp_path / "out", tmp_path / "weights", code=2)
    # Another denoiser under the same state would be a silent mistake.
    base(1).save_pretrained(tmp_path / "other")
    options = ("--data", tmp_path / "style", "--denoiser", tmp_path / "other", "--autoencoder", parts / "vae")
    assert "made with other inputs: denoiser differ" in call("lora", tmp_path / "l.toml", *options, "--out", tmp_path / "out", code=2)


def test_pictures_of_the_style_are_always_the_same_ones(folder: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        commands.style(folder, tmp_path / name, 5, quiet)
    files = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("one", "two")]
    assert files[0] == files[1] and len(files[0]) == 6
    assert FolderData(tmp_path / "one", 32, quiet).num_items == 4
    with Image.open(tmp_path / "one" / files[0][0]) as image:
        assert image.mode == "RGB" and image.getpixel((0, 0)) == (255, 255, 255)
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="cannot be written"):
        commands.style(folder, tmp_path / "file", 5, quiet)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"targets": ["to_x"]}, "targets: got 'to_x'; allowed: ends of the names"),
        ({"targets": []}, r"targets: got \[\]"),
        ({"rank": 0}, "rank: got 0; allowed: 1 or more"),
        ({"prediction": "x0"}, "prediction: got 'x0'"),
    ],
)
def test_impossible_adapters_are_refused(change: dict[str, Any], said: str, cache: LatentCache) -> None:
    with pytest.raises(TrainingError, match=said):
        LoraTask(parse(toml(dataclasses.replace(lora_recipe(), **change)), LoraRecipe, "recipe"), cache, base())
    with pytest.raises(TrainingError, match="an adapter is not averaged"):
        parse(toml(lora_recipe(ema_decay=0.5)), LoraRecipe, "recipe")
    with pytest.raises(TrainingError, match="no such key"):
        parse("model = 3\n" + toml(lora_recipe()), LoraRecipe, "recipe")


# Distillation


class Straight(torch.nn.Module):
    """A flow whose velocity is known: towards 2 x everywhere, so that x(s - h) = x(s) exp(-2 h)."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> Any:
        return type("Out", (), {"sample": 2 * x})


def test_the_teacher_is_followed_through_its_window(cache: LatentCache) -> None:
    recipe = dataclasses.replace(distill_recipe(), windows=4, solver_steps=400)
    task = DistillTask(recipe, cache, base())
    task.teacher = Straight()
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    end = task._solve(x, torch.tensor([1.0, 0.5]), cache.empty.expand(2, -1, -1))
    torch.testing.assert_close(end, x * math.exp(-2 / 4), atol=1e-2, rtol=1e-2)


def test_guidance_becomes_part_of_the_student(cache: LatentCache) -> None:
    """A teacher whose velocity is 1 with a caption and 0 without one."""

    class Captioned(torch.nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> Any:
            has = (text != cache.empty).flatten(1).any(dim=1).float().view(-1, 1, 1, 1)
            return type("Out", (), {"sample": has.expand_as(x)})

    task = DistillTask(dataclasses.replace(distill_recipe(), windows=2, guidance=3.0), cache, base())
    task.teacher = Captioned()
    text = cache.states(["a rocket"])
    end = task._solve(torch.zeros(1, 4, 8, 8), torch.tensor([1.0]), text)
    torch.testing.assert_close(end, torch.full((1, 4, 8, 8), -3.0 / 2))


def test_one_step_a_window_follows_straight_pieces(cache: LatentCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scheduler that is shipped makes Euler steps from window to window."""
    task = DistillTask(dataclasses.replace(distill_recipe(), windows=4), cache, base())
    asked: list[float] = []

    def velocity(x: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> Any:
        asked.append(float(t))
        return type("Out", (), {"sample": torch.full_like(x, float(len(asked)))})

    task.model.forward = velocity
    start = torch.zeros(1, 4, 8, 8)
    monkeypatch.setattr(torch, "randn", lambda *shape, **options: start.clone())
    z = task.draw(cache.empty[None])
    assert asked == pytest.approx([1000, 750, 500, 250], abs=2)
    torch.testing.assert_close(z, torch.full_like(z, -(1 + 2 + 3 + 4) / 4), atol=0.01, rtol=0.01)


def test_a_student_comes_nearer_to_its_teacher(cache: LatentCache, tmp_path: Path) -> None:
    teacher = base()
    trained = Training(DenoiserTask(denoiser_recipe(steps=40, learning_rate=3e-3), cache, teacher), tmp_path / "teacher", quiet)
    assert trained.run()
    task = DistillTask(distill_recipe(steps=80, learning_rate=3e-3, sample_every_steps=40), cache, teacher)
    before = weights(teacher)
    assert Training(task, tmp_path / "student", quiet).run()
    assert torch.equal(weights(teacher), before)
    lines = [json.loads(line) for line in (tmp_path / "student" / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert sum(losses[-5:]) < sum(losses[:5]) and (tmp_path / "student" / "samples" / "step-000040.png").exists()
    assert DPMSolverMultistepScheduler.from_pretrained(tmp_path / "student" / "scheduler").config.solver_order == 1


KILLED = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from latentline_worker.training import distill, loop
from latentline_worker.training.autoencoder import make_model
from latentline_worker.training.distill import DistillTask
from latentline_worker.training.latents import LatentCache
from latentline_worker.training.sources import BuiltData
from support.killing import at, before_anything, between_writing_and_renaming, in_a_step, train_and_kill, while_sampling
from support.training import TINY_AUTOENCODER, TINY_DENOISER, distill_recipe

loop.SAVE_EVERY_S = 0  # after each step
distill.NUM_MEASURED = distill.NUM_SHOWN = 4
data, out, whole = map(Path, sys.argv[1:])

def make(folder):
    cache = LatentCache(folder, BuiltData(data, 32), make_model(TINY_AUTOENCODER, 0), "key", lambda line: None)
    return loop.Training(DistillTask(distill_recipe(), cache, make_model(TINY_DENOISER, 0)), folder, lambda line: None)

def in_a_later_step(task, training):
    task.loss = at(6, task.loss)

train_and_kill(make, whole, out, (before_anything, in_a_step, between_writing_and_renaming, in_a_later_step, while_sampling))
"""


@pytest.mark.slow
def test_a_distillation_killed_at_five_points_ends_with_the_same_weights(folder: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, str(folder), str(tmp_path / "out"), str(tmp_path / "whole")],
        cwd=ROOT / "tests", capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    killed, whole = (torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("out", "whole"))
    assert all(torch.equal(killed["model"][name], value) for name, value in whole["model"].items())
    averages = [one["ema"]["shadow_params"] for one in (killed, whole)]
    assert all(torch.equal(a, b) for a, b in zip(*averages, strict=True)) and killed["step"] == 8


def test_a_state_of_another_teacher_is_refused(cache: LatentCache, tmp_path: Path) -> None:
    Training(DistillTask(distill_recipe(), cache, base()), tmp_path, quiet).save()
    with pytest.raises(TrainingError, match="made with other inputs: denoiser differ"):
        Training(DistillTask(distill_recipe(), cache, base(1)), tmp_path, quiet).resume()


def test_only_flows_are_distilled_and_only_what_fits(folder: Path, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "d.toml").write_text(toml(distill_recipe()))
    denoiser_recipe_text = {"step": 3, "recipe": {"prediction": "epsilon"}}
    base().save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "training.json").write_text(json.dumps(denoiser_recipe_text))
    options = ("--data", folder, "--autoencoder", parts / "vae", "--out", tmp_path / "out")
    said = call("distill", tmp_path / "d.toml", *options, "--denoiser", tmp_path / "other", code=2)
    assert "predicts epsilon; only a rectified flow (flow) can be distilled" in said
    (tmp_path / "l.toml").write_text(toml(lora_recipe()))
    said = call("lora", tmp_path / "l.toml", *options, "--denoiser", tmp_path / "other", code=2)
    assert "predicts epsilon, and the recipe's prediction is flow" in said
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1_000_000)
    for name in ("distill", "lora"):
        said = call(name, tmp_path / f"{name[0]}.toml", *options, "--denoiser", parts / "run" / "denoiser", code=2)
        assert "the training needs about" in said and not (tmp_path / "out" / "state.pt").exists()
    monkeypatch.undo()
    wide = dict(TINY_DENOISER, sample_size=4)
    make_model(wide, 0).save_pretrained(tmp_path / "wide")
    assert "sample_size must be 4, 4, 8" in call("distill", tmp_path / "d.toml", *options, "--denoiser", tmp_path / "wide", code=2)
    with pytest.raises(TrainingError, match="windows: got 0; allowed: 1 or more"):
        parse(toml(dataclasses.replace(distill_recipe(), windows=0)), DistillRecipe, "recipe")


def test_an_unfinished_distillation_is_not_exported(cache: LatentCache, tmp_path: Path) -> None:
    training = Training(DistillTask(distill_recipe(), cache, base()), tmp_path / "run", quiet)
    training.save()
    with pytest.raises(TrainingError, match="the distillation is at step 0 of 8: let it end first"):
        commands.export(tmp_path / "run", tmp_path / "weights", quiet)
    training.run()
    commands.export(tmp_path / "run", tmp_path / "weights", quiet)
    assert prediction_of(tmp_path / "weights") == "flow"
    cache.autoencoder.save_pretrained(tmp_path / "vae")
    package(tmp_path / "vae", tmp_path / "weights", tmp_path / "model")
    assert DPMSolverMultistepScheduler.from_pretrained(tmp_path / "model" / "scheduler").config.solver_order == 1


# Packages


def test_a_package_is_what_a_stock_pipeline_loads(cache: LatentCache, parts: Path, tmp_path: Path) -> None:
    said = call("package", tmp_path / "model", "--autoencoder", parts / "vae", "--denoiser", parts / "run" / "denoiser")
    assert f"wrote {tmp_path / 'model'}" in said
    checksums.check(tmp_path / "model")
    stock = StableDiffusionPipeline.from_pretrained(tmp_path / "model", safety_checker=None)
    assert isinstance(stock.scheduler, DPMSolverMultistepScheduler) and isinstance(stock.vae, AutoencoderTiny)
    assert stock.scheduler.config.prediction_type == "flow_prediction" and stock.scheduler.config.use_flow_sigmas
    assert UNet2DConditionModel.from_pretrained(tmp_path / "model" / "unet", dtype=torch.float16).dtype == torch.float16
    stock.set_progress_bar_config(disable=True)
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    drawn = stock("a rocket", latents=start, num_inference_steps=3, guidance_scale=1.0, output_type="latent").images
    tokenizer, encoder = load_minilm()
    text = encode_texts(tokenizer, encoder, ["a rocket"])
    scheduler = DPMSolverMultistepScheduler.from_pretrained(parts / "run" / "scheduler")
    scheduler.set_timesteps(3)
    unet = UNet2DConditionModel.from_pretrained(parts / "run" / "denoiser")
    z = start
    with torch.no_grad():
        for t in scheduler.timesteps:
            z = scheduler.step(unet(z, t, text).sample, t, z).prev_sample
    torch.testing.assert_close(drawn, z, atol=0.02, rtol=0.02)  # the package holds fp16
    assert "name_or_path" not in (tmp_path / "model" / "unet" / "config.json").read_text()
    assert os.stat(tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors").st_mode & 0o777 == 0o644


def test_packages_that_cannot_be_made_are_refused(parts: Path, tmp_path: Path) -> None:
    good = ("--autoencoder", parts / "vae", "--denoiser", parts / "run" / "denoiser")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    assert "not empty" in call("package", tmp_path / "full", *good, code=2)
    base().save_pretrained(tmp_path / "unknown")
    told = {
        "nothing says what it predicts": (parts / "vae", tmp_path / "unknown"),
        "no UNet2DConditionModel in diffusers format": (parts / "vae", tmp_path),
        "no autoencoder in diffusers format": (tmp_path, parts / "run" / "denoiser"),
    }
    for said, (vae, unet) in told.items():
        assert said in call("package", tmp_path / "model", "--autoencoder", vae, "--denoiser", unet, code=2)
    make_model({**TINY_AUTOENCODER, "latent_channels": 8}, 0).save_pretrained(tmp_path / "wide")
    said = call("package", tmp_path / "model", "--autoencoder", tmp_path / "wide", "--denoiser", parts / "run" / "denoiser", code=2)
    assert "takes 4 latent channels" in said and not (tmp_path / "model").exists()
    (tmp_path / "unknown" / "training.json").write_text("{")
    assert "training.json" in call(
        "package", tmp_path / "model", "--autoencoder", parts / "vae", "--denoiser", tmp_path / "unknown", code=2
    )


def test_the_recipes_of_the_package_are_whole() -> None:
    assert find_recipe("emoji-lora", LoraRecipe).prediction == "flow"
    assert find_recipe("emoji-distill", DistillRecipe).windows == 4
