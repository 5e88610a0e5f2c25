"""The page in a real Chromium, on the real stack: what a user does, and what must not happen."""

from __future__ import annotations

import contextlib
import io
import itertools
import re
import time
from collections.abc import Callable, Iterator

import httpx
import pytest
from axe_playwright_python.base import AXE_SCRIPT
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Page, Route, expect
from support.browser import Watched, chromium, watched
from support.jobs import SIDE
from support.live_api import serving

from latentline import Settings, records
from latentline.api.app import create_app
from latentline.connection import connect
from latentline.keys import NewKey
from latentline.records import Records
from latentline_worker.embedded.stack import Stack

PATIENCE_MS = 40_000  # on a busy machine


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def keyed(stack: Stack) -> Iterator[str]:
    """Another API on the same services, which wants keys: its address."""
    settings = Settings.from_variables({**stack.environment, "LATENTLINE_AUTH": "keys"})
    with serving(create_app(settings)) as (http, _):
        yield str(http.base_url).rstrip("/")


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Watched]]:
    """Opens a page in a session of its own; at the end, no page may have failed or asked another host."""
    opened: list[tuple[str, Watched]] = []
    contexts: list[BrowserContext] = []

    def open_at(url: str, **options: object) -> Watched:
        context = browser.new_context(**options)  # type: ignore[arg-type]
        context.set_default_timeout(PATIENCE_MS)
        contexts.append(context)
        found = watched(context)
        opened.append((url, found))
        found.page.goto(url)
        return found

    yield open_at
    for context in contexts:
        context.close()
    for url, found in opened:
        assert found.problems == []
        assert found.hosts <= {url.split("/")[2]}


def key_of(stack: Stack, tenant: str, *scopes: str) -> str:
    with contextlib.closing(connect(stack.environment["LATENTLINE_REDIS_URL"])) as client:
        text, _ = records.run(client, records.create_key(NewKey.parse(tenant=tenant, scopes=scopes or ("submit", "read"))))
    return text


def sign_in(page: Page, key: str) -> None:
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Sign in").click()
    page.locator("[name=prompt]").wait_for()


def submit(page: Page, prompt: str, steps: int = 6) -> None:
    page.locator("[name=prompt]").fill(prompt)
    page.locator("[name=num_inference_steps]").fill(str(steps))
    page.locator("[name=prompt]").press("Control+Enter")


def test_a_job_from_prompt_to_picture(stack: Stack, open_page: Callable[..., Watched]) -> None:
    page = open_page(stack.url, viewport={"width": 1280, "height": 900}).page
    submit(page, "a red apple on a blue background", steps=40)
    mine = page.locator(".card").filter(has_text="a red apple on a blue background").first
    mine.locator(".pictures.preview img").first.wait_for()
    page.reload()  # in the middle: nothing is lost
    expect(mine).to_have_class(re.compile("succeeded"), timeout=PATIENCE_MS)
    mine.click()
    dialog = page.get_by_role("dialog")
    expect(dialog.locator(".state")).to_contain_text("Done")
    assert dialog.locator(".stage img").evaluate("image => image.decode().then(() => image.naturalWidth)") == SIDE
    expect(dialog.get_by_text("Timeline")).to_be_visible()
    code = {}
    for name in ("curl", "Python", "openai"):
        dialog.get_by_role("button", name=name, exact=True).click()
        code[name] = dialog.locator("pre").inner_text()
    assert all("a red apple on a blue background" in text for text in code.values())
    compile(code["Python"], "copied", "exec")
    compile(code["openai"], "copied", "exec")
    dialog.get_by_role("button", name="Use these settings").click()
    assert page.locator("[name=seed]").input_value() != ""


def test_previews_sharpen_and_a_running_job_is_cancelled(stack: Stack, open_page: Callable[..., Watched]) -> None:
    page = open_page(stack.url).page
    submit(page, "a slow green tree", steps=150)
    mine = page.locator(".card").filter(has_text="a slow green tree").first
    sources: set[str] = set()
    deadline = time.monotonic() + PATIENCE_MS / 1000
    while len(sources) < 2 and time.monotonic() < deadline:
        sources |= {image.get_attribute("src") or "" for image in mine.locator(".pictures.preview img").all()}
    assert len(sources) >= 2 and all(source.startswith("data:image/webp") for source in sources)
    mine.click()
    page.get_by_role("dialog").get_by_role("button", name="Cancel", exact=True).click()
    expect(page.get_by_role("dialog").locator(".state")).to_contain_text("Cancelled")
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)


def test_prompts_are_only_ever_text(stack: Stack, open_page: Callable[..., Watched]) -> None:
    page = open_page(stack.url).page
    hostile = "<img src=x onerror=\"document.title='broken in'\"><script>document.title='broken in'</script>"
    submit(page, hostile, steps=1)
    mine = page.locator(".card").filter(has_text="broken in").first
    mine.wait_for()
    mine.click()
    expect(page.get_by_role("dialog").locator("h2")).to_have_text(hostile)
    assert page.title() == "latentline" and page.locator("h2 img, h2 script, .caption img").count() == 0


def test_bad_input_is_said_at_the_form(stack: Stack, open_page: Callable[..., Watched]) -> None:
    found = open_page(stack.url)
    found.page.locator("[name=prompt]").fill("a cat")
    found.page.locator("[name=seed]").fill("99999999999")
    found.page.get_by_role("button", name="Make it").click()
    expect(found.page.get_by_role("alert")).to_contain_text("Seed: allowed is")
    assert all("422" in problem for problem in found.problems)
    found.problems.clear()  # the browser itself notes every answer that is an error


def vary(page: Page, prompt: str, values: str, second_values: str) -> None:
    """Submit a grid of steps and schedulers."""
    page.locator("[name=prompt]").fill(prompt)
    if not page.locator("[name=axis]").is_visible():
        page.get_by_text("Variations and presets").click()
    page.locator("[name=axis]").select_option("num_inference_steps")
    page.locator("[name=values]").fill(values)
    page.locator("[name=second]").select_option("scheduler")
    page.locator("[name=second_values]").fill(second_values)
    page.get_by_role("button", name="Make the grid").click()


def test_a_grid_of_two_settings_on_one_labelled_sheet(stack: Stack, http: httpx.Client, open_page: Callable[..., Watched]) -> None:
    page = open_page(stack.url, viewport={"width": 1280, "height": 900}, bypass_csp=True).page
    page.locator("[name=seed]").fill("7")
    vary(page, "a yellow star for the grid", "3, 6", "euler, dpmpp_2m, unipc")
    sheet = page.get_by_role("region", name="Grid")
    expect(sheet.locator("a.frame")).to_have_count(6)
    assert sheet.locator("th").all_inner_texts() == ["Steps 3", "Steps 6", "Sampler euler", "Sampler dpmpp_2m", "Sampler unipc"]
    save = page.get_by_role("button", name="Save the sheet")
    expect(save).to_be_enabled(timeout=PATIENCE_MS)
    jobs = http.get("/v1/jobs", params={"metadata": f"grid:{page.url.rsplit('/', 1)[1]}"}).json()["jobs"]
    requests = [job["request"] for job in jobs]
    combinations = {(request["num_inference_steps"], request["scheduler"]) for request in requests}
    assert combinations == set(itertools.product((3, 6), ("euler", "dpmpp_2m", "unipc")))
    assert {request["seed"] for request in requests} == {7}
    page.reload()  # its address is enough
    expect(sheet.locator("a.frame img")).to_have_count(6)
    with page.expect_download() as started:
        save.click()
    drawn = Image.open(started.value.path()).convert("RGB")
    right, bottom = drawn.width - 16, drawn.height - 16  # without the margin
    side, pitch = SIDE * 3, SIDE * 3 + 8  # three times enlarged, and a gap
    places = itertools.product((right - side - pitch, right - side), (bottom - side - 2 * pitch, bottom - side - pitch, bottom - side))
    cells = [drawn.crop((x, y, x + side, y + side)) for x, y in places]
    assert len({cell.tobytes() for cell in cells}) == 6, "each cell has a picture of its own"
    small = [cell.resize((SIDE, SIDE), Image.Resampling.NEAREST) for cell in cells]
    assert [cell.tobytes() for cell in cells] == [one.resize((side, side), Image.Resampling.NEAREST).tobytes() for one in small]
    assert violations(page) == []
    sheet.locator("a.frame").first.click()
    expect(page.get_by_role("dialog").get_by_role("link", name="Its grid")).to_be_visible()
    page.keyboard.press("Escape")
    expect(sheet.locator("a.frame")).to_have_count(6)  # the sheet is still there


def test_what_no_grid_can_be_is_said_and_nothing_is_made(stack: Stack, http: httpx.Client, open_page: Callable[..., Watched]) -> None:
    page = open_page(stack.url).page
    many = ", ".join(map(str, range(1, 34)))
    for values, second, words in (
        ("1, many", "euler", "Steps: many is no number"), ("1, 1", "euler", "stands twice"), ("1", "", "Write the values"),
        (many, "euler, unipc", "at most 64 pictures"), ("1, 2", "euler, nothing", "Sampler: allowed is one of: ddim"),
    ):  # fmt: skip
        vary(page, "a grid that is none", values, second)
        expect(page.get_by_role("alert")).to_contain_text(words)
    jobs = [job for job in http.get("/v1/jobs").json()["jobs"] if job["request"]["prompt"] == "a grid that is none"]
    assert len(jobs) == 2 and all(job["cancel_requested"] or job["status"] == "succeeded" for job in jobs)  # of the last one, half


def test_a_dropped_picture_gives_its_settings(stack: Stack, http: httpx.Client, open_page: Callable[..., Watched]) -> None:
    pictures = {}
    for kind in ("png", "webp", "jpeg"):
        body = {
            "prompt": f"a {kind} drop, größer",
            "num_inference_steps": 1,
            "seed": 4711,
            "scheduler": "euler",
            "output": {"format": kind},
        }
        job = http.post("/v1/jobs", json=body).json()
        while job["status"] in ("queued", "running"):
            job = http.get(f"/v1/jobs/{job['id']}", params={"wait": 20}).json()
        pictures[kind] = http.get(f"/v1/jobs/{job['id']}/images/0").content
    page = open_page(stack.url).page
    page.locator("[name=scheduler]").wait_for()
    drop = """([name, bytes]) => { const data = new DataTransfer(); data.items.add(new File([new Uint8Array(bytes)], name));
        document.querySelector(".page").dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true})) }"""
    for kind, content in pictures.items():
        page.evaluate(drop, [f"picture.{kind}", list(content)])
        expect(page.locator("[name=prompt]")).to_have_value(f"a {kind} drop, größer")
        expect(page.locator("[name=seed]")).to_have_value("4711")
        expect(page.locator("[name=scheduler]")).to_have_value("euler")
    for name, content in (("other.png", b"\x89PNG\r\n\x1a\n"), ("cut.jpeg", pictures["jpeg"][:40]), ("text.txt", b"hello")):
        page.evaluate(drop, [name, list(content)])
        expect(page.locator(".said")).to_contain_text(name)


def test_tenants_see_their_own_jobs_and_sign_out(stack: Stack, keyed: str, open_page: Callable[..., Watched]) -> None:
    pages = {}
    for tenant in ("ann", "bob"):
        found = open_page(keyed)
        found.page.get_by_label("API key").wait_for()
        found.problems.clear()  # the answer that nobody is signed in
        sign_in(found.page, key_of(stack, tenant))
        submit(found.page, f"a gift of {tenant}", steps=1)
        found.page.locator(".card").filter(has_text=f"a gift of {tenant}").first.wait_for()
        pages[tenant] = found
    for tenant, found in pages.items():
        found.page.reload()
        found.page.locator(".card").first.wait_for()
        assert all(f"a gift of {tenant}" in text for text in found.page.locator(".card .caption").all_inner_texts())
        assert found.page.get_by_role("link", name="Fleet").count() == 0  # for administrators
    page = pages["ann"].page
    cookies = page.context.cookies()
    assert cookies[0]["httpOnly"] and cookies[0]["sameSite"] == "Strict" and page.evaluate("document.cookie") == ""
    page.get_by_role("button", name="Sign out").click()
    page.get_by_label("API key").wait_for()
    page.reload()
    page.get_by_label("API key").wait_for()
    pages["ann"].problems.clear()
    assert page.locator(".card").count() == 0 and page.context.cookies() == []


def test_a_wrong_key_is_said(keyed: str, open_page: Callable[..., Watched]) -> None:
    found = open_page(keyed)
    found.page.get_by_label("API key").fill("ll_nothing")
    found.page.get_by_role("button", name="Sign in").click()
    expect(found.page.get_by_role("alert")).to_contain_text("no API key")
    found.problems.clear()


def test_the_fleet_for_administrators(stack: Stack, keyed: str, open_page: Callable[..., Watched]) -> None:
    found = open_page(keyed)
    found.page.get_by_label("API key").wait_for()
    found.problems.clear()
    sign_in(found.page, key_of(stack, "operators", "admin"))
    found.page.get_by_role("link", name="Fleet").click()
    expect(found.page.locator(".worker")).to_have_count(1)
    expect(found.page.locator(".worker .models .warm")).to_have_text("latentline-emoji")
    expect(found.page.locator(".worker")).to_contain_text("of 16")
    letter = found.page.get_by_role("row").filter(has_text="<b>it</b> failed")
    with contextlib.closing(connect(stack.environment["LATENTLINE_REDIS_URL"])) as client:
        request = '{"model": "latentline-emoji", "prompt": "a job that is sent again", "num_inference_steps": 1}'
        Records(client).bury("dead-on-the-page", "job", "<b>it</b> failed", request=request)
    letter.get_by_role("button", name="Replay").click()
    expect(found.page.locator(".said")).to_have_text("Sent again.")
    expect(letter).to_have_count(0)


def test_ten_thousand_jobs_scroll_without_all_of_them_in_the_page(stack: Stack, open_page: Callable[..., Watched]) -> None:
    page = open_page(stack.url, viewport={"width": 1280, "height": 900}).page
    page.locator(".form").wait_for()
    asked: list[str] = []
    png = io.BytesIO()
    Image.new("RGB", (8, 8)).save(png, "PNG")

    def picture(route: Route) -> None:
        asked.append(route.request.url.split("/v1/")[1])
        route.fulfill(body=png.getvalue(), content_type="image/png")

    page.route("**/v1/jobs/job-*/images/**", picture)
    page.evaluate("""async () => { const { store } = await import("/page/store.js"); await store.loading;
        store.complete = true;
        store.news = async () => {}; // of other tests
        const job = { status: "succeeded", images: [{ width: 1024, height: 1024, content_type: "image/png" }], timings: {} };
        for (let n = 0; n < 10000; n++) store.add({ ...job, id: `job-${n}`, request: { prompt: `number ${n}` } }) }""")
    page.locator(".card").filter(has_text="number 9999").wait_for()
    cards = page.evaluate("""async () => { const cards = [];
        for (let n = 0; n < 40; n++) { scrollTo(0, (n / 39) * document.body.scrollHeight);
            await new Promise(requestAnimationFrame); await new Promise(requestAnimationFrame);
            cards.push([...document.querySelectorAll(".card")].map((card) => card.hash)) }
        return cards }""")
    assert max(map(len, cards)) < 120 and min(map(len, cards)) > 4
    # Pictures of cards alone are asked for, each once and small: cards show thumbnails of large pictures.
    assert len(asked) == len(set(asked)) <= len({card for shown in cards for card in shown}) + 120
    assert all(url.endswith("/images/0/thumbnail?width=512") for url in asked)
    # Those that run below are followed by nobody.
    page.route("**/v1/events?**", lambda route: route.fulfill(body=": nothing\n\n", content_type="text/event-stream"))
    changes = """async ([id, fields, most]) => { const { store } = await import("/page/store.js");
        let changes = 0; const observer = new MutationObserver((found) => (changes += found.length));
        observer.observe(document.body, { subtree: true, childList: true, attributes: true, characterData: true });
        if (fields) store.patch(id, fields); else store.add({ ...store.jobs.get("job-1"), id });
        for (let n = 0; n < (most ? 300 : 10) && !changes; n++) await new Promise((done) => setTimeout(done, 30));
        await new Promise(requestAnimationFrame); await new Promise(requestAnimationFrame);
        observer.disconnect(); return changes }"""
    page.evaluate("""async () => { let last = performance.now(); // pictures that were asked for last still appear
        const observer = new MutationObserver(() => (last = performance.now()));
        observer.observe(document.body, { subtree: true, childList: true, attributes: true });
        while (performance.now() - last < 500) await new Promise((done) => setTimeout(done, 30));
        observer.disconnect() }""")
    # What one event changes in the page: nothing for a job that is out of sight, its own card for one that is seen, and with a new job
    # the places of the cards that are seen, whatever else is in the list.
    seen = cards[-1][0].rsplit("/", 1)[1]
    running = {"status": "running", "step": 3, "num_steps": 9, "images": [], "phase": "denoising"}
    for job, fields, most in (
        ("job-9000", running, 0),
        (seen, running, 12),
        (seen, {"step": 4}, 4),
        ("job-new", None, 12 * len(cards[-1])),
    ):
        assert min(most, 1) <= page.evaluate(changes, [job, fields, most]) <= most, (job, fields)
    page.route("**/v1/jobs/job-0/timeline", lambda route: route.fulfill(json={"attempts": [], "callbacks": []}))
    page.evaluate("location.hash = '#/job/job-0'")
    page.get_by_role("dialog").locator(".stage img").wait_for()
    assert asked[-1] == "jobs/job-0/images/0"  # the whole picture


def violations(page: Page) -> list[tuple[str, list[str]]]:
    """What axe-core calls serious or critical in what is shown now, and where."""
    page.wait_for_timeout(600)  # animations change colours
    page.evaluate(AXE_SCRIPT)
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    serious = [one for one in found if one["impact"] in ("serious", "critical")]
    return [(one["id"], [node["html"][:150] for node in one["nodes"]]) for one in serious]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_page_has_no_serious_violation_of_accessibility(stack: Stack, open_page: Callable[..., Watched], theme: str) -> None:
    page = open_page(stack.url, color_scheme=theme, viewport={"width": 1280, "height": 900}, bypass_csp=True).page
    submit(page, f"a {theme} bulb", steps=1)
    mine = page.locator(".card").filter(has_text=f"a {theme} bulb").first
    expect(mine).to_have_class(re.compile("succeeded"), timeout=PATIENCE_MS)
    for part in ("#/", "#/fleet", f"#/job/{str(mine.get_attribute('href')).rsplit('/', 1)[1]}"):
        page.evaluate("part => { location.hash = part }", part)
        page.locator({"#/": ".card", "#/fleet": ".worker"}.get(part, "dialog .state")).first.wait_for()
        assert violations(page) == []


def test_the_keyboard_alone_is_enough_on_a_phone(stack: Stack, open_page: Callable[..., Watched]) -> None:
    page = open_page(stack.url, viewport={"width": 390, "height": 844}, reduced_motion="reduce").page
    page.get_by_text("Settings", exact=True).press("Enter")  # folded on a narrow screen
    submit(page, "a phone by keyboard", steps=1)
    mine = page.locator(".card").filter(has_text="a phone by keyboard").first
    expect(mine).to_have_class(re.compile("succeeded"), timeout=PATIENCE_MS)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")  # nothing sticks out
    mine.focus()
    page.keyboard.press("Enter")
    page.get_by_role("dialog").wait_for()
    assert page.evaluate("document.querySelector('dialog').contains(document.activeElement)")
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
