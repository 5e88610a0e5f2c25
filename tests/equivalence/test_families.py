"""What every family has to hold, run by each; and what the engine does with several models, and with rows that are wrong."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.engines import FIXED_ROWS, drain, make_engine, once, run, snapshot, solo, work
from support.families import OddFamily
from support.tiny_families import TINY

from latentline.errors import ModelError, NumericalError
from latentline_worker.engine.checkpoint import Checkpoint
from latentline_worker.engine.engine import Engine
from latentline_worker.engine.rows import common_signature, signature_of
from latentline_worker.models.base import Family, Row
from latentline_worker.models.registry import FAMILIES
from latentline_worker.models.sd import StableDiffusion

SIZE = (64, 48)


@pytest.fixture(params=["Stable Diffusion", "odd", *(name for name in TINY if name != "sd-flow")])
def any_family(request: pytest.FixtureRequest, family: StableDiffusion) -> Family:
    if request.param in TINY:
        pipeline = TINY[request.param]()
        made: Family = FAMILIES[type(pipeline).__name__](request.param, pipeline, torch.device("cpu"), torch.float32)
        made.info = made.info.model_copy(update={"default_width": SIZE[0], "default_height": SIZE[1]})
        return made
    return OddFamily() if request.param == "odd" else family


def rows_of(family: Family, prompt: str, guidance: float = 5.0) -> list[Row]:
    made = work(family, prompt, guidance=guidance, size=SIZE)
    return family.rows(made.request, family.encode(made.texts))


def batch_of(family: Family, count: int) -> tuple[torch.Tensor, torch.Tensor, Row]:
    """Inputs of the network that differ from row to row."""
    x = torch.randn(count, *family.latent_shape(*SIZE), generator=torch.Generator().manual_seed(0))
    rows = [rows_of(family, f"thing {i}", 0.0)[0] for i in range(count)]
    return x, torch.linspace(10, 900, count), {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@once
def test_branches_and_sizes_are_those_announced(any_family: Family) -> None:
    info = any_family.info
    for guidance in (0.0, 0.5, 1.0, 1.5, 7.0):
        texts = work(any_family, guidance=guidance, size=SIZE).texts
        assert len(texts) == info.rows(guidance)
        assert texts == work(any_family, guidance=guidance, size=SIZE).texts, "equal requests have equal texts: they are cached by them"
    latents = torch.empty(1, *any_family.latent_shape(*SIZE))
    assert any_family.num_pixels(latents) == SIZE[0] * SIZE[1]
    assert any_family.revision


@once
def test_every_branch_and_every_text_has_rows_of_one_signature(any_family: Family) -> None:
    """But for a few lengths to which a family pads its texts: short ones share one, and both branches of a job."""
    branches = rows_of(any_family, "a cat")
    expected = common_signature("model", branches, any_family.info.rows_guided)
    for prompt in ("", "thing " * 5, "é\u3042"):
        assert {signature_of(row) for row in rows_of(any_family, prompt)} == {expected}
    long = common_signature("model", rows_of(any_family, "thing " * 300), any_family.info.rows_guided)
    assert [(name, dtype) for name, _, dtype in long] == [(name, dtype) for name, _, dtype in expected]
    assert long == expected or any_family.info.family in ("z-image", "qwen-image")


@once
@torch.inference_mode()
def test_texts_encoded_together_equal_those_encoded_alone(any_family: Family) -> None:
    texts = [text for prompt in ("a cat", "", "a much longer text") for text in work(any_family, prompt, size=SIZE).texts]
    for text, together in zip(texts, any_family.encode(texts), strict=True):
        (alone,) = any_family.encode([text])
        assert alone.tokens == together.tokens
        assert signature_of(alone.row) == signature_of(together.row)
        for name, tensor in alone.row.items():
            assert torch.allclose(tensor.float(), together.row[name].float(), atol=1e-5), name


@once
def test_an_image_starts_from_noise_of_its_own_generator(any_family: Family) -> None:
    request = work(any_family, seeds=(1, 2), size=SIZE).request
    first, again = (any_family.start(request, 0, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, again) and first.device.type == "cpu"
    assert tuple(first.shape) == any_family.latent_shape(*SIZE)
    assert not torch.equal(first, any_family.start(request, 0, torch.Generator().manual_seed(6)))


@once
@torch.inference_mode()
def test_a_row_is_denoised_by_its_own_timestep_and_conditions(any_family: Family) -> None:
    x, t, rows = batch_of(any_family, 4)
    kept = x.clone(), t.clone(), {name: tensor.clone() for name, tensor in rows.items()}
    out = any_family.denoise(x, t, rows)
    assert out.shape == x.shape
    for i in range(4):
        alone = any_family.denoise(x[i : i + 1], t[i : i + 1], {name: tensor[i : i + 1] for name, tensor in rows.items()})
        assert torch.allclose(out[i], alone[0], atol=1e-4 * float(out.abs().max()))
    assert torch.equal(x, kept[0]) and torch.equal(t, kept[1]), "inputs must not be changed: a step may be tried again"
    assert all(torch.equal(tensor, kept[2][name]) for name, tensor in rows.items())


@once
def test_every_announced_scheduler_compiles(any_family: Family) -> None:
    for name in any_family.info.schedulers:
        assert work(any_family, scheduler=name, size=SIZE).table.num_steps >= 4


@once
@torch.inference_mode()
def test_guidance_is_of_each_image_alone(any_family: Family) -> None:
    shape = any_family.latent_shape(*SIZE)
    cond, uncond = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(1))
    scale = torch.tensor([1.5, 4.0, 9.0]).view(-1, 1, 1, 1)
    out = any_family.guide(cond, uncond, scale)
    assert out.shape == cond.shape
    for i in range(3):
        assert torch.equal(out[i], any_family.guide(cond[i : i + 1], uncond[i : i + 1], scale[i : i + 1])[0])


@once
@torch.inference_mode()
def test_pixels_have_the_size_asked_for(any_family: Family) -> None:
    latents = torch.randn(2, *any_family.latent_shape(*SIZE), generator=torch.Generator().manual_seed(1))
    pixels = any_family.decode(latents, tiled=False)
    assert (tuple(pixels.shape), pixels.dtype) == ((2, SIZE[1], SIZE[0], 3), torch.uint8)


@once
def test_a_job_is_bit_identical_in_any_company_and_when_resumed(any_family: Family) -> None:
    subject = work(any_family, "a cat", "dpmpp_2m", 6, 3.0, (4, 5), SIZE)
    expected = solo(any_family, subject, fixed_rows=FIXED_ROWS)
    engine = make_engine(any_family, fixed_rows=FIXED_ROWS)
    engine.warm_up()
    stochastic = "euler_ancestral" if "euler_ancestral" in any_family.info.schedulers else "lcm"
    engine.submit(work(any_family, "mate", stochastic, 8, 0.0, (9,), SIZE))
    request = engine.submit(subject)
    while request.step < 3:
        engine.step()
    data = snapshot(engine, request).to_bytes(subject)
    drain(engine)
    assert request.shared_steps > 0, "it ran alone: the test shows nothing"
    assert torch.equal(request.result(0), expected)
    resumed = dataclasses.replace(subject, resume=Checkpoint.from_bytes(data, subject))
    assert resumed.resume is not None
    assert torch.equal(solo(any_family, resumed, fixed_rows=FIXED_ROWS), expected)


def test_every_part_of_an_odd_row_changes_the_picture() -> None:
    """Else the tests with that family would show nothing."""
    odd = OddFamily()
    with torch.inference_mode():
        x, t, rows = batch_of(odd, 2)
        before = odd.denoise(x, t, rows)
        for name, tensor in rows.items():
            changed = {**rows, name: ~tensor if tensor.dtype == torch.bool else tensor + 1}
            assert not torch.equal(odd.denoise(x, t, changed), before), name


@pytest.fixture
def both(family: StableDiffusion) -> Engine:
    return make_engine(family, OddFamily(), OddFamily("other"), max_rows=8)


@once
def test_one_engine_runs_jobs_of_several_models(family: StableDiffusion, both: Engine) -> None:
    both.warm_up()
    odd, other = both.families["odd"], both.families["other"]
    works = [work(one, "a cat", "ddim", 5, 2.0, (i,), (64, 64), decode=i % 2 == 0) for i in range(2) for one in (family, odd, other)]
    expected = [solo(both.families[one.model], one) for one in works]
    requests = run(both, *works)
    for request, picture in zip(requests, expected, strict=True):
        assert torch.allclose(request.result(0).float(), picture.float(), atol=1e-4)
    assert {key.model for key in both.lanes} == {"tiny", "odd", "other"}, "equal rows of two models must not share a lane"
    assert all(request.shared_steps > 0 for request in requests)


@once
def test_a_job_of_a_model_that_is_not_loaded_fails_with_the_list(family: StableDiffusion) -> None:
    engine = make_engine(family)
    request = engine.submit(work(OddFamily()))
    with pytest.raises(ModelError, match="odd: not loaded; loaded: tiny"):
        request.result(0)
    assert engine.idle


@once
def test_a_scheduler_configuration_that_no_recurrence_explains_fails_the_start_with_a_sentence(family: StableDiffusion) -> None:
    family.scheduler_config = {**family.scheduler_config, "thresholding": True}
    with pytest.raises(ModelError, match=r"tiny: its scheduler configuration cannot be used: .*set thresholding=False"):
        make_engine(family).warm_up()


class Uneven(OddFamily):
    """Its branches differ for the prompt "uneven", and one is missing for the prompt "missing"."""

    def rows(self, request, encoded):  # type: ignore[no-untyped-def]
        rows = super().rows(request, encoded)
        if request.prompt == "uneven":
            rows[-1] = {**rows[-1], "Z": rows[-1]["Z"][:4]}
        return rows[:1] if request.prompt == "missing" else rows


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ("uneven", r"odd gave guidance branches of different rows: .*Z 5 int64.* and .*Z 4 int64"),
        ("missing", "odd gave 1 rows for 2 guidance branches; allowed: one for each, at most 2"),
    ],
)
def test_rows_that_no_batch_can_hold_fail_their_job_with_a_sentence(prompt: str, sentence: str) -> None:
    engine = make_engine(Uneven())
    family = engine.families["odd"]
    bad, *good = run(engine, *[work(family, name, size=SIZE) for name in (prompt, "a", "b")])
    with pytest.raises(ModelError, match=sentence):
        bad.result(0)
    for request in good:
        assert torch.isfinite(request.result(0)).all()


@pytest.mark.parametrize("name", ["0.pooled", "size"])
@pytest.mark.parametrize("branch", [0, 1])
def test_nan_in_any_tensor_of_a_row_fails_its_job_alone_and_early(name: str, branch: int) -> None:
    class Broken(OddFamily):
        def rows(self, request, encoded):  # type: ignore[no-untyped-def]
            rows = super().rows(request, encoded)
            if request.prompt == "bad":
                rows[branch] = {**rows[branch], name: rows[branch][name] * float("nan")}
            return rows

    family = Broken()
    engine = make_engine(family, fixed_rows=FIXED_ROWS)
    bad, good = run(engine, work(family, "bad", steps=9, size=SIZE), work(family, "good", steps=9, size=SIZE))
    with pytest.raises(NumericalError, match=f"{name} of odd: not a number"):
        bad.result(0)
    assert bad.step <= 1, "it was denoised although nothing can come of it"
    assert torch.equal(good.result(0), solo(family, work(family, "good", steps=9, size=SIZE), fixed_rows=FIXED_ROWS))
