"""The main job over HTTP, against real services and the bundled model."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from support.jobs import SIDE
from support.receiver import Receiver

from latentline import Client, records
from latentline.callbacks import CallbackMessage
from latentline.connection import connect
from latentline.jobs import SCHEDULERS
from latentline.webhooks import verify
from latentline_worker.embedded.stack import Stack
from latentline_worker.models import bundled_model
from latentline_worker.samplers import make_scheduler


def finished(http: httpx.Client, job_id: str) -> dict[str, Any]:
    """Follow the event stream to the end, then read the job."""
    with http.stream("GET", f"/v1/jobs/{job_id}/events", timeout=120) as stream:
        for _ in stream.iter_lines():
            pass
    job: dict[str, Any] = http.get(f"/v1/jobs/{job_id}").json()
    return job


def test_fifty_concurrent_jobs_over_http(http: httpx.Client) -> None:
    def one(i: int) -> dict[str, Any]:
        body = {
            "prompt": f"a {['cat', 'rocket', 'red apple', 'robot'][i % 4]}",
            "num_inference_steps": 3 + i % 9,
            "scheduler": SCHEDULERS[i % len(SCHEDULERS)],
            "guidance_scale": 1.0 + i % 5,
            "seed": i,
            "output": {"format": ["png", "webp", "jpeg"][i % 3]},
        }
        answer = http.post("/v1/jobs", json=body)
        assert answer.status_code == 202, answer.text
        assert answer.headers["location"] == f"/v1/jobs/{answer.json()['id']}"
        return finished(http, answer.json()["id"])

    with ThreadPoolExecutor(50) as pool:
        jobs = list(pool.map(one, range(50)))
    assert [job["status"] for job in jobs] == ["succeeded"] * 50
    for i, job in enumerate(jobs):
        (image,) = job["images"]
        answer = httpx.get(image["url"])
        assert answer.status_code == 200 and answer.headers["content-type"] == image["content_type"]
        assert hashlib.sha256(answer.content).hexdigest() == image["sha256"]
        assert Image.open(io.BytesIO(answer.content)).size == (SIDE, SIDE) == (image["width"], image["height"])
        assert image["seed"] == i and job["step"] == job["num_steps"] == 3 + i % 9
    url = jobs[0]["images"][0]["url"]
    tampered = [url.replace("X-Amz-Expires=3600", "X-Amz-Expires=36000"), url[:-4] + "0000", url.replace(jobs[0]["id"], jobs[1]["id"])]
    assert [httpx.get(bad).status_code for bad in tampered] == [403] * 3
    shared = sum(job["timings"]["shared_steps"] for job in jobs)
    assert shared > 0.5 * sum(job["timings"]["denoise_steps"] for job in jobs)


def test_jobs_with_adapters_share_batches_with_others(http: httpx.Client, stack: Stack) -> None:
    assert {lora["name"] for lora in http.get("/v1/loras").json()["loras"]} == {"one", "two"}
    body = {"prompt": "a red apple", "num_inference_steps": 8, "seed": 3}
    sets: list[list[dict[str, Any]]] = [[], [{"name": "one"}], [{"name": "one", "scale": 0.5}, {"name": "two", "scale": -1.0}], []]
    ids = [http.post("/v1/jobs", json=body | {"loras": loras}).json()["id"] for loras in sets]
    jobs = [finished(http, job_id) for job_id in ids]
    assert [job["status"] for job in jobs] == ["succeeded"] * 4, jobs
    assert [job["request"]["loras"] for job in jobs][2] == [{"name": "one", "scale": 0.5}, {"name": "two", "scale": -1.0}]
    files = [httpx.get(job["images"][0]["url"]).content for job in jobs]
    pixels = [np.asarray(Image.open(io.BytesIO(file))).astype(int) for file in files]
    assert np.abs(pixels[0] - pixels[3]).max() <= 2 and np.abs(pixels[0] - pixels[1]).max() > 20 < np.abs(pixels[1] - pixels[2]).max()
    assert json.loads(Image.open(io.BytesIO(files[1])).text["latentline"])["loras"] == [{"name": "one", "scale": 1.0}]  # type: ignore[attr-defined]
    refused = http.post("/v1/jobs", json=body | {"loras": [{"name": "absent"}]})
    assert refused.status_code == 422
    assert refused.json()["error"]["message"] == "loras.0.name: got 'absent'; allowed: one of: one, two"
    command = [sys.executable, "-m", "latentline.cli", "loras", "list", "--url", stack.url]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert listed.splitlines() == ["latentline-emoji  one", "latentline-emoji  two"]


def test_a_callback_is_signed_for_its_tenant_and_opens_the_pictures(http: httpx.Client, stack: Stack) -> None:
    with contextlib.closing(connect(stack.settings.redis_url.get_secret_value())) as broker:
        secret = records.run(broker, records.create_secret("shop")).secret
    receiver = Receiver()
    prompt = "a red apple, " * 2000  # more than level 1 allows, and more than the text encoder reads
    body = {"prompt": prompt, "num_inference_steps": 4, "num_images": 2, "tenant": "shop", "callback": {"url": receiver.url}}
    try:
        job = finished(http, http.post("/v1/jobs", json=body).json()["id"])
        assert receiver.arrived.acquire(timeout=60)
    finally:
        receiver.close()
    headers, told = receiver.requests[0]
    verify(secret, headers, told)
    data = CallbackMessage.model_validate_json(told).data
    assert (data.id, data.tenant, len(data.images)) == (job["id"], "shop", 2)
    (warning,) = data.warnings
    assert (warning.code, warning.field) == ("prompt_truncated", "prompt") and job["warnings"] == [warning.model_dump()]
    for image in data.images:
        assert image.url is not None and image.url_expires_at is not None and image.url_expires_at > datetime.now(UTC)
        assert hashlib.sha256(httpx.get(image.url, trust_env=False).content).hexdigest() == image.sha256


def test_the_picture_is_the_one_that_diffusers_makes(http: httpx.Client) -> None:
    # Another job with many steps is in flight all the time, so that the job under test shares its batch.
    other = http.post("/v1/jobs", json={"prompt": "a panda", "num_inference_steps": 150, "seed": 1}).json()
    body = {
        "prompt": "a smiling cat",
        "negative_prompt": "blue",
        "num_inference_steps": 12,
        "guidance_scale": 4.0,
        "seed": 5,
        "num_images": 2,
    }
    job = finished(http, http.post("/v1/jobs", json=body | {"scheduler": "sa_solver"}).json()["id"])
    finished(http, other["id"])
    assert job["timings"]["shared_steps"] > 0
    pipeline = bundled_model.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = make_scheduler("sa_solver", pipeline.scheduler.config)
    expected = pipeline(
        ["a smiling cat"] * 2,
        negative_prompt=["blue"] * 2,
        num_inference_steps=12,
        guidance_scale=4.0,
        generator=[torch.Generator().manual_seed(seed) for seed in (5, 6)],
        output_type="np",
    ).images
    for image, reference in zip(job["images"], expected, strict=True):
        pixels = np.asarray(Image.open(io.BytesIO(httpx.get(image["url"]).content))).astype(int)
        assert np.abs(pixels - np.round(reference * 255)).max() <= 1  # one step of rounding to 8 bits


def test_parameters_travel_in_the_picture(http: httpx.Client) -> None:
    job = finished(http, http.post("/v1/jobs", json={"prompt": "a key", "num_inference_steps": 2, "seed": 3}).json()["id"])
    picture = Image.open(io.BytesIO(httpx.get(job["images"][0]["url"]).content))
    assert picture.text["parameters"].startswith(f"a key\nSteps: 2, Sampler: DPM++ 2M, CFG scale: 5, Seed: 3, Size: {SIDE}x{SIDE}")  # type: ignore[attr-defined]
    assert json.loads(picture.text["latentline"])["job_id"] == job["id"]  # type: ignore[attr-defined]


def test_cancel_takes_effect_between_steps(http: httpx.Client) -> None:
    job = http.post("/v1/jobs", json={"prompt": "a bear", "num_inference_steps": 150, "num_images": 4}).json()
    with http.stream("GET", f"/v1/jobs/{job['id']}/events", timeout=60) as stream:
        for line in stream.iter_lines():
            if line.startswith("data:") and json.loads(line[5:]).get("step", 0) >= 1:
                break
    assert http.post(f"/v1/jobs/{job['id']}/cancel").json()["cancel_requested"]
    ended = finished(http, job["id"])
    assert ended["status"] == "cancelled" and 1 <= ended["step"] < 150 and ended["images"] == []


def test_events_tell_the_whole_story_and_resume(http: httpx.Client) -> None:
    job = http.post("/v1/jobs", json={"prompt": "a tent", "num_inference_steps": 5}).json()

    def read(after: str | None) -> list[tuple[str, str]]:
        headers = {"last-event-id": after} if after else {}
        text = http.get(f"/v1/jobs/{job['id']}/events", headers=headers, timeout=60).text
        blocks = [
            dict(line.split(": ", 1) for line in block.splitlines()) for block in text.strip().split("\n\n") if block.startswith("id")
        ]
        return [(block["id"], block["event"]) for block in blocks]

    events = read(None)
    assert events[0][1] == "job.queued" and events[1][1] == "job.running" and events[-1][1] == "job.succeeded"
    assert read(events[1][0]) == events[2:]
    assert http.get(f"/v1/jobs/{job['id']}/events", headers={"last-event-id": events[-1][0]}).status_code == 204


def test_a_model_that_nobody_serves_is_refused_with_those_that_are(http: httpx.Client) -> None:
    answer = http.post("/v1/jobs", json={"prompt": "a cat", "model": "sdxl"})
    assert answer.status_code == 422
    assert answer.json()["error"]["field"] == "model" and "latentline-emoji" in answer.json()["error"]["allowed"]


def test_a_size_that_the_model_cannot_do(http: httpx.Client) -> None:
    answer = http.post("/v1/jobs", json={"prompt": "a cat", "width": 72})
    assert (answer.status_code, answer.json()["error"]["field"]) == (422, "width")
    assert http.post("/v1/jobs", json={"prompt": "a cat", "width": 2048, "height": 2048}).status_code == 422


def test_unlike_shapes_run_side_by_side(http: httpx.Client) -> None:
    ids = [
        http.post("/v1/jobs", json={"prompt": "a cat", "width": w, "height": h, "num_inference_steps": 3}).json()["id"]
        for w, h in ((SIDE, SIDE), (96, SIDE), (SIDE, 96))
    ]
    sizes = [(job["images"][0]["width"], job["images"][0]["height"]) for job in (finished(http, job_id) for job_id in ids)]
    assert sizes == [(SIDE, SIDE), (96, SIDE), (SIDE, 96)]


def test_python_client(stack: Stack) -> None:
    with Client(stack.settings) as client:
        job = client.submit(prompt="a crown", num_inference_steps=3, deadline_s=60)
        done = client.wait(job.id, timeout_s=60, check=True)
        assert done.images[0].url is not None and httpx.get(done.images[0].url).status_code == 200
        late = client.submit(prompt="a crown", num_inference_steps=150, num_images=8, deadline_s=0.3)
        error = client.wait(late.id, timeout_s=60).error
        assert error is not None and error.code == "deadline_exceeded"


def test_command_line(stack: Stack, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "latentline.cli",
        "submit",
        "a red apple",
        "--url",
        stack.url,
        "--steps",
        "4",
        "-o",
        str(tmp_path / "a.webp"),
    ]
    done = subprocess.run([*command, "--format", "webp", "--json"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "succeeded"
    with Image.open(tmp_path / "a.webp") as image:
        assert image.format == "WEBP"
    bad = subprocess.run([*command, "--scheduler", "heun3"], capture_output=True, text=True, timeout=60)
    assert bad.returncode == 2 and "scheduler: got 'heun3'; allowed: one of" in bad.stderr and "Traceback" not in bad.stderr


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/openapi.json", "/v1/models"])
def test_service_pages(http: httpx.Client, path: str) -> None:
    assert http.get(path).status_code == 200


def test_jobs_of_a_queue_that_is_longer_than_the_worker_know_their_place(http: httpx.Client) -> None:
    ids = [http.post("/v1/jobs", json={"prompt": "a cat", "num_inference_steps": 100, "num_images": 2}).json()["id"] for _ in range(24)]
    time.sleep(0.5)  # the worker takes what it can hold
    places = [http.get(f"/v1/jobs/{job_id}").json()["queue_position"] for job_id in ids]
    for job_id in reversed(ids):
        http.post(f"/v1/jobs/{job_id}/cancel")
    waiting = [place for place in places if place is not None]
    assert waiting and waiting == list(range(len(waiting)))
    assert {finished(http, job_id)["status"] for job_id in ids} == {"cancelled"}
