"""One forward of the denoiser over any number of rows: padded where shapes must repeat, split where memory is short."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch

from latentline_worker.models.base import Family

log = logging.getLogger(__name__)

# Row counts for which CUDA graphs are captured; between them rows are padded. Steps of about a quarter waste little.
BUCKETS = (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128)

Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # (rows, c, h, w) latents, (rows,) timesteps, (rows, tokens, width) states


class Network:
    """Calls ``family.denoise``.

    Args:
        family: the loaded model.
        fixed_rows: when given, every call has exactly this many rows, padded with zeros or split, so that a row's
            result never depends on how many others it ran with (the reproducible mode).
        graphs: capture CUDA graphs, one per shape and row bucket. Ignored on a CPU.
    """

    def __init__(self, family: Family, fixed_rows: int | None = None, graphs: bool = True) -> None:
        self.family = family
        self.fixed_rows = fixed_rows
        self._graphs: dict[tuple[int, ...], _Graph] | None = {} if graphs and family.device.type == "cuda" else None
        self._traced: Callable[..., torch.Tensor] | None = None

    def __call__(self, x: torch.Tensor, timesteps: torch.Tensor, states: torch.Tensor, most: int | None = None) -> tuple[torch.Tensor, int]:
        """(rows, c, h, w) float32 network outputs, and the most rows that went through in one call: ``most`` or fewer.

        Raises:
            torch.OutOfMemoryError: not even one row fits (or, in the reproducible mode, not the fixed shape).
        """
        rows = len(x)
        if self.fixed_rows is not None:
            return self._padded_parts(x, timesteps, states, self.fixed_rows), self.fixed_rows
        size = min(rows, most or rows)
        while True:
            try:
                parts = [self._call(x[i : i + size], timesteps[i : i + size], states[i : i + size]) for i in range(0, rows, size)]
                return parts[0] if len(parts) == 1 else torch.cat(parts), size
            except Exception as error:
                if not out_of_memory(error) or size == 1:
                    raise
            # Outside of the except block: the exception's frames would keep the tensors alive.
            parts = []
            self.release_memory()
            size = (size + 1) // 2
            log.warning("out of memory with %d rows: trying %d at a time", rows, size)

    def trace(self, x: torch.Tensor, timesteps: torch.Tensor, states: torch.Tensor) -> None:
        """On a CPU, record the forward once on example rows and replay it without Python from then on.

        The operators and their results stay the same; only the interpreter between them goes, a fifth to a quarter of
        a small batch's time. A recording that does not repeat the forward for other row counts and sizes is not used.
        """
        if self.family.device.type != "cpu":
            return
        with warnings.catch_warnings():
            # torch.jit.trace is deprecated for torch.compile, which needs a C++ compiler and a minute per shape.
            # torch is pinned; where a later one has it no more, the forward simply is not recorded.
            warnings.simplefilter("ignore")
            try:
                traced = torch.jit.trace(_Forward(self.family).eval(), (x, timesteps, states), check_trace=False)
                traced = torch.jit.freeze(traced)
                others = torch.cat([x, x, x]).repeat(1, 1, 2, 1), torch.cat([timesteps] * 3), torch.cat([states] * 3)
                same = all(torch.equal(traced(*rows), self.family.denoise(*rows)) for rows in ((x, timesteps, states), others))
            except Exception as error:  # whatever a forward does that cannot be recorded
                log.warning("the forward cannot be recorded (%s): it runs through Python", type(error).__name__)
                return
        if same:
            self._traced = traced
        else:
            log.warning("the recorded forward gives other results: it runs through Python")

    def forget(self, latent_shape: tuple[int, ...]) -> None:
        """Drop what was captured for this shape."""
        if self._graphs is not None:
            self._graphs = {key: graph for key, graph in self._graphs.items() if key[1:4] != latent_shape}

    def release_memory(self) -> None:
        """Give cached memory back to the device."""
        if self.family.device.type == "cuda":
            torch.cuda.empty_cache()

    def _padded_parts(self, x: torch.Tensor, timesteps: torch.Tensor, states: torch.Tensor, size: int) -> torch.Tensor:
        parts = []
        for i in range(0, len(x), size):
            part = x[i : i + size], timesteps[i : i + size], states[i : i + size]
            count = len(part[0])
            parts.append(self._call(*(_pad(tensor, size) for tensor in part))[:count])
        return torch.cat(parts)

    def _call(self, x: torch.Tensor, timesteps: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        if self._graphs is None:
            forward = self._traced if self._traced is not None else self.family.denoise
            return forward(x, timesteps, states).float()
        count = len(x)
        size = next((bucket for bucket in BUCKETS if bucket >= count), count)
        rows = _pad(x, size), _pad(timesteps, size), _pad(states, size)
        key = (*rows[0].shape, *rows[2].shape)
        if key not in self._graphs:
            self._graphs[key] = _Graph(self.family.denoise, rows)
        # Copied: the next replay overwrites what this one gave.
        return self._graphs[key](rows)[:count].to(torch.float32, copy=True)


class _Forward(torch.nn.Module):
    def __init__(self, family: Family) -> None:
        super().__init__()
        self._family = family

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        return self._family.denoise(x, timesteps, states)


class _Graph:
    """One captured forward. Replays read the static inputs, so new rows are copied into them first."""

    def __init__(self, forward: Callable[..., torch.Tensor], rows: Rows) -> None:
        self._rows = tuple(tensor.clone() for tensor in rows)
        # Once outside the capture, as the CUDA graphs notes of PyTorch ask: lazy initialisation cannot be captured.
        stream: Any = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            forward(*self._rows)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._out = forward(*self._rows)

    def __call__(self, rows: Rows) -> torch.Tensor:
        for static, fresh in zip(self._rows, rows, strict=True):
            static.copy_(fresh)
        self._graph.replay()
        return self._out


def out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the CPU's allocator, had no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def device_lost(error: BaseException) -> bool:
    """Whether the accelerator reported an error other than missing memory: after one, every later call fails as well."""
    return isinstance(error, torch.AcceleratorError) and not out_of_memory(error)


def _pad(tensor: torch.Tensor, size: int) -> torch.Tensor:
    missing = size - len(tensor)
    return tensor if missing == 0 else torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])
