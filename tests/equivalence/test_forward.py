"""A recorded or captured forward gives the same results as the one run through Python."""

from __future__ import annotations

import logging

import pytest
import torch
from support.engines import (
    Denoise,
    counted,
    embeds,
    once,
)

from latentline_worker.engine.network import Network
from latentline_worker.models.base import Row
from latentline_worker.models.sd import StableDiffusion


def example_rows(family: StableDiffusion, count: int, size: tuple[int, int] = (32, 32)) -> tuple[torch.Tensor, torch.Tensor, Row]:
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, *family.latent_shape(*size), generator=generator)
    return x, torch.linspace(10, 900, count), {"prompt_embeds": embeds(family, *[f"thing {i}" for i in range(count)])}


@torch.inference_mode()
def test_the_recorded_forward_gives_equal_results_at_other_row_counts_and_sizes(
    family: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager = family.denoise
    calls = counted(family, monkeypatch)
    traced = Network(family)
    traced.trace(*example_rows(family, 2))
    del calls[:]
    for count, size in [(2, (32, 32)), (1, (32, 32)), (5, (48, 40)), (8, (32, 32)), (2, (32, 32)), (3, (64, 64))] * 2:
        rows = example_rows(family, count, size)
        assert torch.equal(traced(*rows)[0], eager(*rows))
    assert not calls, "Python was called: the recording is not in use"


@pytest.mark.parametrize("error", [RuntimeError, TypeError])
@torch.inference_mode()
@once
def test_a_forward_that_cannot_be_recorded_runs_through_python_with_a_warning(
    family: StableDiffusion, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: type[Exception]
) -> None:
    real = family.denoise

    def change(latents: torch.Tensor, timesteps: torch.Tensor, rows: Row) -> torch.Tensor:
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            raise error("not while tracing")
        return real(latents, timesteps, rows)

    assert_falls_back(family, monkeypatch, caplog, change, f"cannot be recorded ({error.__name__})")


@torch.inference_mode()
@once
def test_a_recording_that_gives_other_results_is_not_used(
    family: StableDiffusion, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = family.denoise

    def change(latents: torch.Tensor, timesteps: torch.Tensor, rows: Row) -> torch.Tensor:
        factor = 2.0 if int(latents.shape[0]) == 2 else 1.0  # decided while recording
        return real(latents, timesteps, rows) * factor

    assert_falls_back(family, monkeypatch, caplog, change, "gives other results")


def assert_falls_back(
    family: StableDiffusion, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, change: Denoise, message: str
) -> None:
    calls = counted(family, monkeypatch, change)
    net = Network(family)
    with caplog.at_level(logging.WARNING):
        net.trace(*example_rows(family, 2))
    assert message in caplog.text
    del calls[:]
    rows = example_rows(family, 5)
    assert torch.equal(net(*rows)[0], change(*rows))
    assert calls == [5]
