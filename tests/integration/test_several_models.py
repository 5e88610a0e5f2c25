"""One worker process with three models of a file, of which two fit, through the whole stack: each has queues, and they take turns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from click.testing import CliRunner
from support.tiny import tiny_pipeline
from support.tiny_families import TINY

from latentline.cli import main
from latentline_worker.embedded.stack import Stack
from latentline_worker.models import catalog, weights
from latentline_worker.models.catalog import Defaults, ModelEntry


@pytest.fixture
def http(tmp_path: Path) -> Iterator[httpx.Client]:
    tiny_pipeline().save_pretrained(tmp_path / "pictures")
    TINY["sd3"]().save_pretrained(tmp_path / "sd3")
    tiny_pipeline("v_prediction").save_pretrained(tmp_path / "others")
    defaults = Defaults(scheduler="heun", num_inference_steps=3, guidance_scale=2.0, width=128)
    entries = [
        ModelEntry(source=str(tmp_path / "pictures")),
        ModelEntry(source=str(tmp_path / "sd3"), id="tiny/flow", defaults=defaults),
        ModelEntry(source=str(tmp_path / "others")),
    ]
    path = tmp_path / "models.toml"
    budget = sum(weights.of_files(entry, torch.float32) for entry in entries) - 1000
    path.write_text(f"weights_mb = {budget / 2**20}\ncold_wait_s = 0.5\n")
    for entry in entries:
        catalog.append(path, entry)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LATENTLINE_MODELS", str(path))
        stack = Stack(tmp_path / "stack")
        stack.start()
    try:
        with httpx.Client(base_url=stack.url, timeout=60) as client:
            yield client
    finally:
        stack.stop()


def served(http: httpx.Client) -> dict[str, Any]:
    return {model["id"]: model for model in http.get("/v1/models").json()["models"]}


def test_jobs_of_each_model_succeed_in_one_worker(http: httpx.Client) -> None:
    models = served(http)
    assert {name: model["family"] for name, model in models.items()} == {"others": "sd", "pictures": "sd", "tiny/flow": "sd3"}
    assert models["tiny/flow"]["default_scheduler"] == "heun"
    assert {name: (model["workers"], model["warm"], model["swaps"]) for name, model in models.items()} == {
        "others": (1, 0, 0), "pictures": (1, 1, 0), "tiny/flow": (1, 1, 0),
    }  # fmt: skip

    asked = [{"model": model, "prompt": "a cat", "seed": seed} for seed in range(4) for model in sorted(models)]
    ids = [http.post("/v1/jobs", json=body).raise_for_status().json()["id"] for body in asked]
    jobs: list[dict[str, Any]] = []
    for job_id in ids:
        with http.stream("GET", f"/v1/jobs/{job_id}/events", timeout=120) as stream:
            for _ in stream.iter_lines():
                pass
        jobs.append(http.get(f"/v1/jobs/{job_id}").json())
    assert [(job["status"], job["error"]) for job in jobs] == [("succeeded", None)] * len(jobs)
    flow = jobs[2]
    assert flow["num_steps"] == 3
    (image,) = flow["images"]
    assert image["width"] == 128 and httpx.get(image["url"]).status_code == 200

    models = served(http)
    assert models["others"]["swaps"] >= 1 and sum(model["warm"] for model in models.values()) == 2, "the worker says so when it happens"
    shown = CliRunner().invoke(main, ["models", "list", "--url", str(http.base_url)]).stdout.splitlines()
    assert [line.split()[0] for line in shown] == sorted(models)
    assert f"others  sd  64x64  in memory of {models['others']['warm']} of 1 workers" in shown[0]
