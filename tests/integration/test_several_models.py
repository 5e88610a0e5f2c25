"""One worker process with the models of a file, through the whole stack: each announced, each with queues of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.tiny import tiny_pipeline
from support.tiny_families import TINY

from latentline_worker.embedded.stack import Stack
from latentline_worker.models import catalog
from latentline_worker.models.catalog import Defaults, ModelEntry


@pytest.fixture
def http(tmp_path: Path) -> Iterator[httpx.Client]:
    tiny_pipeline().save_pretrained(tmp_path / "pictures")
    TINY["sd3"]().save_pretrained(tmp_path / "sd3")
    path = tmp_path / "models.toml"
    catalog.append(path, ModelEntry(source=str(tmp_path / "pictures")))
    defaults = Defaults(scheduler="heun", num_inference_steps=3, guidance_scale=2.0, width=128)
    catalog.append(path, ModelEntry(source=str(tmp_path / "sd3"), id="tiny/flow", defaults=defaults))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LATENTLINE_MODELS", str(path))
        stack = Stack(tmp_path / "stack")
        stack.start()
    try:
        with httpx.Client(base_url=stack.url, timeout=60) as client:
            yield client
    finally:
        stack.stop()


def test_jobs_of_each_model_succeed_in_one_worker(http: httpx.Client) -> None:
    models = {model["id"]: model for model in http.get("/v1/models").json()["models"]}
    assert {name: model["family"] for name, model in models.items()} == {"pictures": "sd", "tiny/flow": "sd3"}
    assert models["tiny/flow"]["default_scheduler"] == "heun"

    asked = [{"model": model, "prompt": "a cat", "seed": seed} for seed in range(4) for model in models]
    ids = [http.post("/v1/jobs", json=body).raise_for_status().json()["id"] for body in asked]
    jobs: list[dict[str, Any]] = []
    for job_id in ids:
        with http.stream("GET", f"/v1/jobs/{job_id}/events", timeout=120) as stream:
            for _ in stream.iter_lines():
                pass
        jobs.append(http.get(f"/v1/jobs/{job_id}").json())
    assert [(job["status"], job["error"]) for job in jobs] == [("succeeded", None)] * len(jobs)
    assert jobs[1]["num_steps"] == 3
    (image,) = jobs[1]["images"]
    assert image["width"] == 128 and httpx.get(image["url"]).status_code == 200
