"""Thumbnails: small, kept, and made once however many ask."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator

import pytest
from PIL import Image
from support.live_api import Live, live_api, problem

from latentline.api import thumbnails
from latentline.api.thumbnails import Thumbnails, shrink


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Iterator[Live]:
    with live_api(monkeypatch) as running:
        yield running


def picture(width: int, height: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    made = Image.radial_gradient("L").resize((width, height)).convert("RGB")
    made.save(buffer, kind)
    return buffer.getvalue()


def path_of(live: Live, data: bytes) -> str:
    """The path of the first picture of a job whose pictures are these bytes."""
    job_id = live.submit(num_images=2)["id"]
    live.worker.run_all()
    for key in live.images.objects:
        live.images.objects[key] = data
    return f"/v1/jobs/{job_id}/images/0/thumbnail"


@pytest.mark.parametrize(
    ("size", "shown"), [((512, 256), (256, 128)), ((300, 900), (256, 768)), ((64, 64), (64, 64)), ((2048, 8), (256, 1))]
)
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_a_picture_is_shrunk_to_the_width_with_its_shape(size: tuple[int, int], shown: tuple[int, int], kind: str) -> None:
    small = Image.open(io.BytesIO(shrink(picture(*size, kind), 256)))
    assert (small.format, small.size) == ("WEBP", shown) and not small.info.get("exif")


def test_a_thumbnail_is_small_and_kept(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    path = path_of(live, picture(1024, 1024))
    answer = live.http.get(path)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/webp") and len(answer.content) < 20_000
    assert Image.open(io.BytesIO(answer.content)).size == (256, 256)
    assert "immutable" in answer.headers["cache-control"] and answer.headers["x-content-type-options"] == "nosniff"
    live.images.objects.clear()  # neither the store nor Pillow is asked again
    monkeypatch.setattr(thumbnails, "shrink", None)
    assert live.http.get(path).content == answer.content
    again = live.http.get(path, headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert live.http.head(path).headers["etag"] == answer.headers["etag"]
    assert live.http.get(path, params={"width": 64}).status_code == 503  # another one would have to be made


def test_each_width_is_a_thumbnail_of_its_own_and_others_are_refused(live: Live) -> None:
    path = path_of(live, picture(1024, 512))
    answers = {width: live.http.get(path, params={"width": width}) for width in (64, 128, 256, 512)}
    assert [Image.open(io.BytesIO(answer.content)).width for answer in answers.values()] == list(answers)
    assert len({answer.headers["etag"] for answer in answers.values()}) == 4
    for width in ("0", "63", "1024", "-64", "x", ""):
        assert problem(live.http.get(path, params={"width": width}), 422, "invalid_request")["field"] == "width"
    problem(live.http.get(path.replace("/images/0/", "/images/2/")), 404, "picture_not_found")
    problem(live.http.get(path.replace("/images/0/", "/images/-1/")), 404, "picture_not_found")
    problem(live.http.get("/v1/jobs/none/images/0/thumbnail"), 404, "job_not_found")


def test_many_who_ask_at_once_have_it_made_once_and_the_oldest_make_room() -> None:
    data, fetched = picture(128, 128), []

    async def ask(kept: Thumbnails, name: str) -> bytes:
        async def fetch() -> bytes:
            fetched.append(name)
            return data

        return await kept.get(name, 64, fetch)

    async def run() -> None:
        kept = Thumbnails()
        assert len(set(await asyncio.gather(*(ask(kept, "a") for _ in range(20))))) == 1 and fetched.count("a") == 1
        one = await ask(kept, "a")
        few = Thumbnails(max_bytes=2 * len(one))
        for name in ("a", "b", "a", "c", "a", "b"):
            await ask(few, name)
        assert fetched[1:] == ["a", "b", "c", "b"]
        tiny = Thumbnails(max_bytes=1)
        assert await ask(tiny, "a") == one  # one that is larger than all of the room is given all the same

    asyncio.run(run())
