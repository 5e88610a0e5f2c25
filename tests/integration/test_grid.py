"""``latentline grid`` on the real stack."""

from __future__ import annotations

import io
import json
from pathlib import Path

import httpx
from click.testing import CliRunner
from PIL import Image

from latentline.cli import main
from latentline_worker.embedded.stack import Stack


def test_one_seed_and_two_assumptions_on_one_sheet(stack: Stack, http: httpx.Client, tmp_path: Path) -> None:
    file = tmp_path / "sheet.png"
    args = ["grid", "a red apple", "--x", "num_inference_steps=2,6", "--y", "lora=none,one:0.9", "--scheduler", "euler", "--seed", "7"]
    result = CliRunner().invoke(main, [*args, "-o", str(file), "--json", "--url", stack.url])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    jobs = [http.get(f"/v1/jobs/{one['id']}").json() for one in told["jobs"]]
    used = [(job["request"]["num_inference_steps"], [lora["name"] for lora in job["request"]["loras"]]) for job in jobs]
    assert used == [(2, []), (6, []), (2, ["one"]), (6, ["one"])]
    assert told["seed"] == 7 and {(job["request"]["seed"], job["request"]["scheduler"]) for job in jobs} == {(7, "euler")}
    sheet = Image.open(io.BytesIO(file.read_bytes()))
    assert json.loads(sheet.info["latentline"])["jobs"] == [job["id"] for job in jobs]
    cells = {sheet.crop((x, y, x + 150, y + 150)).tobytes() for x in (110, 320) for y in (100, 300)}
    assert len(cells) == 4, "each picture differs from the others"
    refused = CliRunner().invoke(main, ["verify", str(file), "--url", stack.url])
    assert refused.exit_code == 2 and "a sheet of latentline grid" in refused.stderr
