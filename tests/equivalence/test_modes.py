"""Same seed, same picture: the reproducible mode, half precision, and jobs resumed from a checkpoint."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from support.engines import (
    FIXED_ROWS,
    assert_close,
    drain,
    make_engine,
    mates_of,
    once,
    psnr_db,
    run,
    snapshot,
    solo,
    work,
)

from latentline_worker.engine.checkpoint import Checkpoint
from latentline_worker.engine.engine import Engine
from latentline_worker.engine.request import Request, Work
from latentline_worker.models.base import Row
from latentline_worker.models.sd import StableDiffusion

# Bfloat16 has 8 bits of mantissa, and a batch may sum in another order. Measured with torch 2.13.0 on an x86-64 CPU: the
# pictures below are at worst 62.6 dB from their solo runs; among more and longer mates it was 55.4 dB. The bound leaves
# 10 dB below that for other CPUs' kernels.
HALF_PSNR_DB = 45.0


@pytest.fixture
def half(pipeline: StableDiffusionPipeline) -> StableDiffusion:
    return StableDiffusion(
        "tiny",
        vae=copy.deepcopy(pipeline.vae),
        unet=copy.deepcopy(pipeline.unet),
        text_encoder=copy.deepcopy(pipeline.text_encoder),
        tokenizer=pipeline.tokenizer,
        scheduler_config=dict(pipeline.scheduler.config),
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
    )


SUBJECTS: list[dict[str, Any]] = [
    {"scheduler": "dpmpp_2m", "steps": 9, "guidance": 6.0, "seeds": (42,)},
    {"scheduler": "euler_ancestral", "steps": 7, "guidance": 1.0, "seeds": (42, 43, 44)},
    {"scheduler": "unipc", "steps": 6, "guidance": 3.0, "seeds": (1, 2, 3, 4, 5)},  # ten rows: more than are fixed
    {"scheduler": "lcm", "steps": 4, "guidance": 2.0, "seeds": (7, 8), "size": (48, 40)},
]


def variants(family: StableDiffusion, subject: Work, make: Callable[[], Engine], seeds: tuple[int, ...] = (0,)) -> dict[str, Request]:
    """The subject alone, among unlike jobs, late, and with the same jobs in another order."""
    found = {"alone": run(make(), subject)[0]}
    for seed in seeds:
        mates = mates_of(family, seed, decode=subject.decode)
        found[f"first of {seed}"] = run(make(), subject, *mates)[0]
        found[f"last of {seed}"] = run(make(), *mates[::-1], subject)[-1]
        engine = make()
        others = [engine.submit(mate) for mate in mates[:3]]
        for _ in range(2):
            engine.step()
        late = engine.submit(subject)
        engine.step()
        others += [engine.submit(mate) for mate in mates[3:]]
        drain(engine)
        assert all(other.future.done() for other in others)
        found[f"late among {seed}"] = late
    return found


@pytest.mark.parametrize("decode", [False, True], ids=["latents", "pixels"])
@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: str(subject["scheduler"]))
@once
def test_in_the_reproducible_mode_a_job_is_bit_identical_in_any_company(
    family: StableDiffusion, subject: dict[str, Any], decode: bool
) -> None:
    found = variants(family, work(family, **subject, decode=decode), lambda: make_engine(family, fixed_rows=FIXED_ROWS), (0, 1))
    expected = found["alone"].result(0)
    assert expected.dtype == (torch.uint8 if decode else torch.float32)
    for name, request in found.items():
        assert torch.equal(request.result(0), expected), name
    if found["alone"].rows <= FIXED_ROWS:  # else it runs alone, between the others
        assert sum(request.shared_steps > 0 for request in found.values()) >= 3, "it hardly met another job: the test shows nothing"


@once
def test_in_the_reproducible_mode_every_forward_has_the_fixed_number_of_rows(
    family: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, sizes = family.denoise, set()

    def denoise(latents: torch.Tensor, timesteps: torch.Tensor, rows: Row) -> torch.Tensor:
        sizes.add((len(latents), len(timesteps), len(rows["prompt_embeds"])))
        return real(latents, timesteps, rows)

    monkeypatch.setattr(family, "denoise", denoise)
    run(make_engine(family, fixed_rows=FIXED_ROWS), *mates_of(family, 5))
    assert sizes == {(FIXED_ROWS,) * 3}


@once
def test_the_reproducible_mode_is_bit_identical_after_warm_up_too(family: StableDiffusion) -> None:
    """The recorded forward is optimised while it runs: the first replays and the later ones must agree."""

    def warm() -> Engine:
        engine = make_engine(family, fixed_rows=FIXED_ROWS)
        engine.warm_up()
        return engine

    subject = work(family, scheduler="euler_ancestral", steps=7)
    expected = solo(family, subject, fixed_rows=FIXED_ROWS)
    engine = warm()
    for _ in range(3):
        assert torch.equal(run(engine, subject)[0].result(0), expected)
    assert torch.equal(run(engine, subject, *mates_of(family, 3))[0].result(0), expected)


@once
def test_the_reproducible_mode_holds_in_half_precision(half: StableDiffusion) -> None:
    found = variants(half, work(half, **SUBJECTS[0], decode=True), lambda: make_engine(half, fixed_rows=FIXED_ROWS))
    for name, request in found.items():
        assert torch.equal(request.result(0), found["alone"].result(0)), name


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: str(subject["scheduler"]))
@once
def test_in_the_default_mode_a_job_stays_close_to_its_solo_run(family: StableDiffusion, subject: dict[str, Any]) -> None:
    found = variants(family, work(family, **subject), lambda: make_engine(family))
    assert sum(request.shared_steps > 0 for request in found.values()) >= 2
    for request in found.values():
        assert_close(request.result(0), found["alone"].result(0))


@pytest.mark.parametrize("subject", [SUBJECTS[0], SUBJECTS[2]], ids=lambda subject: str(subject["scheduler"]))
def test_in_half_precision_a_batched_picture_looks_like_its_solo_run(half: StableDiffusion, subject: dict[str, Any]) -> None:
    found = variants(half, work(half, **subject, decode=True), lambda: make_engine(half))
    for name, request in found.items():
        assert psnr_db(request.result(0), found["alone"].result(0)) >= HALF_PSNR_DB, name


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: str(subject["scheduler"]))
@once
def test_a_job_that_goes_on_from_a_checkpoint_gives_the_same_bits(family: StableDiffusion, subject: dict[str, Any]) -> None:
    one = work(family, **subject)
    expected = solo(family, one, fixed_rows=FIXED_ROWS)
    engine = make_engine(family, fixed_rows=FIXED_ROWS)
    request = engine.submit(one)
    while request.step < 3:
        engine.step()
    data = snapshot(engine, request).to_bytes(one)
    checkpoint = Checkpoint.from_bytes(data, one)
    assert checkpoint is not None and checkpoint.step == 3
    resumed = run(make_engine(family, fixed_rows=FIXED_ROWS), dataclasses.replace(one, resume=checkpoint))[0]
    assert torch.equal(resumed.result(0), expected)
