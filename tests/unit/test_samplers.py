"""Compiled tables against the diffusers schedulers they were read from."""

from __future__ import annotations

import copy
import inspect
import sys
import threading
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    CogVideoXDPMScheduler,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    KarrasVeScheduler,
)

from latentline.jobs import SCHEDULERS
from latentline_worker.samplers import MAX_ORDER, CompileError, SamplerTable, compile_scheduler, make_scheduler, sampler_table
from latentline_worker.samplers.compile import residual
from latentline_worker.samplers.presets import FLOW_PRESETS, PRESETS
from latentline_worker.samplers.trajectory import Grid

SD15 = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
BUNDLED = {
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
}


def test_presets_are_the_contracts_schedulers() -> None:
    assert tuple(PRESETS) == SCHEDULERS


@pytest.mark.parametrize("config", [SD15, BUNDLED], ids=["sd15", "bundled"])
@pytest.mark.parametrize("steps", [1, 2, 5, 20, 50])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_table_follows_the_scheduler(name: str, steps: int, config: dict[str, Any]) -> None:
    """A trajectory with a network that depends on the latents, as a real one does."""
    table = sampler_table(name, config, steps)
    scheduler = make_scheduler(name, config)
    scheduler.set_timesteps(steps)
    first = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)) * scheduler.init_noise_sigma
    assert table.init == pytest.approx((0.0, float(scheduler.init_noise_sigma)))
    assert table.renoise is None

    def network(x: torch.Tensor, t: float) -> torch.Tensor:
        return torch.sin(x) + x.flip(-1) * 0.3 + t / 1000

    x, noise = first.clone(), torch.Generator().manual_seed(2)
    given = {"generator": noise, "eta": 0.0}  # as diffusers' pipelines do
    extra = {key: given[key] for key in inspect.signature(scheduler.step).parameters if key in given}
    for t in scheduler.timesteps:
        m = network(scheduler.scale_model_input(x, t), float(t))
        x = scheduler.step(m, t, x, return_dict=False, **extra)[0]

    noise = torch.Generator().manual_seed(2)
    xs, ms = [first.double()], []
    for n in range(table.num_steps):
        ms.insert(0, network(xs[0] * table.input_scale[n], table.timesteps[n]))
        a, b, c = np.split(table.coefficients[n], [MAX_ORDER, 2 * MAX_ORDER])
        new = sum(a[j] * xs[j] + b[j] * ms[j] for j in range(min(MAX_ORDER, n + 1)))
        if table.draws[n]:
            new = new + c[0] * torch.randn(first.shape, generator=noise)
        xs.insert(0, new)
    assert (xs[0] - x).abs().max() <= 1e-4 * x.abs().max()


EXACT = 1e-6  # relative: of a table against its scheduler in float64; schedulers that hold their sigmas in float32 leave 3e-7
FLOW = {"prediction_type": "flow_prediction", "num_train_timesteps": 1000, "shift": 3.0}
BY_SIZE = {**FLOW, "use_dynamic_shifting": True}  # Flux
STEPS = 12
SIGMAS = tuple(np.linspace(1, 1 / STEPS, STEPS))
# Shapes of the noise levels that FlowMatchEulerDiscreteScheduler can be configured to.
SHAPES: dict[str, dict[str, Any]] = {
    "terminal": {"shift_terminal": 0.02},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "stochastic": {"stochastic_sampling": True},
    "inverted": {"invert_sigmas": True},
}


def difference(scheduler: Any, **how: Any) -> float:
    """Of the compiled table from its scheduler, on random inputs."""
    table = compile_scheduler(scheduler, STEPS, **how)
    return residual(copy.deepcopy(scheduler), Grid(STEPS, **how), table)


@pytest.mark.parametrize("start", [None, 0, 5])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_name_compiles_from_any_step(name: str, start: int | None) -> None:
    assert difference(make_scheduler(name, SD15), start=start) <= EXACT


@pytest.mark.parametrize(
    ("config", "how"),
    [(FLOW, {}), (FLOW, {"start": 5}), (BY_SIZE, {"mu": 0.9}), (BY_SIZE, {"mu": 0.9, "sigmas": SIGMAS})],
    ids=["flow", "from the middle", "by size", "by size, with noise levels"],
)
@pytest.mark.parametrize("name", FLOW_PRESETS)
def test_every_name_of_flow_matching_compiles(name: str, config: dict[str, Any], how: dict[str, Any]) -> None:
    refused = {("heun", "mu"): "cannot shift|takes no noise levels", ("sa_solver", "start"): "adds other noise"}
    reason = next((text for (other, option), text in refused.items() if other == name and option in how), None)
    if reason is None:
        assert difference(make_scheduler(name, config), **how) <= EXACT
    else:
        with pytest.raises(CompileError, match=reason):
            sampler_table(name, config, STEPS, **how)


@pytest.mark.parametrize("start", [None, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_flow_matchings_noise_levels_compiles(shape: str, start: int | None) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, **SHAPES[shape])
    assert difference(scheduler, start=start) <= EXACT


@pytest.mark.parametrize("config", [SD15, FLOW], ids=["sd15", "flow"])
def test_a_start_in_the_middle_is_as_noisy_as_the_pipelines(config: dict[str, Any]) -> None:
    """What img2img pipelines do: timesteps and begin index from `start` on, and add_noise for the first of them."""
    start = 5
    for name in FLOW_PRESETS if config is FLOW else PRESETS:
        if (config, name) == (FLOW, "sa_solver"):
            continue
        table, scheduler = sampler_table(name, config, STEPS, start=start), make_scheduler(name, config)
        scheduler.set_timesteps(STEPS)
        scheduler.set_begin_index(start * scheduler.order) if hasattr(scheduler, "set_begin_index") else None
        timesteps = scheduler.timesteps[start * scheduler.order :]
        original, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        noisy = scheduler.scale_noise if hasattr(scheduler, "scale_noise") else None
        first = noisy(original, timesteps[:1], noise) if noisy else scheduler.add_noise(original, noise, timesteps[:1])
        assert torch.allclose(table.init[0] * original + table.init[1] * noise, first.double(), atol=1e-6), name
        assert np.allclose(table.timesteps, timesteps.double().numpy()), name
        assert table.renoise is not None and table.renoise.shape == (table.num_steps, 2), name
        assert tuple(table.renoise[-1]) == (1.0, 0.0), name
        assert (np.diff(table.renoise[:, 1] / np.maximum(table.renoise[:, 0], 1e-9)) <= 1e-6).all(), f"{name}: noise must shrink"


def test_the_shift_of_a_size_is_in_the_digest() -> None:
    tables = [sampler_table("euler", BY_SIZE, 4, mu=mu, sigmas=(1, 0.75, 0.5, 0.25)) for mu in (0.5, 1.15)]
    assert tables[0].digest != tables[1].digest
    assert sampler_table("ddim", SD15, 8, start=2).digest != sampler_table("ddim", SD15, 8).digest


def test_names_without_a_meaning_for_flow_matching_are_refused_with_those_that_have_one() -> None:
    assert set(FLOW_PRESETS) < set(PRESETS)
    for name in set(PRESETS) - set(FLOW_PRESETS):
        with pytest.raises(CompileError, match=f"'{name}' has no meaning for a model of flow matching; known: euler, heun, dpmpp_2m, "):
            make_scheduler(name, FLOW)


def test_flow_previews_are_read_along_straight_paths() -> None:
    """With a network that knows noise and picture, every call points to the same clean latents."""
    clean, noise = np.linspace(-1, 1, 5), np.linspace(2, -2, 5)
    table = sampler_table("euler", FLOW, 10)
    for n, t in enumerate(table.timesteps):
        sigma = t / 1000
        seen = (1 - sigma) * clean + sigma * noise
        assert np.allclose(table.denoised[n, 0] * seen + table.denoised[n, 1] * (noise - clean), clean)


def test_a_start_after_the_last_step_is_refused() -> None:
    with pytest.raises(CompileError, match="no step is left from step 12 of 12"):
        sampler_table("ddim", SD15, STEPS, start=STEPS)


def test_clipping_is_refused_by_name() -> None:
    with pytest.raises(CompileError, match="clip_sample=True"):
        sampler_table("ddim", {**SD15, "clip_sample": True}, 10)


def test_thresholding_is_refused_by_name() -> None:
    with pytest.raises(CompileError, match="thresholding=True"):
        sampler_table("unipc", {**SD15, "thresholding": True}, 10)


def test_a_scheduler_that_is_not_linear_is_found_out() -> None:
    class Clamped(DDIMScheduler):
        def step(self, m: torch.Tensor, t: int, x: torch.Tensor, **options: Any) -> tuple[torch.Tensor]:
            return (super().step(m, t, x, **options)[0].clamp(-2, 2),)

    scheduler = Clamped(**SD15, clip_sample=False)
    with pytest.raises(CompileError, match="not linear"):
        compile_scheduler(scheduler, 5)


def test_a_step_count_the_scheduler_refuses() -> None:
    with pytest.raises(CompileError, match="refuses 2000 steps"):
        sampler_table("ddim", SD15, 2000)


@pytest.mark.parametrize(
    "scheduler",
    [CMStochasticIterativeScheduler(), CogVideoXDPMScheduler(), KarrasVeScheduler()],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_other_schedulers_are_refused_with_a_reason(scheduler: Any) -> None:
    with pytest.raises(CompileError, match=type(scheduler).__name__):
        compile_scheduler(scheduler, 5)


def test_clean_latents_are_read_off_the_network(config: dict[str, Any] = SD15) -> None:
    """With a network that knows the noise, every call points to the same clean latents."""
    table = sampler_table("euler", config, 10)
    alpha_bar = make_scheduler("ddim", config).alphas_cumprod.double().numpy()
    clean, noise = np.linspace(-1, 1, 5), np.linspace(2, -2, 5)
    for n, t in enumerate(table.timesteps):
        a = np.interp(t, np.arange(1000), alpha_bar)
        seen = np.sqrt(a) * clean + np.sqrt(1 - a) * noise
        assert np.allclose(table.denoised[n, 0] * seen + table.denoised[n, 1] * noise, clean)


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(CompileError, match="'heun3' is not a known scheduler; known: ddim, ddpm"):
        make_scheduler("heun3", SD15)


def test_a_scheduler_that_draws_twice_a_step_is_refused() -> None:
    """The table has one place for noise a step: the second draw would silently be the first one again."""

    class Twice(EulerAncestralDiscreteScheduler):
        def step(self, m: torch.Tensor, t: int, x: torch.Tensor, **options: Any) -> tuple[torch.Tensor]:
            more = sys.modules[type(self).__module__].randn_tensor(x.shape)
            return (super().step(m, t, x, **options)[0] + 0.1 * more,)

    # The noise source of the module in which the class stands is replaced while the scheduler is read.
    scheduler = Twice(**SD15)
    with (
        mock.patch.object(Twice, "__module__", EulerAncestralDiscreteScheduler.__module__),
        pytest.raises(CompileError, match="more than once"),
    ):
        compile_scheduler(scheduler, 5)


def test_compiling_leaves_the_scheduler_as_it_was() -> None:
    scheduler = make_scheduler("dpmpp_2m", SD15)
    scheduler.set_timesteps(7)
    scheduler.step(torch.zeros(1, 4, 2, 2), scheduler.timesteps[0], torch.ones(1, 4, 2, 2))
    before = copy.deepcopy(vars(scheduler))
    compile_scheduler(scheduler, 5)
    assert vars(scheduler).keys() == before.keys()
    for name, value in before.items():
        now = vars(scheduler)[name]
        if isinstance(value, torch.Tensor):
            assert torch.equal(now, value), name
        elif name == "model_outputs":
            assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(now, value, strict=True))
        elif not isinstance(value, np.ndarray):
            assert now == value, name


def test_two_threads_can_compile_at_once() -> None:
    """Reading a scheduler replaces its module's noise source, for the whole process: one reading must end before the next begins."""
    module = sys.modules[EulerAncestralDiscreteScheduler.__module__]
    original, expected = module.randn_tensor, compile_scheduler(make_scheduler("euler_ancestral", SD15), 4)
    inside, go_on, other_began = threading.Event(), threading.Event(), threading.Event()

    class Slow(EulerAncestralDiscreteScheduler):
        def step(self, *args: Any, **options: Any) -> Any:
            inside.set()
            assert go_on.wait(60)
            return super().step(*args, **options)

    class Watched(EulerAncestralDiscreteScheduler):
        def step(self, *args: Any, **options: Any) -> Any:
            other_began.set()
            return super().step(*args, **options)

    Slow.__module__ = Watched.__module__ = module.__name__
    tables: dict[str, SamplerTable] = {}

    def compile_it(cls: type) -> None:
        tables[cls.__name__] = compile_scheduler(cls(**SD15), 4)

    slow, watched = (threading.Thread(target=compile_it, args=(cls,)) for cls in (Slow, Watched))
    slow.start()
    assert inside.wait(60)
    watched.start()
    assert not other_began.wait(0.3), "the second reading began while the first one's noise source was in place"
    go_on.set()
    slow.join()
    watched.join()
    assert module.randn_tensor is original
    for table in tables.values():
        assert np.array_equal(table.coefficients, expected.coefficients) and np.array_equal(table.draws, expected.draws)
    assert tables.keys() == {"Slow", "Watched"}


def test_the_noise_source_is_put_back_after_a_refusal() -> None:
    module = sys.modules[DDIMScheduler.__module__]
    original = module.randn_tensor

    class Broken(DDIMScheduler):
        def step(self, *args: Any, **options: Any) -> Any:
            raise ValueError("no")

    Broken.__module__ = module.__name__
    with pytest.raises(CompileError, match="Broken refuses 5 steps: no"):
        compile_scheduler(Broken(**SD15, clip_sample=False), 5)
    assert module.randn_tensor is original


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_clean_latents_are_read_off_every_kind_of_output(kind: str) -> None:
    """With an output that knows clean latents and noise, the table gives the clean latents back: what previews show."""
    config = {**SD15, "prediction_type": kind}
    table = sampler_table("ddim", config, 10)
    alpha_bar = make_scheduler("ddim", config).alphas_cumprod.double().numpy()
    clean, noise = np.linspace(-1, 1, 5), np.linspace(2, -2, 5)
    for n, t in enumerate(table.timesteps):
        signal, spread = np.sqrt(alpha_bar[int(t)]), np.sqrt(1 - alpha_bar[int(t)])
        output = {"epsilon": noise, "v_prediction": signal * noise - spread * clean, "sample": clean}[kind]
        seen = signal * clean + spread * noise
        assert np.allclose(table.denoised[n, 0] * seen + table.denoised[n, 1] * output, clean)
