"""A real worker process around an engine that does nothing: ``python stub_worker.py BROKER_URL NAME``. Light enough to start many."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).parents[1]))

from latentline.connection import connect
from latentline.records import Records
from latentline_worker.generate.worker import GenerateWorker
from latentline_worker.settings import WorkerSettings
from support.stubs import FAMILY, MemoryStore, StubEngine


def main(url: str, name: str) -> int:
    settings = WorkerSettings.from_variables({"LATENTLINE_REDIS_URL": url})
    records = Records(connect(url))
    return GenerateWorker(name, settings, FAMILY, cast(Any, StubEngine()), records, cast(Any, MemoryStore())).run()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
