"""One forward of the denoiser over any number of rows: padded where shapes must repeat, split where memory is short."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from latentline_worker.models.base import Family

from .failures import out_of_memory, run_in_parts

log = logging.getLogger(__name__)

# Row counts for which CUDA graphs are captured; rows in between are padded. After 2, each is at most half as large again as the last.
BUCKETS = (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128)

# (rows, c, h, w) latents, (rows,) timesteps, (rows, tokens, width) prompt embeds
Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Network:
    """Calls ``family.denoise``.

    Args:
        family: the loaded model.
        fixed_rows: when given, every call has exactly this many rows, padded with zeros or split, so that a row's
            result never depends on the number of rows beside it (the reproducible mode).
        graphs: capture CUDA graphs, one per shape and row bucket. Ignored on a CPU.
    """

    def __init__(self, family: Family, fixed_rows: int | None = None, graphs: bool = True) -> None:
        self.family = family
        self.fixed_rows = fixed_rows
        self._graphs: dict[tuple[int, ...], _Graph] | None = {} if graphs and family.device.type == "cuda" else None
        self._traced: Callable[..., torch.Tensor] | None = None

    def __call__(
        self, x: torch.Tensor, timesteps: torch.Tensor, prompt_embeds: torch.Tensor, most: int | None = None
    ) -> tuple[torch.Tensor, int]:
        """Run all rows, in several calls if there are more than ``most`` or memory is short.

        Returns:
            (rows, c, h, w) float32 network outputs, and the rows of the largest call that memory allowed.

        Raises:
            torch.OutOfMemoryError: not even one row fits (or, in the reproducible mode, not the fixed shape).
        """
        if self.fixed_rows is not None:
            return self._padded_parts(x, timesteps, prompt_embeds, self.fixed_rows), self.fixed_rows
        parts: list[torch.Tensor] = []

        def run(places: Sequence[int]) -> None:
            part = slice(places[0], places[-1] + 1)
            parts.append(self._call(x[part], timesteps[part], prompt_embeds[part]))

        def failed(_: int, error: Exception) -> None:
            raise error

        # Any other error than missing memory is divided by request, not by row: the engine does that.
        size = run_in_parts(range(len(x)), run, failed, device=self.family.device, size=most, divide=out_of_memory)
        return parts[0] if len(parts) == 1 else torch.cat(parts), size

    def trace(self, x: torch.Tensor, timesteps: torch.Tensor, prompt_embeds: torch.Tensor) -> None:
        """On a CPU, record the forward once on example rows and replay it without Python from then on.

        The operators and their results stay the same; the interpreter's work between them is saved, a fifth to a quarter
        of a small batch's time. A recording that gives other results for other row counts and sizes is not used.
        """
        if self.family.device.type != "cpu":
            return
        with warnings.catch_warnings():
            # torch.jit.trace is deprecated in favour of torch.compile, which needs a C++ compiler and a minute per shape.
            # torch is pinned; with a later version that has no torch.jit.trace, the forward is not recorded.
            warnings.simplefilter("ignore")
            try:
                traced = torch.jit.trace(_Forward(self.family).eval(), (x, timesteps, prompt_embeds), check_trace=False)
                traced = torch.jit.freeze(traced)
                others = torch.cat([x, x, x]).repeat(1, 1, 2, 1), torch.cat([timesteps] * 3), torch.cat([prompt_embeds] * 3)
                same = all(torch.equal(traced(*rows), self.family.denoise(*rows)) for rows in ((x, timesteps, prompt_embeds), others))
            except Exception as error:  # a forward may do many things that cannot be recorded
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

    def _padded_parts(self, x: torch.Tensor, timesteps: torch.Tensor, prompt_embeds: torch.Tensor, size: int) -> torch.Tensor:
        parts = []
        for i in range(0, len(x), size):
            part = x[i : i + size], timesteps[i : i + size], prompt_embeds[i : i + size]
            count = len(part[0])
            parts.append(self._call(*(_pad(tensor, size) for tensor in part))[:count])
        return torch.cat(parts)

    def _call(self, x: torch.Tensor, timesteps: torch.Tensor, prompt_embeds: torch.Tensor) -> torch.Tensor:
        if self._graphs is None:
            forward = self._traced if self._traced is not None else self.family.denoise
            return forward(x, timesteps, prompt_embeds).float()
        count = len(x)
        size = next((bucket for bucket in BUCKETS if bucket >= count), count)
        rows = _pad(x, size), _pad(timesteps, size), _pad(prompt_embeds, size)
        key = (*rows[0].shape, *rows[2].shape)
        if key not in self._graphs:
            self._graphs[key] = _Graph(self.family.denoise, rows)
        # Copied: the next replay overwrites this output.
        return self._graphs[key](rows)[:count].to(torch.float32, copy=True)


class _Forward(torch.nn.Module):
    def __init__(self, family: Family) -> None:
        super().__init__()
        self._family = family

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, prompt_embeds: torch.Tensor) -> torch.Tensor:
        return self._family.denoise(x, timesteps, prompt_embeds)


class _Graph:
    """One captured forward. Replays read the static inputs, so new rows are copied into them first."""

    def __init__(self, forward: Callable[..., torch.Tensor], rows: Rows) -> None:
        self._rows = tuple(tensor.clone() for tensor in rows)
        # Run once before the capture, as PyTorch's notes on CUDA graphs ask: lazy initialisation cannot be captured.
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


def _pad(tensor: torch.Tensor, size: int) -> torch.Tensor:
    missing = size - len(tensor)
    return tensor if missing == 0 else torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])
