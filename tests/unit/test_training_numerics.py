"""Muon, the learning rate, the objectives and the losses of training."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from support.training import denoiser_recipe, schedule

from latentline_worker.training.autoencoder import moment_penalty, psnr_db, reconstruction_loss
from latentline_worker.training.muon import Muon, orthogonalise, suits_muon
from latentline_worker.training.objectives import draw_times, make_scheduler, noised
from latentline_worker.training.optimisers import FINAL_SHARE, Optimisers, rate_share
from latentline_worker.training.recipe import PREDICTIONS
from latentline_worker.training.seeds import python_random, torch_random

# Muon


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 0.05), (torch.bfloat16, 0.12)])
@pytest.mark.parametrize("shape", [(24, 48), (48, 24), (32, 32)])
def test_muon_takes_the_steps_of_torch(shape: tuple[int, int], dtype: torch.dtype, share: float) -> None:
    """torch's iterates in bf16 (8 bits), so the two agree to a few hundredths of an update after five; twice that where both round."""
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.full(shape, 0.1)) for _ in range(2))
    a = Muon([ours], lr=0.01, weight_decay=0.1, dtype=dtype)
    b = torch.optim.Muon([theirs], lr=0.01, weight_decay=0.1, momentum=0.95, nesterov=True)
    for _ in range(5):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        before = ours.detach().clone()
        a.step()
        b.step()
    update = (ours - before).norm().item()
    assert (ours - theirs).norm().item() < share * update


def test_muon_flattens_convolutions() -> None:
    torch.manual_seed(0)
    kernel, matrix = torch.nn.Parameter(torch.zeros(16, 16, 3, 3)), torch.nn.Parameter(torch.zeros(16, 144))
    gradient = torch.randn(16, 144)
    kernel.grad, matrix.grad = gradient.view(16, 16, 3, 3), gradient.clone()
    for p in (kernel, matrix):
        Muon([p]).step()
    assert torch.equal(kernel.view(16, 144), matrix) and matrix.abs().sum() > 0


def test_orthogonalising_brings_singular_values_near_to_one() -> None:
    values = torch.linalg.svdvals(orthogonalise(torch.randn(32, 64, generator=torch.Generator().manual_seed(0))))
    assert values.min() > 0.6 and values.max() < 1.3
    assert torch.isfinite(orthogonalise(torch.zeros(16, 16))).all()


def test_small_and_flat_weights_stay_with_adamw() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.Conv2d(16, 16, 3), torch.nn.Conv2d(16, 4, 3))
    assert [suits_muon(p) for p in model.parameters()] == [True, False, True, False, False, False]
    both = Optimisers(model, schedule(muon_learning_rate=0.01))
    assert {name: len(part.param_groups[0]["params"]) for name, (part, _) in both.parts.items()} == {"adamw": 4, "muon": 2}
    assert list(Optimisers(model, schedule()).parts) == ["adamw"]


# The learning rate


def test_the_learning_rate_follows_steps() -> None:
    made = schedule(steps=100, warmup_steps=10)
    shares = [rate_share(step, made) for step in range(101)]
    assert shares[0] == pytest.approx(0.1) and max(shares) == pytest.approx(shares[9], abs=1e-9)
    assert shares[100] == pytest.approx(FINAL_SHARE)
    assert all(a > b for a, b in itertools.pairwise(shares[10:]))


def test_fresh_optimisers_in_the_middle_warm_up_again() -> None:
    made = schedule(steps=100, warmup_steps=10)
    assert rate_share(50, made, start=50) == pytest.approx(0.1 * rate_share(50, made))
    assert rate_share(60, made, start=50) == rate_share(60, made)


# Random numbers


def test_random_numbers_depend_on_seed_step_rank_and_purpose() -> None:
    places = [(0, 0, 0, "noise"), (1, 0, 0, "noise"), (0, 1, 0, "noise"), (0, 0, 1, "noise"), (0, 0, 0, "pictures")]
    assert len({python_random(*place).random() for place in places}) == len(places)
    assert len({torch.rand((), generator=torch_random(*place)).item() for place in places}) == len(places)
    assert python_random(*places[0]).random() == python_random(*places[0]).random()


# Objectives


def draws() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, e = (torch.randn(4, 4, 8, 8, generator=generator) for _ in range(2))
    return x0, e, torch.tensor([0.05, 0.3, 0.6, 0.95])


def test_rectified_flow_is_the_straight_line_to_noise() -> None:
    x0, e, u = draws()
    x, t, target = noised("flow", x0, e, u)
    s = u.view(-1, 1, 1, 1)
    torch.testing.assert_close(x - s * target, x0)
    torch.testing.assert_close(x + (1 - s) * target, e)
    torch.testing.assert_close(t, 1000 * u)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_network_is_sampled_back_to_the_picture(prediction: str) -> None:
    """The target of training and the scheduler of sampling mean the same thing."""
    x0, e, _ = draws()
    scheduler = make_scheduler(prediction)
    scheduler.set_timesteps(10)
    z = e
    for t in scheduler.timesteps:
        u = torch.full((4,), float(t) / 1000)
        x, _, _ = noised(prediction, torch.zeros_like(x0), torch.ones_like(x0), u)
        signal, _, _ = noised(prediction, torch.ones_like(x0), torch.zeros_like(x0), u)
        noise = (z - signal * x0) / x
        _, _, target = noised(prediction, x0, noise, u)
        z = scheduler.step(target, t, z).prev_sample
    assert (z - x0).abs().max() < 0.02


def test_the_density_moves_with_the_training() -> None:
    recipe = denoiser_recipe()
    object.__setattr__(recipe, "density_mean", [1.0, 0.3])
    object.__setattr__(recipe, "density_until", [0.5, 1.0])
    early, late = (draw_times(recipe, step, 4000, torch.Generator().manual_seed(0)) for step in (0, 7))
    assert early.median().item() == pytest.approx(1 / (1 + math.exp(-1.0)), abs=0.02)
    assert late.median().item() == pytest.approx(1 / (1 + math.exp(-0.3)), abs=0.02)
    assert early.min() > 0 and early.max() < 1


# Losses


def test_reconstruction_counts_colour_and_edges() -> None:
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert reconstruction_loss(x, x) == 0
    assert reconstruction_loss(x + 0.1, x).item() == pytest.approx(0.2, rel=1e-4)  # pixels and low-pass; no edge moved
    assert psnr_db(x + 0.2, x.clamp(-1, 0.8)).shape == (2,)
    assert psnr_db(torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 0.2)).item() == pytest.approx(20.0, abs=1e-4)


def test_the_moment_penalty_wants_mean_zero_and_deviation_one() -> None:
    z = torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    assert moment_penalty(z) < 0.01
    assert moment_penalty(z + 1).item() == pytest.approx(1.0, abs=0.1)
    assert moment_penalty(3 * z).item() == pytest.approx(4.0, abs=0.2)
