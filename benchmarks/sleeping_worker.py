"""A real worker process with a clock in place of the device and no object store: what it costs the broker is real.

Run as a script, with a worker's environment. ``STEP_S`` is the time of one network call, which all jobs share; ``NUM_MODELS`` is
how many models it serves, of which ``NUM_WARM`` are in memory.
:mod:`benchmarks.broker` runs it on version 0.1.0 as well, where modules have other names.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import torch

from latentline.jobs import Claim, ImageRef, ModelInfo, Phase
from latentline_worker.engine.request import Cancelled, Request, Work
from latentline_worker.samplers import sampler_table

MODEL = "sleeping"
STEP_S = float(os.environ.get("STEP_S", "0.05"))
NUM_MODELS = int(os.environ.get("NUM_MODELS", "1"))
NUM_WARM = int(os.environ.get("NUM_WARM", str(NUM_MODELS)))
PIXELS = torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def family_of(model: str) -> Any:
    """What the worker asks of a model."""
    return SimpleNamespace(
        info=ModelInfo(id=model, family="sd", default_width=64, default_height=64, max_pixels=64 * 64),
        revision="none",
        dtype=torch.float32,
        device=torch.device("cpu"),
        adapters=None,
        latent_shape=lambda width, height: (4, height // 8, width // 8),
        table=lambda request: sampler_table(request.scheduler, SCHEDULER, request.num_inference_steps),
        texts=lambda request: (),
        scheduler_config=SCHEDULER,  # version 0.1.0 makes the table itself
    )


class SleepingEngine:
    """Advances all of its requests by one network call every ``STEP_S`` seconds."""

    checkpoint_schedule = pace = None  # it takes no checkpoints; version 0.1.0 calls the schedule pace
    device = torch.device("cpu")
    families: ClassVar[dict[str, object]] = {}
    num_steps = num_rows = 0
    fixed_rows = None

    def __init__(self) -> None:
        self._requests: list[Request] = []
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sleeping engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def stalled_for(self) -> float:
        return 0.0

    def submit(self, work: Work) -> Request:
        request = Request(work)
        request.reached("joined")
        request.phase = Phase.DENOISING
        with self._lock:
            self._requests.append(request)
        return request

    def _run(self) -> None:
        while not self._stopped.wait(STEP_S):
            with self._lock:
                requests = list(self._requests)
            left = [request for request in requests if not self._step(request, len(requests))]
            with self._lock:
                self._requests = left + self._requests[len(requests) :]
        for request in self._requests:
            request.future.set_exception(Cancelled("shutdown"))

    def _step(self, request: Request, num_jobs: int) -> bool:
        """One network call of a request; whether it has ended."""
        if request.cancel_reason:
            request.future.set_exception(Cancelled(request.cancel_reason))
            return True
        request.step += 1
        request.batch_jobs = num_jobs
        if request.step < request.num_steps:
            return False
        request.phase = Phase.DECODING
        request.future.set_result(PIXELS)
        return True


def upload(_: object, claim: Claim, images: Sequence[Any], *__: object) -> tuple[ImageRef, ...]:
    """What the record keeps of uploaded images."""
    record = claim.record
    size = {"width": 64, "height": 64, "content_type": "image/png", "sha256": "0" * 64, "num_bytes": 4096}
    name = f"{record.request.tenant}/{record.id}/{record.attempt}"
    return tuple(ImageRef(key=f"{name}/{i}.png", seed=record.request.seed + i, **size) for i in range(len(images)))


def roster() -> Any:
    """The models, one of them a byte large, with a budget for those that are warm."""
    module = importlib.import_module("latentline_worker.generate.roster")
    families = [family_of(MODEL if i == 0 else f"{MODEL}-{i}") for i in range(NUM_MODELS)]
    members = {
        family.info.id: module.Member(family.info, 1, family if i < NUM_WARM else None, 0.0, 0.0) for i, family in enumerate(families)
    }
    return module.Roster(members, NUM_WARM)


def main() -> int:
    """Run the worker until SIGTERM; its exit status."""
    try:
        room, uploader, store = "latentline_worker.generate", ("images.upload", "Uploader"), "images.store"
        launch = importlib.import_module(f"{room}.launch")
    except ImportError:  # version 0.1.0
        room, uploader, store = "latentline_worker", ("delivery", "Delivery"), "storage"
        launch = importlib.import_module(f"{room}.launch")
    loading = importlib.import_module(f"{room}.loading")
    loading.start = lambda _: (roster(), SleepingEngine(), SimpleNamespace())
    loading.load_models = lambda _: [family_of(MODEL)]  # this and what follows: of earlier versions
    loading.load_model = lambda _: family_of(MODEL)
    loading.make_engine = lambda *_: SleepingEngine()
    no_store = SimpleNamespace(ensure_bucket=lambda: None, delete_all=lambda _: True)
    importlib.import_module(f"latentline_worker.{store}").ImageStore = lambda _: no_store
    getattr(importlib.import_module(f"latentline_worker.{uploader[0]}"), uploader[1]).upload = upload
    return int(launch.main(sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(main())
