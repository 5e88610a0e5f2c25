"""The memory model in byte counts worked out by hand: no expected value comes from the engine."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_families
from support.engines import SIGNATURE, work
from support.families import OddFamily

from latentline_worker.engine import footprint
from latentline_worker.engine import memory as module
from latentline_worker.engine.footprint import Footprint, count_row, peak_bytes
from latentline_worker.engine.free_memory import free_bytes
from latentline_worker.engine.memory import Memory
from latentline_worker.engine.request import LaneKey
from latentline_worker.engine.rows import signature_of
from latentline_worker.models import bundled_model
from latentline_worker.models.base import Family
from latentline_worker.models.flux import Flux
from latentline_worker.models.qwen_image import QwenImage
from latentline_worker.models.sd3 import StableDiffusion3
from latentline_worker.models.sdxl import StableDiffusionXL
from latentline_worker.models.z_image import ZImage

CPU = torch.device("cpu")
# 4 x 16 x 16 = 1024 values: 32 px pictures of the tiny model, which has 2 x 2 pixels a latent.
KEY = LaneKey("tiny", (4, 16, 16), SIGNATURE)
LARGE = LaneKey("tiny", (4, 32, 32), SIGNATURE)
# Nine places in the history (4 past latents, 4 past outputs, noise) of 1024 float32 values, two prompt embeds of
# 77 x 32 float32 values, and the number of the adapters: 9 * 1024 * 4 + 2 * 77 * 32 * 4 + 8.
SLOT = 36_864 + 19_712 + 8
# Around the forward a step holds 16 times the latents and one prompt embed for each row: 16 * 1024 * 4 + 77 * 32 * 4.
COPY = 65_536 + 9_856
ROW, DECODE, TEXT = 102_400, 307_200, 50_000


@pytest.fixture
def odd() -> OddFamily:
    """A family whose forward takes nothing of what the tests below say it takes."""
    return OddFamily("tiny")


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch, odd: OddFamily) -> Callable[..., Memory]:
    """Budgets of which nothing is kept for texts, after a warm-up that measured the figures above unless told otherwise.

    By its shapes a row takes in proportion to the latents.
    """
    monkeypatch.setattr(module, "TEXT_SHARE", 0)
    monkeypatch.setattr(module, "LEAST_ENTRIES", 0)
    monkeypatch.setattr(footprint, "count_row", lambda family, key: key.num_latents)

    def make(limit: int, row: float = ROW, decode: float = DECODE, text: float = 0, **options: Any) -> Memory:
        made = Memory(CPU, limit, **options)
        made.footprints["tiny"] = Footprint(odd, KEY, row, decode, 1024, text)
        return made

    return make


def test_an_image_between_steps_takes_its_history_and_two_prompt_embeds(memory: Callable[..., Memory]) -> None:
    assert memory(1).slot_bytes(KEY) == SLOT
    half = LaneKey("tiny", (4, 16, 16), (("prompt_embeds", (77, 32), "bfloat16"),))  # of the embeds alone: the history stays float32
    assert memory(1).slot_bytes(half) == 36_864 + 9_856 + 8


@pytest.mark.parametrize(
    ("limit", "rows"),
    [(20 * (ROW + COPY), 15), (20 * (ROW + COPY) - 4, 14), (100_000_000, 64), (1, 1)],
    ids=["15", "not quite 15", "as many as asked", "one always"],
)
def test_three_quarters_of_the_memory_are_for_the_rows_of_a_forward(memory: Callable[..., Memory], limit: int, rows: int) -> None:
    assert memory(limit).num_rows(KEY, 64) == rows


def test_a_job_of_many_images_leaves_less_for_the_rows_of_a_forward(memory: Callable[..., Memory]) -> None:
    """Its slots, and what is gathered of all of its rows, whatever part of them is in one forward."""
    limit = 15 * SLOT + 15 * COPY + 3 * ROW
    assert memory(limit).num_rows(KEY, 64, num_images=15, gathered=15) == 3
    assert memory(limit - 1).num_rows(KEY, 64, num_images=15, gathered=15) == 2
    assert memory(10 * SLOT + 4 * (COPY + ROW)).num_rows(KEY, 64, num_images=10, gathered=4) == 4


def test_captured_graphs_take_a_quarter_of_the_memory_at_most(memory: Callable[..., Memory]) -> None:
    assert memory(20 * ROW).num_captured(KEY, 64) == 5
    assert memory(20 * ROW - 4).num_captured(KEY, 64) == 4
    assert memory(20 * ROW).num_captured(KEY, 3) == 3
    assert memory(3 * ROW).num_captured(KEY, 64) == 0


def test_before_the_warm_up_steps_count_as_nothing() -> None:
    made = Memory(CPU, 1000)
    assert (made.num_rows(KEY, 64), made.row_bytes(KEY), made.decode_bytes("tiny", 1024), made.step_bytes(KEY, 9, 9)) == (64, 0, 0, 0)
    assert made.needed_bytes(KEY, 2) == 2 * SLOT


def test_a_decode_takes_what_its_pixels_take_up_to_the_size_of_a_tile(memory: Callable[..., Memory]) -> None:
    made = memory(1)
    assert made.decode_bytes("tiny", 1024) == 307_200
    # 2048 x 2048 px is decoded in tiles: no more at a time than 1024 x 1024 px, 1,048,576 latent values, take.
    assert made.decode_bytes("tiny", 4 * 1024 * 1024) == 314_572_800
    assert made.decode_bytes("tiny", 4 * 512 * 512) == 314_572_800
    assert made.decode_bytes("tiny", 4 * 256 * 512) == 157_286_400


@pytest.mark.parametrize(
    ("figures", "rows", "needed"),
    [
        ({}, 1, DECODE), ({}, 8, 8 * (ROW + COPY)), ({"row": 400_000}, 1, 400_000 + COPY), ({"text": 990_000}, 2, 990_000),
    ],
    ids=["the decode is largest", "eight rows", "the row is largest", "the text is largest"],
)  # fmt: skip
def test_a_job_needs_a_slot_and_the_largest_of_forward_and_decode_and_text(
    memory: Callable[..., Memory], figures: dict[str, float], rows: int, needed: int
) -> None:
    assert memory(1, **figures).needed_bytes(KEY, rows=rows) == SLOT + needed


def test_a_job_of_many_images_needs_copies_of_all_its_rows_and_one_forward(memory: Callable[..., Memory]) -> None:
    assert memory(1).needed_bytes(KEY, num_images=5, gathered=10, rows=1) == 5 * SLOT + ROW + 10 * COPY


def test_adapters_and_texts_come_off_the_budget(odd: OddFamily) -> None:
    banks = [300_000]
    made = Memory(CPU, 1_000_000, adapter_bytes=lambda: banks[0])
    assert (made.text_bytes, made.room) == (20_000, 660_000)
    made.footprints["tiny"] = Footprint(odd, KEY, 1, 1, 1024)  # ten rows of 9,856 bytes are more
    assert made.room == 700_000 - 2 * 98_560
    banks[0] = 2_000_000
    assert made.room == 0


def test_measured_activations_get_a_margin_of_a_quarter(odd: OddFamily) -> None:
    made = Memory(CPU, 10**9, texts=8)
    taken = {"denoise": 1000, "decode": 2500, "encode": 10}  # values of 4 bytes
    made.measure(odd, KEY, 1024, **{name: functools.partial(torch.zeros, count) for name, count in taken.items()})
    assert (made.row_bytes(KEY), made.decode_bytes("tiny", 1024)) == (5_000, 12_500)
    assert made.footprints["tiny"].text == 400


def test_another_size_takes_what_its_shapes_say_times_what_was_measured_against_them(
    monkeypatch: pytest.MonkeyPatch, odd: OddFamily
) -> None:
    """Where texts share the sequence with the picture, a row takes less than its latents say."""
    calls: list[LaneKey] = []

    def count(family: Family, key: LaneKey) -> int:
        calls.append(key)
        return 2_000 + key.num_latents

    monkeypatch.setattr(footprint, "count_row", count)
    made = Footprint(odd, KEY, 6_048, 1, 1024)  # twice the count of 3,024
    assert [made.row(KEY), made.row(LARGE), made.row(LARGE)] == [6_048, 12_192, 12_192]
    assert calls == [KEY, LARGE], "each is counted once"


def test_a_forward_that_needs_values_takes_in_proportion_to_the_latents(
    monkeypatch: pytest.MonkeyPatch, odd: OddFamily, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(odd, "denoise", lambda x, t, rows: x[: int(x.sum())])
    assert Footprint(odd, KEY, 6_000, 1, 1024).row(LARGE) == 24_000
    assert "cannot be counted" in caplog.text


FAMILIES: dict[str, Callable[[], Family]] = {
    "bundled": lambda: bundled_model.load(CPU, torch.float32),
    "sdxl": lambda: StableDiffusionXL("sdxl", tiny_families.sdxl(), CPU, torch.float32),
    "sd3": lambda: StableDiffusion3("sd3", tiny_families.sd3(), CPU, torch.float32),
    "flux": lambda: Flux("flux", tiny_families.flux(), CPU, torch.float32),
    "flux in half precision": lambda: Flux("flux", tiny_families.flux(), CPU, torch.bfloat16),
    "z-image": lambda: ZImage("z-image", tiny_families.z_image(), CPU, torch.float32),
    "qwen-image": lambda: QwenImage("qwen-image", tiny_families.qwen_image(), CPU, torch.float32),
    "odd": lambda: OddFamily(),
}


@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_counting_shapes_gives_what_running_the_forward_takes(name: str) -> None:
    family = FAMILIES[name]()
    for side in (64, 96):
        one = work(family, size=(side, side))
        (row, *_) = family.rows(one.request, family.encode(one.texts))
        key = LaneKey(family.info.id, one.latent_shape, signature_of(row))
        x, t = torch.randn(1, *one.latent_shape), torch.full((1,), 500.0)
        rows = {name: tensor[None] for name, tensor in row.items()}
        family.denoise(x, t, rows)  # some make tables at their first call, and keep them
        with peak_bytes(CPU) as peak:
            family.denoise(x, t, rows)
        assert count_row(family, key) == peak() > 0


def test_the_peak_is_what_lives_at_the_same_time() -> None:
    with peak_bytes(CPU) as peak:
        a = torch.zeros(1000)
        b = a + 1  # 8,000 bytes
        del a
        c = b.view(10, 100)  # no memory of its own
        del b
        d = torch.zeros(250)  # 5,000
        del c, d
        torch.zeros(1500)
    assert peak() == 8_000


def test_weights_and_views_of_them_are_no_activations() -> None:
    weight = torch.zeros(100, 50)
    with peak_bytes(CPU) as peak:
        torch.zeros(10, 100) @ weight.t().t()  # 4,000 bytes and a product of 2,000
    assert peak() == 6_000


def machine(root: Path, available_kb: int | None, limit: str | None = None, used: int = 0, inactive: int | None = None) -> Path:
    """A file system in which a kernel tells this of memory."""
    group = root / "sys/fs/cgroup"
    for folder in (root / "proc", group):
        folder.mkdir(parents=True)
    if available_kb is not None:
        (root / "proc/meminfo").write_text(f"MemTotal:       99999999 kB\nMemAvailable:   {available_kb} kB\nHugePages_Total:       0\n")
    if limit is not None:
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text(f"{used}\n")
        (group / "memory.stat").write_text("anon 5\n" + ("" if inactive is None else f"inactive_file {inactive}\n") + "active_file 7\n")
    return root


@pytest.mark.parametrize(
    ("figures", "free"),
    [
        ((1000, "max", 50, 0), 1_024_000),
        ((1000, "600000", 200_000, 0), 400_000),
        ((1000, "600000", 200_000, 150_000), 550_000),
        ((1000, "600000", 200_000, None), 400_000),
        ((100, "600000", 200_000, 0), 102_400),
        ((1000, None, 0, None), 1_024_000),
        ((1000, "broken", 0, 0), 1_024_000),
        ((None, "600000", 200_000, 0), 400_000),
        ((None, None, 0, None), 4 << 30),
    ],
    ids=[
        "no limit", "the group's limit", "cached files are free", "no word of files", "the machine has less", "no group",
        "unreadable group", "no word of the machine", "no word at all",
    ],
)  # fmt: skip
def test_free_memory_is_what_the_machine_and_its_control_group_leave(
    tmp_path: Path, figures: tuple[int | None, str | None, int, int | None], free: int
) -> None:
    assert free_bytes(CPU, machine(tmp_path, *figures)) == free


def test_the_engine_uses_nine_tenths_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "free_bytes", lambda _: 1_000_000)
    assert Memory(CPU).usable == 900_000
