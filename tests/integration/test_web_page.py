"""The page of docs/usage.md in a real Chromium, from another origin than the API's: ten jobs on one stream, each picture loaded once."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import redis
from support.apis import Apis
from support.browser import Origin, chromium
from support.live_api import live_api, sse

from latentline import Settings, records
from latentline.api import events
from latentline.event_reader import EventReader
from latentline.keys import NewKey
from latentline.testing import TINY_PNG, FakeImages, FakeWorker

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Request

PAGE = re.search(r"```html\n(.+?)```", (Path(__file__).parents[2] / "docs/usage.md").read_text(), re.DOTALL)
PATIENCE_MS = 60_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture
def pages() -> Iterator[Origin]:
    origin = Origin()
    yield origin
    origin.close()


@pytest.fixture
def store() -> Iterator[Origin]:
    origin = Origin()
    yield origin
    origin.close()


@pytest.fixture
def apis(empty_valkey: redis.Redis, valkey_url: str, tmp_path: Path, pages: Origin, store: Origin) -> Iterator[Apis]:
    running = Apis(
        tmp_path,
        valkey_url,
        LATENTLINE_AUTH="keys",
        LATENTLINE_CORS_ORIGINS=pages.url,
        LATENTLINE_S3_ENDPOINT_URL=store.url,
    )
    running.start()
    yield running
    running.close()


class Worker(FakeWorker):
    """A worker whose pictures land in the store that the browser reaches."""

    def __init__(self, client: redis.Redis, store: Origin) -> None:
        images = FakeImages()
        images.put = lambda key, data: store.serve(f"/images/{key}", data, "image/png")  # type: ignore[method-assign, assignment, return-value]
        super().__init__(client, images)


def test_a_page_of_another_origin_follows_ten_jobs_on_one_stream(
    browser: Browser, pages: Origin, store: Origin, apis: Apis, empty_valkey: redis.Redis
) -> None:
    assert PAGE and len(PAGE[1].splitlines()) <= 35
    worker = Worker(empty_valkey, store)
    worker.announce()
    key, _ = records.run(empty_valkey, records.create_key(NewKey.parse(tenant="shop")))
    (api,) = apis.urls
    page = browser.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    streams: list[str] = []
    page.on("request", lambda request: streams.append(request.url) if "/v1/events?" in request.url else None)
    page.goto(pages.serve("/", PAGE[1].replace("http://localhost:8000", api).replace("ll_...", key)))

    page.click("button")
    page.wait_for_function("document.querySelectorAll('figure').length == 10", timeout=PATIENCE_MS)
    page.wait_for_function("document.querySelectorAll('figcaption')[9].textContent == 'queued'", timeout=PATIENCE_MS)
    apis.restart(api)  # the browser comes back by itself, to the process that follows
    page.wait_for_event("request", lambda request: "/v1/events?" in request.url, timeout=PATIENCE_MS)
    worker.run_all()
    page.wait_for_function("[...document.images].filter((image) => image.naturalWidth).length == 10", timeout=PATIENCE_MS)
    assert page.locator("figcaption").all_text_contents() == ["succeeded"] * 10
    assert len(streams) >= 2 and len({url.split("last_event_id")[0] for url in streams}) == 1, "one stream for all ten, opened again"

    pictures = {path: count for path, count in store.asked.items() if path.startswith("/images/")}
    assert len(pictures) == 10 and set(pictures.values()) == {1}
    assert polled(page, api, key) == 30
    assert {path: count for path, count in store.asked.items() if path.startswith("/images/")} == pictures, "polls load no picture anew"
    assert problems == [] and all(content == TINY_PNG for _, content in store.files.values())


LISTENING = """<script>
window.told = [];
window.source = new EventSource("API/v1/jobs/ID/events");
for (const type of ["queued", "running", "progress", "succeeded"])
  source.addEventListener(`job.${type}`, (event) => told.push(event.lastEventId));
source.addEventListener("end", () => { source.close(); window.ended = true; });
</script>"""


def test_an_eventsource_comes_back_while_the_broker_is_away(browser: Browser, pages: Origin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "AWAY_MS", 50)
    monkeypatch.setattr(EventReader, "outage_s", 0.0)
    with live_api(monkeypatch, Settings(cors_origins=pages.url)) as live:
        job_id = live.submit()["id"]
        page, asked = browser.new_page(), 0

        def counted(request: Request) -> None:
            nonlocal asked
            asked += "/events" in request.url

        page.on("request", counted)
        page.goto(pages.serve("/", LISTENING.replace("API", str(live.http.base_url).rstrip("/")).replace("ID", job_id)))
        page.wait_for_function("told.length == 1", timeout=PATIENCE_MS)
        live.redis.connected = False
        while asked < 4:
            page.wait_for_event("request", timeout=PATIENCE_MS)
        assert page.evaluate("source.readyState") != 2, "it is not closed"
        live.redis.connected = True
        live.worker.run_all()
        page.wait_for_function("window.ended", timeout=PATIENCE_MS)
        told = page.evaluate("told")
        assert told == [event_id for event_id, kind, _ in sse(live.http.get(f"/v1/jobs/{job_id}/events").text) if kind != "end"]
        page.close()


def polled(page: Page, api: str, key: str) -> Any:
    """Poll each job three times and show the picture of each answer again; how many pictures were shown."""
    return page.evaluate(
        """async ([api, key]) => {
            let shown = 0;
            for (let round = 0; round < 3; round++)
                for (const figure of document.querySelectorAll("figure")) {
                    const answer = await fetch(`${api}/v1/jobs/${figure.id}`, { headers: { authorization: `Bearer ${key}` } });
                    const image = figure.querySelector("img");
                    image.src = (await answer.json()).images[0].url;
                    await image.decode();
                    shown++;
                }
            return shown;
        }""",
        [api, key],
    )
