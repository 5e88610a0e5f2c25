"""Trainings at a thousandth of their size: they learn, resume to the bit, and refuse what would be half-trained."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import free_port
from diffusers import AutoencoderKL, AutoencoderTiny, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from support.training import TINY_AUTOENCODER, TINY_KL, autoencoder_recipe, denoiser_recipe, toml, write_data

from latentline_worker.training import autoencoder, commands, denoiser, loop, memory, state
from latentline_worker.training.autoencoder import AutoencoderTask, make_model
from latentline_worker.training.denoiser import DenoiserTask, num_shards
from latentline_worker.training.errors import TrainingError
from latentline_worker.training.latents import LatentCache
from latentline_worker.training.loop import Training
from latentline_worker.training.recipe import PREDICTIONS, DenoiserRecipe
from latentline_worker.training.sources import BuiltData
from latentline_worker.training.text import encode_texts, load_minilm

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def source(folder: Path) -> BuiltData:
    return BuiltData(folder, 32)


@pytest.fixture(scope="module")
def cache(source: BuiltData, tmp_path_factory: pytest.TempPathFactory) -> LatentCache:
    return LatentCache(tmp_path_factory.mktemp("cache"), source, make_model(TINY_AUTOENCODER, 0), "key", lambda line: None)


@pytest.fixture(autouse=True)
def few_pictures_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (autoencoder, denoiser):
        monkeypatch.setattr(module, "NUM_MEASURED", 8)
        monkeypatch.setattr(module, "NUM_SHOWN", 4)


def denoiser_task(recipe: DenoiserRecipe, cache: LatentCache) -> DenoiserTask:
    return DenoiserTask(recipe, cache, make_model(recipe.model, recipe.schedule.seed))


def quiet(line: str) -> None:
    pass


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def log(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


class StopAt:
    """Ends a training after a step, as a signal would."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.training: Training | None = None

    def __call__(self, step: int, loss: float) -> None:
        if step == self.step and self.training:
            self.training.stopping.set()


def in_two_parts(make_task: Any, folder: Path, stop_at: int) -> torch.Tensor:
    """Weights after a training that was stopped and resumed by fresh objects."""
    stop = StopAt(stop_at)
    first = stop.training = Training(make_task(), folder, quiet, stop)
    assert first.run() is False and first.step == stop_at
    second = Training(make_task(), folder, quiet)
    assert second.resume() and second.step == stop_at and second.run()
    return weights(second.task.model)


# Learning and formats


@pytest.mark.parametrize(("model", "cls"), [(TINY_AUTOENCODER, AutoencoderTiny), (TINY_KL, AutoencoderKL)])
def test_autoencoders_learn_and_load_in_plain_diffusers(model: dict[str, Any], cls: Any, source: BuiltData, tmp_path: Path) -> None:
    task = AutoencoderTask(autoencoder_recipe(model, steps=60, sample_every_steps=60), source)
    assert Training(task, tmp_path, quiet).run()
    losses = [line["loss"] for line in log(tmp_path) if "loss" in line]
    assert losses[-1] < 0.8 * losses[0]
    loaded = cls.from_pretrained(tmp_path / "autoencoder")
    z = task.encode(torch.zeros(1, 3, 32, 32))
    assert torch.equal(weights(loaded), weights(task.model)) and loaded.config.scaling_factor > 0 and z.shape[1] == 4
    last = log(tmp_path)[-1]
    assert last["psnr_db"] > 5 and last["latent_std_min"] <= last["latent_std_max"]
    with Image.open(tmp_path / "samples" / "step-000060.png") as sheet:
        assert sheet.size == (8 * 34 - 2, 32)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_denoisers_train_and_sample_in_a_stock_pipeline(prediction: str, cache: LatentCache, tmp_path: Path) -> None:
    task = denoiser_task(denoiser_recipe(prediction), cache)
    assert Training(task, tmp_path, quiet).run()
    assert math.isfinite(log(tmp_path)[-1]["held_out_loss"]) and (tmp_path / "samples" / "step-000005.png").exists()
    tokenizer, encoder = load_minilm()
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "denoiser")
    scheduler = DPMSolverMultistepScheduler.from_pretrained(tmp_path / "scheduler")
    stock = StableDiffusionPipeline(cache.autoencoder, encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    latents = stock("a rocket", latents=start, num_inference_steps=20, guidance_scale=3.0, output_type="latent").images
    # The sheet's own sampling starts from other noise: give it this one.
    expected = sample_from(task, start, encode_texts(tokenizer, encoder, ["a rocket"]), unet)
    torch.testing.assert_close(latents, expected, atol=1e-4, rtol=1e-3)


def sample_from(task: DenoiserTask, start: torch.Tensor, text: torch.Tensor, unet: UNet2DConditionModel) -> torch.Tensor:
    task.model, draw = unet, torch.randn
    torch.randn = lambda *shape, **options: start.clone()  # type: ignore[assignment]
    try:
        with torch.no_grad():
            return task.draw(text)
    finally:
        torch.randn = draw


def test_the_written_denoiser_has_the_averaged_weights(cache: LatentCache, tmp_path: Path) -> None:
    training = Training(denoiser_task(denoiser_recipe(), cache), tmp_path, quiet)
    training.run()
    assert training.ema is not None
    averaged = torch.cat([p.flatten() for p in training.ema.shadow_params])
    written = weights(UNet2DConditionModel.from_pretrained(tmp_path / "denoiser"))
    assert torch.equal(written, averaged) and not torch.equal(written, weights(training.task.model))


def test_bf16_trains_in_autocast(cache: LatentCache, tmp_path: Path) -> None:
    training = Training(denoiser_task(denoiser_recipe(steps=2, precision="bf16"), cache), tmp_path, quiet)
    assert training.run() and next(training.task.model.parameters()).dtype == torch.float32
    # On a CPU, the gradient of fused attention is slow in bf16.
    assert all(isinstance(one, AttnProcessor) for one in training.task.model.attn_processors.values())


def test_a_lost_state_is_replaced_by_exported_weights(folder: Path, cache: LatentCache, tmp_path: Path) -> None:
    """The schedule goes on at their step, with optimisers that warm up and averages that stay."""
    stop = StopAt(5)
    stop.training = Training(denoiser_task(denoiser_recipe(), cache), tmp_path / "lost", quiet, stop)
    stop.training.run()
    commands.export(tmp_path / "lost", tmp_path / "weights", quiet)
    held = UNet2DConditionModel.from_pretrained(tmp_path / "weights")
    assert stop.training.ema is not None and (tmp_path / "weights" / "SHA256SUMS").exists()
    averaged = torch.cat([p.flatten() for p in stop.training.ema.shadow_params])
    torch.testing.assert_close(weights(held).float(), averaged, atol=1e-3, rtol=1e-3)
    cache.autoencoder.save_pretrained(tmp_path / "vae")
    (tmp_path / "recipe.toml").write_text(toml(denoiser_recipe()))
    said: list[str] = []
    run = commands.Run(tmp_path / "out", init=tmp_path / "weights")
    assert commands.denoiser(str(tmp_path / "recipe.toml"), folder, tmp_path / "vae", run, said.append)
    assert log(tmp_path / "out")[0]["step"] == 6 and any("at step 5 of 8, with fresh optimisers" in line for line in said)
    assert commands.denoiser(str(tmp_path / "recipe.toml"), folder, tmp_path / "vae", run, said.append)
    assert any("going on at step 8 of 8" in line and "is not read" in line for line in said)


def test_only_a_finished_autoencoder_is_exported(source: BuiltData, tmp_path: Path) -> None:
    training = Training(AutoencoderTask(autoencoder_recipe(), source), tmp_path / "run", quiet)
    training.save()
    with pytest.raises(TrainingError, match="at step 0 of 8: let it end first"):
        commands.export(tmp_path / "run", tmp_path / "weights", quiet)
    training.run()
    commands.export(tmp_path / "run", tmp_path / "weights", quiet)
    held = AutoencoderTiny.from_pretrained(tmp_path / "weights", torch_dtype=torch.float16)
    assert held.dtype == torch.float16 and held.config.scaling_factor == training.task.model.config.scaling_factor
    assert "name_or_path" not in (tmp_path / "weights" / "config.json").read_text()


# Caches


def test_pictures_come_into_use_one_after_the_other_and_are_encoded_once(
    source: BuiltData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [num_shards(denoiser_recipe(), step) for step in (0, 3, 4, 7, 100)] == [1, 1, 2, 2, 2]
    said: list[str] = []
    vae = make_model(TINY_AUTOENCODER, 0)
    first = LatentCache(tmp_path, source, vae, "key", said.append)
    one = first.batch(0, 3, 0, 4, 2, 0.0)
    second = LatentCache(tmp_path, source, vae, "key", said.append)
    two = second.batch(0, 3, 0, 4, 2, 0.0)
    assert [torch.equal(a, b) for a, b in zip(one, two, strict=True)] == [True, True]
    assert len(said) == 2 and len(list(first.folder.iterdir())) == 4
    assert LatentCache(tmp_path, source, make_model(TINY_AUTOENCODER, 1), "key", quiet).folder != first.folder
    assert LatentCache(tmp_path, source, vae, "other", quiet).folder != first.folder


def test_cached_rows_are_the_picture_and_its_caption(cache: LatentCache, source: BuiltData) -> None:
    x0, text = cache.batch(0, 1, 0, 1, 1, 0.0)
    rows = [cache.states([source.item(index, 0)[1]])[0] for index in range(source.num_items)]
    assert min((row - text[0]).abs().max().item() for row in rows) < 1e-2
    assert x0.shape == (1, 4, 8, 8)
    _, dropped = cache.batch(0, 1, 0, 8, 1, 0.999)
    assert torch.equal(dropped, cache.empty.expand(8, -1, -1))


# Resuming


def test_a_stopped_denoiser_resumes_to_the_bit(cache: LatentCache, tmp_path: Path) -> None:
    whole = Training(denoiser_task(denoiser_recipe(), cache), tmp_path / "whole", quiet)
    assert whole.run() and whole.ema is not None
    for stop_at in (1, 5, 8):
        parts = in_two_parts(lambda: denoiser_task(denoiser_recipe(), cache), tmp_path / f"{stop_at}", stop_at)
        assert torch.equal(parts, weights(whole.task.model))
        averaged = torch.load(tmp_path / f"{stop_at}" / "state.pt", weights_only=True)["ema"]["shadow_params"]
        assert all(torch.equal(a, b) for a, b in zip(averaged, whole.ema.shadow_params, strict=True))


KILLED = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from latentline_worker.training import autoencoder, loop
from latentline_worker.training.autoencoder import AutoencoderTask
from latentline_worker.training.sources import BuiltData
from support.killing import before_anything, between_writing_and_renaming, die, in_a_step, train_and_kill, while_sampling
from support.training import autoencoder_recipe

loop.SAVE_EVERY_S = 0  # after each step
autoencoder.NUM_MEASURED = autoencoder.NUM_SHOWN = 4
data, out, whole = map(Path, sys.argv[1:])
source = BuiltData(data, 32)

def make(folder):
    return loop.Training(AutoencoderTask(autoencoder_recipe(), source), folder, lambda line: None)

def half_a_state(task, training):
    real = torch.save
    def half(payload, file):
        if payload["step"] == 4:
            file.write(b"half of a state")
            file.flush()
            die()
        real(payload, file)
    torch.save = half

train_and_kill(make, whole, out, (before_anything, in_a_step, half_a_state, between_writing_and_renaming, while_sampling))
"""


@pytest.mark.slow
def test_killed_at_five_points_the_weights_are_the_same_to_the_bit(folder: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder), str(tmp_path / "out"), str(tmp_path / "whole")],
        cwd=ROOT / "tests", capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["before_anything", "in_a_step", "half_a_state", "between_writing_and_renaming", "while_sampling"]
    killed, whole = (torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("out", "whole"))
    assert all(torch.equal(killed["model"][name], value) for name, value in whole["model"].items())
    momentum = [torch.cat([s["momentum_buffer"].flatten() for s in one["optimisers"]["muon"]["state"].values()]) for one in (killed, whole)]
    assert torch.equal(*momentum)
    steps = [[line["step"] for line in log(tmp_path / name)] for name in ("out", "whole")]
    assert steps[0] == sorted(steps[0]) and set(steps[0]) <= set(steps[1])


TOGETHER = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from latentline_worker.training import autoencoder, loop
from latentline_worker.training.autoencoder import AutoencoderTask
from latentline_worker.training.processes import processes
from latentline_worker.training.sources import BuiltData
from support.training import autoencoder_recipe

autoencoder.NUM_MEASURED = autoencoder.NUM_SHOWN = 4
data, out = map(Path, sys.argv[1:])
source = BuiltData(data, 32)
with processes(torch.device("cpu")) as rank:
    def train(name, stop_at):
        def on_step(step, loss):
            if step == stop_at and rank == 1:
                training.stopping.set()  # one process is told to stop: both do
        training = loop.Training(AutoencoderTask(autoencoder_recipe(), source), out / name, lambda line: None, on_step, rank)
        training.resume()
        done = training.run()
        torch.save((done, training.step, training.task.model.state_dict()), out / f"{name}-{stop_at}-{rank}.pt")
        torch.distributed.barrier()  # rank 0 has written the state

    train("whole", 0)
    train("parts", 3)
    train("parts", 0)
"""


@pytest.mark.slow
def test_two_processes_train_one_model_and_resume_to_the_bit(folder: Path, tmp_path: Path) -> None:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    command = [sys.executable, "-c", TOGETHER, str(folder), str(tmp_path)]
    started = [subprocess.Popen(command, cwd=ROOT / "tests", env=os.environ | address | {"RANK": str(rank)}) for rank in range(2)]
    assert [process.wait(240) for process in started] == [0, 0]
    ends = {path.stem: torch.load(path, weights_only=True) for path in tmp_path.glob("*.pt")}
    assert [ends[f"parts-3-{rank}"][:2] for rank in range(2)] == [(False, 3)] * 2
    for name in ("whole-0-0", "whole-0-1", "parts-0-0", "parts-0-1"):
        assert ends[name][:2] == (True, 8)
        assert all(torch.equal(ends[name][2][key], value) for key, value in ends["whole-0-0"][2].items())


# What is refused


def test_a_loss_that_is_no_number_ends_the_training(source: BuiltData, tmp_path: Path) -> None:
    task = AutoencoderTask(autoencoder_recipe(), source)
    real = task.loss
    task.loss = lambda step, rank: real(step, rank) * (float("nan") if step == 3 else 1)  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="the loss is nan at step 3"):
        Training(task, tmp_path, quiet).run()
    assert not (tmp_path / "autoencoder").exists()


def test_a_full_disk_ends_the_training_and_keeps_the_older_state(source: BuiltData, tmp_path: Path) -> None:
    training = Training(AutoencoderTask(autoencoder_recipe(), source), tmp_path, quiet)
    training.step = 3
    training.save()
    size = (tmp_path / "state.pt").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, before[1]))  # a write beyond it fails as one on a full disk does
    try:
        training.step = 4
        with pytest.raises(TrainingError, match=r"state\.pt: the state cannot be saved"):
            training.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 3


def test_a_log_or_sheet_that_cannot_be_written_ends_the_training(source: BuiltData, tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(TrainingError, match=r"log\.jsonl.*the last saved state is whole"):
        Training(AutoencoderTask(autoencoder_recipe(), source), tmp_path, quiet).run()


def test_states_of_another_recipe_and_damaged_ones_are_refused(source: BuiltData, tmp_path: Path) -> None:
    Training(AutoencoderTask(autoencoder_recipe(), source), tmp_path, quiet).save()
    other = dataclasses.replace(autoencoder_recipe(), moment_weight=0.5)
    with pytest.raises(TrainingError, match="belongs to another recipe: moment_weight differ"):
        Training(AutoencoderTask(other, source), tmp_path, quiet).resume()
    (tmp_path / "state.pt").write_bytes(b"PK\x03\x04 damaged")
    with pytest.raises(TrainingError, match=r"state\.pt: damaged"):
        Training(AutoencoderTask(autoencoder_recipe(), source), tmp_path, quiet).resume()
    assert state.load(tmp_path / "nothing", {}, {}) is None


def test_another_number_of_threads_is_said(source: BuiltData, tmp_path: Path) -> None:
    said: list[str] = []
    Training(AutoencoderTask(autoencoder_recipe(), source), tmp_path, quiet).save()
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    torch.save(saved | {"threads": 1000}, tmp_path / "state.pt")
    Training(AutoencoderTask(autoencoder_recipe(), source), tmp_path, said.append).resume()
    assert "1000 threads" in said[0]


def test_signals_stop_at_the_next_step_and_handlers_come_back(source: BuiltData, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def signal_at_3(step: int, loss: float) -> None:
        if step == 3:
            signal.raise_signal(signal.SIGTERM)

    training = Training(AutoencoderTask(autoencoder_recipe(), source), tmp_path, quiet, signal_at_3)
    with training.stop_on_signals():
        assert training.run() is False
    assert training.step == 3 and signal.getsignal(signal.SIGTERM) == before


def test_what_does_not_fit_into_memory_is_refused_before_it_begins(
    folder: Path, cache: LatentCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1_000_000)
    (tmp_path / "a.toml").write_text(toml(autoencoder_recipe(batch=64)))
    with pytest.raises(TrainingError, match=r"the autoencoder's training needs about .* GiB and 0\.0 GiB are free"):
        commands.autoencoder(str(tmp_path / "a.toml"), folder, commands.Run(tmp_path / "out"), quiet)
    cache.autoencoder.save_pretrained(tmp_path / "vae")
    (tmp_path / "d.toml").write_text(toml(denoiser_recipe(batch=64)))
    with pytest.raises(TrainingError, match="the denoiser's training needs about"):
        commands.denoiser(str(tmp_path / "d.toml"), folder, tmp_path / "vae", commands.Run(tmp_path / "out"), quiet)


def test_the_estimate_grows_with_the_batch() -> None:
    def kept(batch: int) -> int:
        def run() -> torch.Tensor:
            return make_model(TINY_AUTOENCODER, 0).encoder(torch.zeros(batch, 3, 32, 32)).sum()

        return memory.activation_bytes(run)

    assert kept(8) > 3 * kept(2) > 0
    assert memory.weights_bytes(torch.nn.Linear(10, 10, bias=False), ema=True) == 100 * 4 * 5


def test_parts_that_do_not_fit_each_other_are_refused(folder: Path, cache: LatentCache, tmp_path: Path) -> None:
    cache.autoencoder.save_pretrained(tmp_path / "vae")
    changes: list[tuple[dict[str, Any], str]] = [
        ({"sample_size": 4}, "sample_size must be 4, 4, 8"),
        ({"cross_attention_dim": 32, "addition_embed_type_num_heads": 4}, "states have 384"),
    ]
    for change, said in changes:
        recipe = denoiser_recipe()
        model = recipe.model | change
        (tmp_path / "d.toml").write_text(toml(dataclasses.replace(recipe, model=model)))
        with pytest.raises(TrainingError, match=said):
            commands.denoiser(str(tmp_path / "d.toml"), folder, tmp_path / "vae", commands.Run(tmp_path / "out"), quiet)


def test_logged_lines_after_the_saved_step_are_dropped(source: BuiltData, tmp_path: Path) -> None:
    training = Training(AutoencoderTask(autoencoder_recipe(), source), tmp_path, quiet)
    training.step = 4
    training.save()
    (tmp_path / "log.jsonl").write_text('{"step": 4}\n{"step": 6}\n{"step"')
    loop.Training(AutoencoderTask(autoencoder_recipe(), source), tmp_path, quiet).resume()
    assert log(tmp_path) == [{"step": 4}]
