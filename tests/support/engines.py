"""Engines, work for them, and reference results."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import pytest
import torch

from latentline.jobs import ResolvedRequest
from latentline_worker.engine.checkpoint import Checkpoint
from latentline_worker.engine.cost import CostModel
from latentline_worker.engine.engine import Engine
from latentline_worker.engine.memory import Memory
from latentline_worker.engine.planner import Planner
from latentline_worker.engine.request import Cancelled, LaneKey, Request, Work
from latentline_worker.models.base import Encoded, Family, Row, Text
from latentline_worker.models.sd import StableDiffusion

RELATIVE = 1e-4  # fp32: what the contract promises against solo runs
FIXED_ROWS = 8
SIGNATURE = (("prompt_embeds", (77, 32), "float32"),)  # of the tiny model's rows
MOST_STEPS = 2000  # of any test: an engine that does not become idle fails the test instead of hanging it

# For tests to which the prediction type makes no difference.
once = pytest.mark.parametrize("pipeline", ["epsilon"], indirect=True)

Denoise = Callable[[torch.Tensor, torch.Tensor, Row], torch.Tensor]


class Everything(CostModel):
    """As many rows as memory allows, so that the jobs of a batch do not depend on this machine's timings."""

    def budget(self, lane: Hashable) -> int:
        return self.limit(lane)


def make_engine(family: Family, *others: Family, **options: Any) -> Engine:
    engine = Engine([family, *others], **options)
    engine.planner = Planner(Everything(engine.planner.cost.max_rows))
    return engine


def work(
    family: Family,
    prompt: str = "a cat",
    scheduler: str | None = None,
    steps: int = 4,
    guidance: float = 5.0,
    seeds: tuple[int, ...] = (1,),
    size: tuple[int, int] = (32, 32),
    **options: Any,
) -> Work:
    scheduler = scheduler or ("ddim" if "ddim" in family.info.schedulers else family.info.first_scheduler)
    asked = {name: options.pop(name) for name in list(options) if name in ResolvedRequest.model_fields}
    request = ResolvedRequest(
        **{
            "version": 1,
            "model": family.info.id,
            "prompt": prompt,
            "negative_prompt": "blurry" if family.info.negative_prompts else "",
            "width": size[0],
            "height": size[1],
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            "scheduler": scheduler,
            "seed": seeds[0],
            "num_images": len(seeds),
            **asked,
        }
    )
    made = Work.of(family, request, prompt, decode=options.pop("decode", False))
    return dataclasses.replace(made, seeds=seeds, **options)


def drain(engine: Engine) -> None:
    """Step until nothing is left to do."""
    for _ in range(MOST_STEPS):
        if engine.idle:
            return
        engine.step()
    pytest.fail(f"the engine is not idle after {MOST_STEPS} steps")


def run(engine: Engine, *works: Work) -> list[Request]:
    requests = [engine.submit(one) for one in works]
    drain(engine)
    return requests


def solo(family: Family, one: Work, **options: Any) -> torch.Tensor:
    return run(make_engine(family, **options), one)[0].result(0)


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert (got - expected).abs().max() <= RELATIVE * expected.abs().max()


def psnr_db(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(10 * torch.log10(255**2 / (a.double() - b.double()).square().mean()))


def snapshot(engine: Engine, request: Request) -> Checkpoint:
    """The request's state as a checkpoint holds it, without waiting for one that is due."""
    return Checkpoint(request.step, engine.lanes[request.lane].snapshot(request).numpy())


def num_used(engine: Engine) -> int:
    return sum(lane.num_used for lane in engine.lanes.values())


def short_of_memory(
    monkeypatch: pytest.MonkeyPatch, family: StableDiffusion, fits: Callable[[torch.Tensor, torch.Tensor], bool]
) -> list[int]:
    """Let the denoiser run out of memory unless the latents and prompt embeds fit. To be called before the engine is made.

    Returns:
        The row counts of the calls that did not fit; it grows.
    """
    real, events = family.denoise, []

    def denoise(latents: torch.Tensor, timesteps: torch.Tensor, rows: Row) -> torch.Tensor:
        if not fits(latents, rows["prompt_embeds"]):
            events.append(len(latents))
            raise torch.OutOfMemoryError("out of memory (simulated)")
        return real(latents, timesteps, rows)

    monkeypatch.setattr(family, "denoise", denoise)
    return events


def mates_of(family: StableDiffusion, seed: int, count: int = 5, **options: Any) -> list[Work]:
    """Jobs that differ in everything that may differ within a batch, and some of another size."""
    choose = random.Random(seed)
    return [
        work(
            family,
            "thing " + "abcdefgh"[choose.randrange(8)] * choose.randint(1, 5),
            choose.choice(["ddim", "euler", "euler_ancestral", "dpmpp_2m_karras", "dpmpp_3m", "unipc", "lcm", "heun", "pndm"]),
            choose.randint(3, 6),
            choose.choice([1.0, 2.0, 7.5]),
            tuple(choose.randrange(1000) for _ in range(choose.randint(1, 3))),
            choose.choice([(32, 32), (32, 32), (32, 32), (48, 40)]),
            **options,
        )
        for _ in range(count)
    ]


def keys(family: StableDiffusion) -> tuple[LaneKey, LaneKey]:
    """The lanes of the model's own size and of twice that: four times the pixels."""
    width, height = family.info.default_width, family.info.default_height
    own, large = (LaneKey("tiny", family.latent_shape(factor * width, factor * height), SIGNATURE) for factor in (1, 2))
    return own, large


def limit_for(memory: Memory, needed: float) -> int:
    """A limit under which there is room for so many bytes after what is kept for texts."""
    probe = copy.copy(memory)
    probe.usable = int(needed)
    while probe.room < needed:
        probe.usable += int(needed) - probe.room + 1
    return probe.usable


def tight(family: StableDiffusion, slots: int) -> Engine:
    """An engine whose memory allows so many images between steps."""
    key = LaneKey("tiny", family.latent_shape(32, 32), SIGNATURE)
    engine = make_engine(family)
    engine.memory.usable = limit_for(engine.memory, slots * engine.memory.slot_bytes(key))
    assert engine.memory.room // engine.memory.slot_bytes(key) == slots
    return engine


def embeds(family: StableDiffusion, *prompts: str) -> torch.Tensor:
    """(prompts, tokens, width) prompt embeds."""
    return torch.stack([one.row["prompt_embeds"] for one in family.encode([Text(prompt) for prompt in prompts])])


def encoded_times(family: StableDiffusion, factor: Callable[[str], float]) -> Callable[[Sequence[Text]], list[Encoded]]:
    """The family's ``encode`` with each text's embeds multiplied by a factor, such as NaN."""
    real = family.encode

    def encode(texts: Sequence[Text]) -> list[Encoded]:
        return [
            Encoded({name: tensor * factor(text.prompt) for name, tensor in one.row.items()}, one.tokens)
            for text, one in zip(texts, real(texts), strict=True)
        ]

    return encode


class Decodes:
    """Records the calls of ``family.decode``; some fail."""

    def __init__(self, family: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
        self._real = family.decode
        self.calls: list[tuple[int, bool]] = []  # images, tiled
        self.fails: Callable[[torch.Tensor, bool], Exception | None] = lambda latents, tiled: None
        monkeypatch.setattr(family, "decode", self)

    def __call__(self, latents: torch.Tensor, *, tiled: bool) -> torch.Tensor:
        self.calls.append((len(latents), tiled))
        if error := self.fails(latents, tiled):
            raise error
        return self._real(latents, tiled=tiled)


def assert_cancelled(request: Request, reason: str) -> None:
    with pytest.raises(Cancelled) as stopped:
        request.result(0)
    assert stopped.value.reason == reason


def recorded_texts(family: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The texts of each call of ``family.encode`` from now on; texts with "bad" fail."""
    real, calls = family.encode, []

    def encode(texts: Sequence[Text]) -> list[Encoded]:
        calls.append([text.prompt for text in texts])
        if any("bad" in text.prompt for text in texts):
            raise ValueError("no such letter")
        return real(texts)

    monkeypatch.setattr(family, "encode", encode)
    return calls


def counted(family: StableDiffusion, monkeypatch: pytest.MonkeyPatch, change: Denoise | None = None) -> list[int]:
    """The row counts of the calls of ``family.denoise`` from Python, from now on."""
    real, calls = family.denoise, []

    def denoise(latents: torch.Tensor, timesteps: torch.Tensor, rows: Row) -> torch.Tensor:
        calls.append(len(latents))
        return (change or real)(latents, timesteps, rows)

    monkeypatch.setattr(family, "denoise", denoise)
    return calls
