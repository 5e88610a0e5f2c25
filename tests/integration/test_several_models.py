"""One worker with models of every family, of which all but one fit, through the whole stack: each has queues, and they take turns."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file
from support.adapters import updates_of
from support.tiny import tiny_pipeline
from support.tiny_families import TINY

from latentline.cli import main
from latentline_worker.embedded.stack import Stack
from latentline_worker.models import catalog, weights
from latentline_worker.models.catalog import Defaults, ModelEntry

# Of the file: id -> the tiny pipeline, and what requests get that leave it out. The families' own sizes would take long.
MODELS: dict[str, tuple[str, Defaults]] = {
    "pictures": ("sd", Defaults()),
    "tiny/flow": ("sd3", Defaults(scheduler="heun", num_inference_steps=3, guidance_scale=2.0, width=128)),
    "large": ("sdxl", Defaults(num_inference_steps=4)),
    "dev": ("flux-dev", Defaults(num_inference_steps=4, width=64, height=64)),
    "z": ("z-image", Defaults(num_inference_steps=4, width=64, height=128)),
    "qwen": ("qwen-image", Defaults(num_inference_steps=4, width=64, height=64)),
    "others": ("sd", Defaults()),
}
FAMILIES = {"sd": "sd", "sd3": "sd3", "sdxl": "sdxl", "flux-dev": "flux", "z-image": "z-image", "qwen-image": "qwen-image"}


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("several")
    adapters = folder / "adapters"
    adapters.mkdir()
    entries = []
    for name, (kind, defaults) in MODELS.items():
        pipeline = TINY[kind]() if kind != "sd" else tiny_pipeline("v_prediction" if name == "others" else "epsilon")
        source = folder / name.replace("/", "-")
        pipeline.save_pretrained(source)
        if name == "qwen":
            save_file(updates_of(pipeline, "transformer", "to_q|to_v", 4, 1), adapters / "one.safetensors")
            save_file(updates_of(pipeline, "transformer", "img_mlp.net.2", 4, 2), adapters / "two.safetensors")
        entries.append(ModelEntry(source=str(source), id=name, defaults=defaults, lora_dir=adapters if name == "qwen" else None))
    path = folder / "models.toml"
    budget = sum(weights.of_files(entry, torch.float32) for entry in entries) - 1000
    path.write_text(f"weights_mb = {budget / 2**20}\ncold_wait_s = 0.5\n")
    for entry in entries:
        catalog.append(path, entry)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LATENTLINE_MODELS", str(path))
        stack = Stack(folder / "stack")
        stack.start()
    try:
        with httpx.Client(base_url=stack.url, timeout=60) as client:
            yield client
    finally:
        stack.stop()


def ended(http: httpx.Client, *asked: dict[str, Any]) -> list[dict[str, Any]]:
    """The jobs, submitted together."""
    ids = [http.post("/v1/jobs", json=body).raise_for_status().json()["id"] for body in asked]
    for job_id in ids:
        with http.stream("GET", f"/v1/jobs/{job_id}/events", timeout=120) as stream:
            for _ in stream.iter_lines():
                pass
    return [http.get(f"/v1/jobs/{job_id}").json() for job_id in ids]


def served(http: httpx.Client) -> dict[str, Any]:
    return {model["id"]: model for model in http.get("/v1/models").json()["models"]}


def test_jobs_of_each_model_succeed_in_one_worker(http: httpx.Client) -> None:
    models = served(http)
    assert {name: model["family"] for name, model in models.items()} == {name: FAMILIES[kind] for name, (kind, _) in MODELS.items()}
    assert models["tiny/flow"]["default_scheduler"] == "heun"
    assert "ddim" in models["large"]["schedulers"] and "ddim" not in models["z"]["schedulers"]
    assert {name: (model["workers"], model["warm"], model["swaps"]) for name, model in models.items()} == {
        name: (1, int(name != "others"), 0) for name in MODELS
    }

    asked = [{"model": model, "prompt": "a cat" * (1 + seed), "seed": seed} for seed in range(2) for model in models]
    jobs = ended(http, *asked)
    assert [(job["status"], job["error"]) for job in jobs] == [("succeeded", None)] * len(jobs)
    for body, job in zip(asked, jobs, strict=True):
        model = models[str(body["model"])]
        (image,) = job["images"]
        assert (image["width"], image["height"]) == (model["default_width"], model["default_height"])
        assert httpx.get(image["url"]).status_code == 200
    assert {str(body["model"]): job["num_steps"] for body, job in zip(asked, jobs, strict=True)} == {
        "pictures": 20, "tiny/flow": 3, "large": 4, "dev": 4, "z": 4, "qwen": 4, "others": 20,
    }  # fmt: skip

    models = served(http)
    assert models["others"]["swaps"] >= 1, "the worker says so when it happens"
    assert 0 < sum(model["warm"] for model in models.values()) < len(models)
    shown = CliRunner().invoke(main, ["models", "list", "--url", str(http.base_url)]).stdout.splitlines()
    assert [line.split()[0] for line in shown] == sorted(models)
    (line,) = (line for line in shown if line.startswith("others"))
    assert f"others  sd  64x64  in memory of {models['others']['warm']} of 1 workers" in line


def test_jobs_with_two_adapters_with_one_and_with_none_give_three_pictures(http: httpx.Client) -> None:
    assert {lora["name"] for lora in http.get("/v1/loras").json()["loras"]} == {"one", "two"}
    one, two = {"name": "one", "scale": 1.0}, {"name": "two", "scale": -0.5}
    body = {"model": "qwen", "prompt": "a cat", "seed": 3}
    jobs = ended(http, body, body | {"loras": [one]}, body | {"loras": [one, two]})
    assert [(job["status"], job["error"]) for job in jobs] == [("succeeded", None)] * 3
    pictures = [np.asarray(Image.open(io.BytesIO(httpx.get(job["images"][0]["url"]).content)), dtype=float) for job in jobs]
    assert all(np.abs(a - b).max() > 2 for a, b in ((pictures[0], pictures[1]), (pictures[1], pictures[2])))
    refused = http.post("/v1/jobs", json={"model": "z", "prompt": "a cat", "loras": [one]})
    assert refused.status_code == 422 and refused.json()["error"]["message"] == "loras.0.name: got 'one'; allowed: one of: none"


def test_a_scheduler_that_the_family_has_no_meaning_for_is_refused(http: httpx.Client) -> None:
    refused = http.post("/v1/jobs", json={"model": "z", "prompt": "a cat", "scheduler": "ddim"})
    assert refused.status_code == 422 and refused.json()["error"]["field"] == "scheduler"
