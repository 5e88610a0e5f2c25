"""OpenAI's own client, unmodified, against the whole stack: only its base URL is another."""

from __future__ import annotations

import asyncio
import base64
import io
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from PIL import Image
from support.jobs import SIDE
from support.proxy import Filter, Proxy

from latentline_worker.embedded.stack import Stack

PATIENCE_S = 60
SIZE = f"{SIDE}x{SIDE}"


@pytest.fixture(scope="module")
def client(stack: Stack) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{stack.url}/openai/v1", api_key="none is asked for", max_retries=0) as made:
        yield made


@pytest.fixture
def user() -> str:
    """Marks the jobs of one test."""
    return f"user-{uuid.uuid4()}"


def picture(data: str | None) -> Image.Image:
    assert data
    return Image.open(io.BytesIO(base64.b64decode(data)))


def jobs_of(http: httpx.Client, user: str) -> list[dict[str, Any]]:
    return [job for job in http.get("/v1/jobs", params={"limit": 200}).json()["jobs"] if job["request"]["metadata"].get("user") == user]


def test_three_pictures(client: OpenAI, http: httpx.Client, user: str) -> None:
    answer = client.images.generate(
        prompt="a red apple",
        n=3,
        size=f"{SIDE}x{SIDE}",
        user=user,
        extra_body={"seed": 7, "steps": 3, "guidance": 2.5, "scheduler": "unipc"},
    )
    assert [picture(one.b64_json).size for one in answer.data or []] == [(SIDE, SIDE)] * 3
    assert len({one.b64_json for one in answer.data or []}) == 3
    assert (answer.size, answer.output_format, answer.background) == (f"{SIDE}x{SIDE}", "png", "opaque") and abs(
        answer.created - time.time()
    ) < 600
    (job,) = jobs_of(http, user)
    asked = {name: job["request"][name] for name in ("seed", "num_images", "num_inference_steps", "guidance_scale", "scheduler")}
    assert asked == {"seed": 7, "num_images": 3, "num_inference_steps": 3, "guidance_scale": 2.5, "scheduler": "unipc"}
    assert answer.to_dict()["id"] == answer._request_id == job["id"] and answer.to_dict()["seeds"] == [7, 8, 9]
    again = httpx.get(f"{client.base_url}images/generations/{job['id']}").json()
    assert [one["b64_json"] for one in again["data"]] == [one.b64_json for one in answer.data or []]


def test_every_documented_field(client: OpenAI, http: httpx.Client, user: str) -> None:
    """Each is honoured, or a warning in the answer says that it is not."""
    answer = client.images.generate(
        prompt="a key",
        model="gpt-image-2",
        n=1,
        size="auto",
        output_format="jpeg",
        output_compression=40,
        response_format="url",
        user="somebody else",
        safety_identifier=user,
        stream=False,
        partial_images=2,
        background="transparent",
        moderation="low",
        quality="hd",
        style="vivid",
        complexity="low",
        frame_count=4,
        frame_duration_ms=100,
        svg={"model": "an author"},
        extra_body={"steps": 2, "negative_prompt": "blue", "loras": [{"name": "one", "scale": 0.5}]},
    )
    (job,) = jobs_of(http, user)
    request = job["request"]
    assert (request["model"], request["output"]) == ("latentline-emoji", {"format": "jpeg", "quality": 40})
    assert (request["negative_prompt"], request["loras"]) == ("blue", [{"name": "one", "scale": 0.5}])
    ignored = [warning.split(" ")[0] for warning in answer.to_dict()["warnings"]]  # type: ignore[union-attr]
    assert sorted(ignored) == [
        "background", "complexity", "frame_count", "frame_duration_ms", "moderation", "partial_images", "quality", "style", "svg",
    ]  # fmt: skip
    (one,) = answer.data or []
    assert one.b64_json is None and one.url and answer.safety_identifier == user
    fetched = httpx.get(one.url)  # by whoever has the URL: no key goes with it
    assert fetched.headers["content-type"] == "image/jpeg" and Image.open(io.BytesIO(fetched.content)).format == "JPEG"


def test_asking_for_nothing_special_gives_no_warnings(client: OpenAI) -> None:
    answer = client.images.generate(
        prompt="a key", background="opaque", moderation="auto", quality="auto", output_format="webp", extra_body={"steps": 1}
    )
    assert "warnings" not in answer.to_dict() and picture((answer.data or [])[0].b64_json).format == "WEBP"


def test_a_stream_with_partial_images(client: OpenAI) -> None:
    stream = client.images.generate(
        prompt="a tent", stream=True, partial_images=3, n=2, quality="low", output_format="webp", extra_body={"steps": 24, "seed": 1}
    )
    events = list(stream)
    partial = [event for event in events if event.type == "image_generation.partial_image"]
    completed = [event for event in events if event.type == "image_generation.completed"]
    assert events == partial + completed and 1 <= len(partial) <= 6 and len(completed) == 2
    assert [event.partial_image_index for event in partial] == [i // 2 for i in range(len(partial))]
    for event in events:
        assert (
            picture(event.b64_json).format == event.output_format.upper()
            and event.size == f"{SIDE}x{SIDE}"
            and event.background == "opaque"
        )
    assert completed[0].output_format == "webp" and completed[0].usage.total_tokens == 0
    assert completed[0].to_dict()["warnings"] == ["quality was ignored: steps decides"]


def test_asyncio(stack: Stack) -> None:
    async def both() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{stack.url}/openai/v1", api_key="none") as client:
            whole = client.images.generate(prompt="a cat", extra_body={"steps": 2})
            stream = await client.images.generate(prompt="a cat", stream=True, extra_body={"steps": 2})
            return [(await whole).data, [event.type async for event in stream]]

    (one,), events = asyncio.run(both())
    assert picture(one.b64_json).size == (SIDE, SIDE) and events == ["image_generation.completed"]


def test_models(client: OpenAI) -> None:
    assert {model.id for model in client.models.list()} == {"latentline-emoji", "gpt-image-2"}
    assert client.models.retrieve("gpt-image-2").id == "gpt-image-2"
    with pytest.raises(openai.NotFoundError) as refused:
        client.models.retrieve("dall-e-3")
    assert (refused.value.param, refused.value.code) == ("model", "model_not_found")


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")  # variations, for the vendor
@pytest.mark.parametrize("call", ["edit", "create_variation"])
def test_what_needs_image_inputs_says_so(client: OpenAI, call: str) -> None:
    more = {"prompt": "a cat"} if call == "edit" else {}
    with pytest.raises(openai.InternalServerError) as refused:
        getattr(client.images, call)(image=b"a picture", **more)
    assert refused.value.status_code == 501 and refused.value.code == "unsupported_endpoint"
    assert refused.value.response.headers["x-should-retry"] == "false"


class Moment:
    """When the connection of the first sending is cut."""

    def __init__(self) -> None:
        self._onward, self._back, self.cuts = b"", 0, 0

    def nothing_sent(self, onward: bool, data: bytes) -> tuple[bytes, bool]:
        return self._once(onward, data, b"", onward)

    def request_sent(self, onward: bool, data: bytes) -> tuple[bytes, bool]:
        self._onward += data if onward else b""
        head, _, body = self._onward.partition(b"\r\n\r\n")
        length = next((int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")), -1)
        return self._once(onward, data, data, onward and len(body) == length)

    def in_the_head(self, onward: bool, data: bytes) -> tuple[bytes, bool]:
        return self._once(onward, data, data[:30], not onward)

    def in_the_body(self, onward: bool, data: bytes) -> tuple[bytes, bool]:
        self._back += 0 if onward else len(data)
        return self._once(onward, data, data[:-10], not onward and self._back > 1000)

    def _once(self, onward: bool, data: bytes, passed: bytes, now: bool) -> tuple[bytes, bool]:
        if self.cuts or not now:
            return data, False
        self.cuts += 1
        return passed, True


@pytest.fixture
def proxy(stack: Stack) -> Iterator[Proxy]:
    made = Proxy(int(stack.url.rpartition(":")[2]))
    yield made
    made.close()


MOMENTS = ["nothing_sent", "request_sent", "while_it_runs", "in_the_head", "in_the_body"]


@pytest.mark.parametrize("moment", MOMENTS)
def test_an_answer_that_is_lost_is_not_paid_for_twice(proxy: Proxy, http: httpx.Client, user: str, moment: str) -> None:
    cutter = Moment()
    if moment == "while_it_runs":
        threading.Thread(
            target=cut_when, args=(proxy, lambda: any(job["step"] for job in jobs_of(http, user)), cutter), daemon=True
        ).start()
    else:
        passes: Filter = getattr(cutter, moment)
        proxy.filter = passes
    with OpenAI(base_url=f"http://127.0.0.1:{proxy.port}/openai/v1", api_key="none", max_retries=2) as client:
        answer = client.images.generate(prompt="a rocket", user=user, extra_body={"steps": 60 if moment == "while_it_runs" else 4})
    assert cutter.cuts == 1
    (job,) = jobs_of(http, user)
    assert [picture(one.b64_json).size for one in answer.data or []] == [(SIDE, SIDE)] and answer.to_dict()["id"] == job["id"]


def cut_when(proxy: Proxy, now: Callable[[], bool], cutter: Moment) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not now() and time.monotonic() < deadline:
        time.sleep(0.02)
    cutter.cuts += 1
    proxy.reset()


def test_a_client_that_runs_out_of_patience_gets_the_same_job(client: OpenAI, http: httpx.Client, user: str) -> None:
    impatient = client.with_options(timeout=0.25, max_retries=100)
    answer = impatient.images.generate(prompt="a robot", user=user, extra_body={"steps": 30})
    assert len(answer.data or []) == 1 and len(jobs_of(http, user)) == 1


def test_equal_requests_without_a_mark_are_different_jobs(client: OpenAI, http: httpx.Client, user: str) -> None:
    for _ in range(2):
        client.images.generate(prompt="a crown", user=user, extra_body={"steps": 1})
    assert len(jobs_of(http, user)) == 2
