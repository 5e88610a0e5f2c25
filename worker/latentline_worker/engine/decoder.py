"""Latents -> pixels in micro-batches, off the denoise thread."""

from __future__ import annotations

import queue
import threading
from concurrent.futures import Future

import numpy as np
import numpy.typing as npt
import torch

from latentline_worker.models.base import Family

Pixels = npt.NDArray[np.uint8]


class Decoder:
    """Decodes images of any jobs together, at most ``max_batch`` of one shape a call."""

    def __init__(self, family: Family, max_batch: int) -> None:
        self._family = family
        self._max_batch = max_batch
        self._queue: queue.SimpleQueue[tuple[torch.Tensor, Future[Pixels]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._loop, name="decoder", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Decode what is queued, then end."""
        self._queue.put(None)
        if self._thread.is_alive():
            self._thread.join()

    def decode(self, latents: torch.Tensor) -> Future[Pixels]:
        """(c, h, w) latents of one image -> a future of (height, width, 3) pixels."""
        future: Future[Pixels] = Future()
        self._queue.put((latents, future))
        return future

    def _loop(self) -> None:
        held: tuple[torch.Tensor, Future[Pixels]] | None = None
        while True:
            first = held or self._queue.get()
            held = None
            if first is None:
                return
            batch = [first]
            ending = False
            while len(batch) < self._max_batch:
                try:
                    item = self._queue.get_nowait()
                except queue.Empty:
                    break
                if item is None:
                    ending = True
                    break
                if item[0].shape != first[0].shape:
                    held = item
                    break
                batch.append(item)
            self._run(batch)
            if ending:
                return

    def _run(self, batch: list[tuple[torch.Tensor, Future[Pixels]]]) -> None:
        try:
            with torch.no_grad():
                pixels = self._family.decode(torch.stack([latents for latents, _ in batch]))
        except Exception as error:
            if len(batch) > 1:  # only the guilty fail
                for one in batch:
                    self._run([one])
            else:
                batch[0][1].set_exception(error)
            return
        for (_, future), image in zip(batch, pixels, strict=True):
            future.set_result(image)
