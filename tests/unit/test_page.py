"""The page's files: small, whole, and loading nothing from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.live_api import Live, live_api, problem

import latentline.api.page

FILES = Path(latentline.api.page.__file__).parent / "static"
MOST_BYTES = 300 * 1024


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Iterator[Live]:
    with live_api(monkeypatch) as running:
        yield running


def test_the_page_is_small_and_loads_nothing_from_elsewhere(live: Live) -> None:
    files = [path for path in FILES.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < MOST_BYTES
    page = live.http.get("/")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    served = {path.relative_to(FILES).as_posix() for path in files}
    for path in served:
        answer = live.http.get(f"/page/{path}")
        assert answer.status_code == 200 and answer.headers["content-security-policy"] == policy
        text = answer.text if path.endswith((".js", ".html", ".css")) and "vendor" not in path else ""
        assert not re.search(r"""(src|href|url|from|import)\s*[=(]?\s*["'(]?https?://""", text), path
        assert not re.search(r"innerHTML|dangerouslySetInnerHTML|\beval\(|document\.write", text), path  # prompts are only ever text
        for imported in re.findall(r'from "\./([^"]+)"', text):
            assert imported in served, (path, imported)
    assert live.http.get("/page/", headers={"Accept": "text/html"}).status_code == 404
    problem(live.http.get("/page/../app.py"), 404, "not_found")
