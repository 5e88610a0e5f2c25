"""A real Chromium, and an origin of its own from which pages are served to it.

A test that uses playwright's blocking interface has a running event loop on its thread until the browser is closed, so it cannot
call ``asyncio.run`` meanwhile: open the browser for a test or a module, never for the whole session.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from .missing import missing

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Request

BINARIES = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",  # tests run as root in containers
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    # No name but loopback's resolves, so no page and no service of the browser itself reaches another host.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
)


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """A browser; skips without one on a laptop and fails in CI."""
    binary = next(filter(None, map(shutil.which, BINARIES)), None)
    if binary is None:
        missing("chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("playwright")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=binary, args=list(ARGUMENTS))
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Watched:
    """A page, with all that went wrong on it and all that it asked for."""

    page: Page
    problems: list[str] = field(default_factory=list)
    """Errors of scripts and of the console."""
    hosts: set[str] = field(default_factory=set)
    """Every host that was asked, apart from data: and blob: addresses."""


def watched(context: BrowserContext) -> Watched:
    """A new page of a browser context."""
    found = Watched(context.new_page())

    def console(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            found.problems.append(f"{message.type}: {message.text}")

    def asked(request: Request) -> None:
        parts = urlsplit(request.url)
        if parts.scheme not in ("data", "blob"):
            found.hosts.add(parts.netloc)

    found.page.on("console", console)
    found.page.on("pageerror", lambda error: found.problems.append(f"script: {error}"))
    found.page.on("request", asked)
    return found


class Origin:
    """A web server on a loopback port: the pages and files that a test gives it, and how often each was asked for."""

    def __init__(self) -> None:
        self.files: dict[str, tuple[str, bytes]] = {}  # path -> content type, content
        self.asked: Counter[str] = Counter()  # path -> GET requests
        origin = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = urlsplit(self.path).path
                origin.asked[path] += 1
                kind, content = origin.files.get(path, ("", b""))
                self.send_response(200 if kind else 404)
                self.send_header("Content-Type", kind or "text/plain")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def do_HEAD(self) -> None:  # a bucket that is there
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    def serve(self, path: str, content: str | bytes, kind: str = "text/html; charset=utf-8") -> str:
        """Serve something; its URL."""
        self.files[path] = (kind, content.encode() if isinstance(content, str) else content)
        return self.url + path

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
