"""A real Prometheus on loopback, which scrapes what a test names and evaluates the rules that it is given."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import yaml

from latentline_worker.embedded.process import Child, clean_env, free_port

from .missing import missing

PATIENCE_S = 90.0  # on a busy machine
Sample = tuple[dict[str, str], float]  # labels, value


class Prometheus:
    """Keeps its data in ``folder`` and speaks to loopback alone: it has no alert manager, no remote storage and no discovery.

    Args:
        targets: the label ``instance`` -> a port on 127.0.0.1, under the job ``latentline``.
        rules: the text of a rules file.
    """

    def __init__(self, folder: Path, targets: Mapping[str, int], rules: str) -> None:
        binary = shutil.which("prometheus")
        if binary is None:
            missing("prometheus")
        (folder / "rules.yaml").write_text(rules)
        scraped = [{"targets": [f"127.0.0.1:{port}"], "labels": {"instance": name}} for name, port in targets.items()]
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "500ms"},
            "rule_files": ["rules.yaml"],
            "scrape_configs": [{"job_name": "latentline", "static_configs": scraped}],
        }
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
        port = free_port()
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False)
        command = [
            binary,
            f"--config.file={folder / 'prometheus.yaml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ]
        self._child = Child("prometheus", command, folder / "prometheus.log", clean_env())
        self._child.wait_until(self._ready, PATIENCE_S)

    def query(self, expression: str, at: float | None = None) -> list[Sample]:
        """The samples of an instant vector, now or at a time in Unix seconds."""
        answer = self._http.get("/api/v1/query", params={"query": expression} | ({} if at is None else {"time": at}))
        found: dict[str, Any] = answer.json()
        assert found["status"] == "success", f"{expression}: {found}"
        return [(sample["metric"], float(sample["value"][1])) for sample in found["data"]["result"]]

    def until(self, expression: str) -> list[Sample]:
        """The samples of an expression as soon as it has some."""
        deadline = time.monotonic() + PATIENCE_S
        while not (found := self.query(expression)):
            assert time.monotonic() < deadline, f"no series within {PATIENCE_S:g} s: {expression}"
            time.sleep(0.2)
        return found

    def close(self) -> None:
        self._http.close()
        self._child.stop()

    def _ready(self) -> bool:
        try:
            return self._http.get("/-/ready").status_code == 200
        except httpx.HTTPError:
            return False
