"""Replicate's own client, unmodified, against the whole stack: only its base URL is another."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import replicate
from PIL import Image
from replicate.prediction import Prediction
from replicate.webhook import InvalidSignatureError, Webhooks
from support.jobs import PATIENCE_S, SIDE, until
from support.receiver import Receiver

from latentline_worker.embedded.stack import Stack

MODEL = "latentline/latentline-emoji"


@pytest.fixture(scope="module")
def client(stack: Stack) -> Iterator[replicate.Client]:
    made = replicate.Client(api_token="none is asked for", base_url=f"{stack.url}/replicate")
    made.poll_interval = 0.05
    yield made
    made._client.close()


def pictures(output: Any) -> list[Image.Image]:
    return [Image.open(io.BytesIO(one.read())) for one in output]


def test_run(client: replicate.Client, http: httpx.Client) -> None:
    asked = {"prompt": "a red apple", "num_outputs": 2, "num_inference_steps": 3, "seed": 7, "scheduler": "K_EULER"}
    found = pictures(client.run(MODEL, input=asked))
    assert [(one.size, one.format) for one in found] == [((SIDE, SIDE), "PNG")] * 2 and found[0].tobytes() != found[1].tobytes()
    newest = http.get("/v1/jobs", params={"limit": 1}).json()["jobs"][0]["request"]
    assert (newest["seed"], newest["num_images"], newest["scheduler"]) == (7, 2, "euler")


def test_run_by_an_alias_and_in_asyncio(stack: Stack) -> None:
    async def run() -> Any:
        client = replicate.Client(api_token="none", base_url=f"{stack.url}/replicate")
        output = await client.async_run("latentline/gpt-image-2", input={"prompt": "a cat", "num_inference_steps": 2})
        files = [await one.aread() for one in output]
        await client._async_client.aclose()
        return files

    (data,) = asyncio.run(run())
    assert Image.open(io.BytesIO(data)).size == (SIDE, SIDE)


def test_create_and_wait(client: replicate.Client) -> None:
    at_once = client.models.predictions.create(model=MODEL, input={"prompt": "a key", "num_inference_steps": 2}, wait=60)
    assert at_once.status == "succeeded" and at_once.output and at_once.output[0].startswith("data:image/png;base64,")
    polled = client.predictions.create(version=MODEL, input={"prompt": "a key", "num_inference_steps": 30})
    assert polled.status == "starting"
    seen = until(lambda: polled.reload() or polled.progress)
    assert 0 < seen.current <= seen.total == 30
    polled.wait()
    assert polled.status == "succeeded" and polled.metrics and polled.metrics["predict_time"] > 0
    assert polled.progress and polled.progress.percentage == 1.0


def test_cancel_and_list(client: replicate.Client) -> None:
    made = client.predictions.create(version=MODEL, input={"prompt": "a bear", "num_inference_steps": 150, "num_outputs": 4})
    until(lambda: made.reload() or made.status == "processing")
    made.cancel()
    made.wait()
    assert made.status == "canceled" and made.output is None
    after = client.predictions.create(version=MODEL, input={"prompt": "a bear", "num_inference_steps": 1})
    after.wait()
    listed = client.predictions.list().results
    assert [(one.id, one.status) for one in listed[:2]] == [(after.id, "succeeded"), (made.id, "canceled")]


def test_stream(client: replicate.Client) -> None:
    events = list(client.stream(MODEL, input={"prompt": "a tent", "num_inference_steps": 12, "num_outputs": 2}))
    kinds = [event.event.value for event in events]
    assert kinds[-3:] == ["output", "output", "done"] and set(kinds[:-3]) == {"logs"} and len(kinds) > 4
    assert "/12\n" in f"{events[-4].data}\n", "the bar of a step"
    assert [one.size for one in pictures(event.data for event in events[-3:-1])] == [(SIDE, SIDE)] * 2


def test_webhooks(client: replicate.Client) -> None:
    receiver = Receiver()
    made = client.predictions.create(version=MODEL, input={"prompt": "a crown", "num_inference_steps": 3}, webhook=receiver.url)
    for _ in range(2):
        assert receiver.arrived.acquire(timeout=PATIENCE_S)
    receiver.close()
    told = {one.status: one for one in (Prediction(**json.loads(body)) for _, body in receiver.requests)}
    assert set(told) == {"processing", "succeeded"}
    secret = client.webhooks.default.secret()
    for headers, body in receiver.requests:
        Webhooks.validate(headers=headers, body=body.decode(), secret=secret, tolerance=300)
        with pytest.raises(InvalidSignatureError):
            Webhooks.validate(headers=headers | {"webhook-id": "another"}, body=body.decode(), secret=secret)
    ended, read = told["succeeded"], client.predictions.get(made.id)
    assert ended.dict(exclude={"output"}) == read.dict(exclude={"output"})
    (url,) = ended.output or []
    answer = httpx.get(url)  # by whoever has the URL: no key goes with it
    assert read.output == [f"data:image/png;base64,{base64.b64encode(answer.content).decode()}"]
