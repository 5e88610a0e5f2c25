"""``latentline grid``: axes, what is refused before anything is submitted, and the sheet. A whole run: tests/integration/test_grid.py."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.commands import Service, call, refused, served

from latentline import routing
from latentline.cli import remote, sheet
from latentline.cli.axes import MAX_CELLS, Axis, cells
from latentline.cli.errors import fail
from latentline.cli.sheet import LEAST, MOST, Sheet, draw
from latentline.errors import InvalidRequest
from latentline.jobs import Claim, JobError, JobRecord
from latentline.testing import FakeWorker


def test_axes_become_requests_row_by_row() -> None:
    x, y = Axis.parse("--x", "num_inference_steps=8, 16"), Axis.parse("--y", "lora=none,pixel:0.5")
    found = cells({"prompt": "a cat", "seed": 7}, x, y)
    assert [(cell.column, cell.row) for cell in found] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert found[3].body == {"prompt": "a cat", "seed": 7, "num_inference_steps": 16, "loras": [{"name": "pixel", "scale": 0.5}]}
    assert found[0].body["loras"] == [] and {cell.body["seed"] for cell in found} == {7}


STEPS = "num_inference_steps=2,4"
REFUSED = {
    "an unknown field": (["--x", "steps=8"], "--x: got 'steps=8'; allowed: FIELD=VALUE,VALUE with FIELD one of: guidance_scale, height"),
    "the seed": (["--x", "seed=1,2"], "FIELD one of"),
    "no values": (["--x", "scheduler"], "FIELD one of"),
    "an empty value": (["--x", "scheduler=euler,"], "different values"),
    "a value twice": (["--x", "scheduler=euler,euler"], "different values"),
    "a word for a number": (["--x", "num_inference_steps=8,many"], "num_inference_steps: got 'many'; allowed: an integer"),
    "a number out of range": (["--x", "num_inference_steps=8,151"], "num_inference_steps: got 151; allowed: at most 150"),
    "no finite number": (["--x", "guidance_scale=nan"], "guidance_scale: got nan; allowed: "),
    "an unknown scheduler": (["--x", STEPS, "--y", "scheduler=ddim,euler9"], "scheduler: got 'euler9'; allowed: one of: ddim"),
    "an unknown model": (["--x", "model=latentline-emoji,other"], "model: got 'other'; allowed: one of: latentline-emoji"),
    "an unknown adapter": (["--x", "lora=none,other:0.5"], "loras.0.name: got 'other'; allowed: one of: none"),
    "a size of no model": (["--x", "width=64,512", "--height", "512"], "width: got 512; allowed: width * height at most"),
    "the same field twice": (["--x", STEPS, "--y", STEPS], "--y: got 'num_inference_steps'; allowed: another field than --x"),
    "an axis and an option": (["--x", STEPS, "--steps", "4"], "num_inference_steps: got 4; allowed: either an axis"),
    "too many": (["--x", "num_inference_steps=" + ",".join(map(str, range(1, 66)))], "grid: got 65; allowed: at most 64"),
    "another format": (["--x", STEPS, "-o", "sheet.jpg"], "-o: got 'sheet.jpg'; allowed: a .png file"),
    "a folder that cannot be": (["--x", STEPS, "-o", "/proc/sheets/grid.png"], "-o: got"),
    "a bad option": (["--x", STEPS, "--seed", "-1"], "seed: got -1; allowed: at least 0"),
}


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with pytest.MonkeyPatch.context() as patch, served(patch) as running:
        yield running


@pytest.mark.parametrize(("args", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_refused_is_refused_before_anything_is_submitted(service: Service, args: list[str], words: str) -> None:
    assert words in refused("grid", "a cat", *args, "--timeout", "5")
    assert service.worker.redis.zcard(routing.index_key()) == 0


def test_a_failed_job_is_told_in_its_cell_and_the_other_is_there(service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish = FakeWorker.finish

    def some_fail(self: FakeWorker, claim: Claim) -> JobRecord:
        failing = claim.record.num_steps == 4
        self.fail_with = JobError(code="out_of_memory", message="no") if failing else None
        return finish(self, claim)

    monkeypatch.setattr(FakeWorker, "finish", some_fail)
    service.start()
    told = json.loads(call("grid", "a cat", "--x", STEPS, "-o", str(tmp_path / "a.png"), "--json", code=1).stdout)
    assert [(job["status"], job["num_inference_steps"]) for job in told["jobs"]] == [("succeeded", "2"), ("failed", "4")]
    image = Image.open(io.BytesIO((tmp_path / "a.png").read_bytes()))
    assert image.size[0] > 2 * LEAST and json.loads(image.info["latentline"])["seed"] == told["seed"]  # type: ignore[arg-type]


def test_a_refusal_in_the_middle_cancels_what_was_submitted(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    submit = remote.Api.job

    def refusing(self: remote.Api, method: str, path: str, **options: Any) -> dict[str, Any]:
        if options.get("json", {}).get("num_inference_steps") == 4:
            fail("tenant 'default' has 1 jobs queued and running, as many as are allowed", 3)
        return submit(self, method, path, **options)

    monkeypatch.setattr(remote.Api, "job", refusing)
    monkeypatch.setattr(service.worker, "run_all", lambda: [])
    assert "as many as are allowed" in refused("grid", "a dog", "--x", STEPS, code=3)
    (job_id,) = service.worker.redis.zrevrange(routing.index_key(), 0, 0)
    assert service.worker.redis.hget(routing.job_key(job_id), "status") == "cancelled"


def picture(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), "#c03050")


def test_pictures_on_a_sheet_are_enlarged_by_a_whole_factor_or_reduced() -> None:
    found = sheet._sized(picture(64, 32))
    assert found.size == (192, 96) and max(sheet._sized(picture(2048, 1024)).size) == MOST
    assert sheet._sized(picture(300, 300)).size == (300, 300)
    drawn = draw(Sheet("a\x1bcat\n" * 90, "", ["x 1", "x" * 500], ["y 1"], {(0, 0): picture(64, 64), (1, 0): "failed"}, {"seed": 7}))
    image = Image.open(io.BytesIO(drawn))
    assert image.convert("RGB").getpixel((image.width - 300, image.height - 100)) == (192, 48, 80)
    assert json.loads(image.info["latentline"]) == {"grid": 1, "seed": 7}  # type: ignore[arg-type]


def test_the_largest_sheet_is_bounded() -> None:
    places = {(i, 0): picture(8, 2048) for i in range(MAX_CELLS)}
    image = Image.open(io.BytesIO(draw(Sheet("t", "s", ["c"] * MAX_CELLS, [], places, {}))))
    assert image.width <= MAX_CELLS * (MOST + 8) + 32 and image.height <= MOST + 150


def test_a_lora_that_cannot_be_read_names_its_option() -> None:
    with pytest.raises(InvalidRequest, match="lora: got 'a:b'"):
        Axis.parse("--x", "lora=a:b")


def test_without_pillow_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "latentline.cli.sheet")
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert "latentline grid needs more packages: pip install 'latentline[pictures]'" in refused("grid", "a cat", "--x", STEPS)
