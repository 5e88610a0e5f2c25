"""The memory model in byte counts worked out by hand: no expected value comes from the engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.engines import SIGNATURE

from latentline.errors import OutOfMemory
from latentline_worker.engine import memory as module
from latentline_worker.engine.memory import Footprint, Memory, free_bytes, peak_bytes
from latentline_worker.engine.request import LaneKey

CPU = torch.device("cpu")
# 4 x 16 x 16 = 1024 values: 32 px pictures of the tiny model, which has 2 x 2 pixels a latent.
KEY = LaneKey("tiny", (4, 16, 16), SIGNATURE)
# Nine places in the history (4 past latents, 4 past outputs, noise) of 1024 float32 values, and two prompt embeds of
# 77 x 32 float32 values: 9 * 1024 * 4 + 2 * 77 * 32 * 4.
SLOT = 36_864 + 19_712


def memory(limit: int, row: float = 100.0, decode: float = 300.0) -> Memory:
    """A row takes 102,400 bytes and a decode 307,200, unless told otherwise."""
    made = Memory(CPU, limit)
    made.footprints["tiny"] = Footprint(row, decode, 4 / 4)  # 2 x 2 pixels a latent of 4 values
    return made


def test_an_image_between_steps_takes_its_history_and_two_prompt_embeds() -> None:
    assert memory(1).slot_bytes(KEY) == SLOT
    half = LaneKey("tiny", (4, 16, 16), (("prompt_embeds", (77, 32), "bfloat16"),))  # of the embeds alone: the history stays float32
    assert memory(1).slot_bytes(half) == 36_864 + 9_856


@pytest.mark.parametrize(
    ("limit", "slots"), [(4 * 3 * SLOT, 3), (4 * 3 * SLOT - 4, 2), (1, 1)], ids=["three", "not quite three", "one always"]
)
def test_a_quarter_of_the_memory_is_for_images_between_steps(limit: int, slots: int) -> None:
    assert memory(limit).num_slots(KEY) == slots


@pytest.mark.parametrize(
    ("limit", "rows"),
    [(2_048_000, 15), (2_047_000, 14), (100_000_000, 64), (1, 1)],
    ids=["15", "not quite 15", "as many as asked", "one always"],
)
def test_three_quarters_of_the_memory_are_for_the_rows_of_a_forward(limit: int, rows: int) -> None:
    """2,048,000 * 0.75 = 15 rows of 102,400 bytes."""
    assert memory(limit).num_rows(KEY, 64) == rows


def test_before_the_warm_up_rows_count_as_nothing() -> None:
    made = Memory(CPU, 1000)
    assert (made.num_rows(KEY, 64), made.row_bytes(KEY), made.decode_bytes(KEY)) == (64, 0, 0)


def test_a_decode_takes_what_its_pixels_take_up_to_the_size_of_a_tile() -> None:
    made = memory(1)
    assert made.decode_bytes(KEY) == 307_200
    # 2048 x 2048 px is decoded in tiles: no more at a time than 1024 x 1024 px, 1,048,576 latent values, take.
    assert made.decode_bytes(LaneKey("tiny", (4, 1024, 1024), SIGNATURE)) == 314_572_800
    assert made.decode_bytes(LaneKey("tiny", (4, 512, 512), SIGNATURE)) == 314_572_800
    assert made.decode_bytes(LaneKey("tiny", (4, 256, 512), SIGNATURE)) == 157_286_400


@pytest.mark.parametrize(
    ("row", "decode", "rows", "needed"),
    [(100.0, 300.0, 1, SLOT + 307_200), (100.0, 300.0, 8, SLOT + 819_200), (400.0, 300.0, 1, SLOT + 409_600)],
    ids=["the decode is larger", "eight rows", "the row is larger"],
)
def test_a_lane_needs_a_slot_and_the_larger_of_forward_and_decode(row: float, decode: float, rows: int, needed: int) -> None:
    memory(needed, row, decode).check(KEY, rows)
    with pytest.raises(OutOfMemory, match=f"latents of 4x16x16 need {needed:,} bytes for .* and this worker has {needed - 1:,}:"):
        memory(needed - 1, row, decode).check(KEY, rows)


def test_measured_activations_get_a_margin_of_a_quarter() -> None:
    made = Memory(CPU, 10**9)
    made.measure(KEY, 1024, lambda: torch.zeros(1000), lambda: torch.zeros(2500))  # 4,000 and 10,000 bytes
    assert (made.row_bytes(KEY), made.decode_bytes(KEY)) == (5_000, 12_500)


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
