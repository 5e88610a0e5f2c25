"""The API and its dialects against their OpenAPI documents: schemathesis generates requests, right and wrong, also in sequences."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.live_api import Live, live_api

from latentline import Settings, records
from latentline.keys import NewKey

CONFIG = Path(__file__).parents[1] / "schemathesis.toml"
# Test cases of each operation and phase. `make fuzz` asks for more.
EXAMPLES = os.environ.get("LATENTLINE_FUZZ_EXAMPLES", "8")


@contextmanager
def working(live: Live) -> Iterator[None]:
    """A worker that runs what is submitted, so that jobs end and have pictures."""
    end = threading.Event()

    def work() -> None:
        while not end.wait(0.05):
            live.worker.announce()
            live.worker.run_all()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join(60)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("prefix", "auth"), [("", "none"), ("", "keys"), ("/openai/v1", "keys"), ("/sdapi/v1", "keys"), ("/replicate/v1", "keys")]
)
def test_the_api_keeps_what_its_documents_promise(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path, prefix: str, auth: str
) -> None:
    # With keys, a request without one and with a wrong one is tried too, by the checks ignored_auth and missing_required_header.
    with live_api(monkeypatch, Settings.model_validate({"auth": auth})) as live, working(live), caplog.at_level(logging.ERROR):
        key, _ = records.run(live.worker.redis, records.create_key(NewKey.parse(tenant="default", scopes=("submit", "read"), limits={})))
        headers = ["--header", f"Authorization: Bearer {key}"] if auth == "keys" else []
        document = str(live.http.base_url.join(f"{prefix}/openapi.json"))
        command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIG), "run", document]
        done = subprocess.run(
            [*command, "-n", EXAMPLES, *headers], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    assert done.returncode == 0, done.stdout
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []
