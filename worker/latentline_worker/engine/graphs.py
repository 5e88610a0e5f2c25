"""CUDA graphs of a network's forward: captured at warm-up, replayed at every step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .failures import raise_if_lost

log = logging.getLogger(__name__)

# Row counts for which graphs are captured; rows in between are padded. After 2, each is at most half as large again as the last.
BUCKETS = (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128)

# (rows, c, h, w) latents, (rows,) timesteps, then the tensors of the rows in the order of their names, (rows, ...) each.
Flat = tuple[torch.Tensor, ...]
Forward = Callable[..., torch.Tensor]
# What a recording or a graph is made for: the names, and what each tensor has beside its row axis.
Kind = tuple[tuple[str, ...], tuple[tuple[tuple[int, ...], torch.dtype], ...]]


def kind_of(names: tuple[str, ...], tensors: Sequence[torch.Tensor]) -> Kind:
    return names, tuple((tuple(tensor.shape[1:]), tensor.dtype) for tensor in tensors)


def pad(tensor: torch.Tensor, size: int) -> torch.Tensor:
    """Add rows of zeros up to ``size``."""
    missing = size - len(tensor)
    return tensor if missing == 0 else torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])


class Graphs:
    """The graphs of one network. Graphs of all networks of a device share one pool of memory, since no two replay at once.

    Nothing is captured after warm-up: capturing takes memory that was given to others meanwhile, and time that jobs would wait.
    Rows of a kind that was not captured run without a graph.

    Args:
        pool: of the device (``torch.cuda.graph_pool_handle()``).
    """

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._graphs: dict[tuple[Kind, int], Graph] = {}
        self._static: dict[Kind, Flat] = {}  # inputs of the largest graph of a kind; smaller ones read their first rows

    def capture(self, forward: Forward, names: tuple[str, ...], one: Flat, sizes: Sequence[int]) -> None:
        """Capture a forward for several row counts, the largest first, so that the others find room in its memory.

        Without memory, or with a forward that cannot be captured, there are graphs for fewer of them.

        Args:
            forward: over flat inputs.
            names: of the rows' tensors.
            one: an example row.
            sizes: row counts.

        Raises:
            torch.AcceleratorError: the device is lost.
        """
        kind = kind_of(names, one)
        for size in sorted(sizes, reverse=True):
            try:
                if kind not in self._static:
                    self._static[kind] = tuple(tensor.expand(size, *tensor.shape[1:]).clone() for tensor in one)
                self._graphs[kind, size] = Graph(forward, tuple(tensor[:size] for tensor in self._static[kind]), self._pool)
            except Exception as error:
                raise_if_lost(error)
                log.warning("no CUDA graph for %d rows (%s): they run without one", size, type(error).__name__)
                if not any(captured == kind for captured, _ in self._graphs):
                    self._static.pop(kind, None)

    def forget(self, name: str) -> None:
        """Drop the graphs of rows that have a tensor of this name."""
        self._graphs = {key: graph for key, graph in self._graphs.items() if name not in key[0][0]}
        self._static = {kind: static for kind, static in self._static.items() if name not in kind[0]}

    def __call__(self, names: tuple[str, ...], flat: Flat) -> torch.Tensor | None:
        """(rows, c, h, w) float32 outputs by the smallest graph that holds the rows; None if none was captured for them."""
        count, kind = len(flat[0]), kind_of(names, flat)
        size = next((bucket for bucket in BUCKETS if bucket >= count and (kind, bucket) in self._graphs), count)
        graph = self._graphs.get((kind, size))
        if graph is None:
            return None
        # Copied: the next replay of any graph overwrites this output.
        return graph(tuple(pad(tensor, size) for tensor in flat))[:count].to(torch.float32, copy=True)


class Graph:
    """One captured forward. Replays read the static inputs, so new rows are copied into them first."""

    def __init__(self, forward: Forward, static: Flat, pool: Any) -> None:
        self._static = static
        # Run once before the capture, as PyTorch's notes on CUDA graphs ask: lazy initialisation cannot be captured.
        stream: Any = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            forward(*static)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # thread_local: what other threads ask of CUDA meanwhile, such as pinned memory, does not break the capture.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._out = forward(*static)

    def __call__(self, rows: Flat) -> torch.Tensor:
        for static, fresh in zip(self._static, rows, strict=True):
            static.copy_(fresh)
        self._graph.replay()
        return self._out
