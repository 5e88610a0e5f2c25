"""One forward of the denoiser over any number of rows: padded where shapes must repeat, split where memory is short."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence

import torch

from latentline_worker.models.base import Family, Row

from .failures import out_of_memory, run_in_parts
from .graphs import BUCKETS, Flat, Forward, Graphs, Kind, kind_of, pad

log = logging.getLogger(__name__)

ADAPTER = "adapter"  # among the rows of a forward in which any row has one: its slot in the model's bank, 0 for none


class Network:
    """Calls ``family.denoise``.

    Args:
        family: the loaded model.
        fixed_rows: when given, every call has exactly this many rows, padded with zeros or split, so that a row's
            result never depends on the number of rows beside it (the reproducible mode).
        graphs: what is captured for it at warm-up; None on a CPU.
        record: record the forward on a CPU.
    """

    def __init__(self, family: Family, fixed_rows: int | None = None, graphs: Graphs | None = None, *, record: bool = True) -> None:
        self.family = family
        self.fixed_rows = fixed_rows
        self._graphs, self._record = graphs, record
        self._traced: dict[Kind, Forward] = {}  # the latents' shape left out: a recording serves every size
        self._bank_layers = 0  # that the recordings with adapters know

    def __call__(self, x: torch.Tensor, timesteps: torch.Tensor, rows: Row, most: int | None = None) -> tuple[torch.Tensor, int]:
        """Run all rows, in several calls if there are more than ``most`` or memory is short.

        Args:
            x: (rows, c, h, w) latents, as the network takes them.
            timesteps: (rows,).
            rows: (rows, ...) tensors by name.
            most: rows of one call.

        Returns:
            (rows, c, h, w) float32 network outputs, and the rows of the largest call that memory allowed.

        Raises:
            torch.OutOfMemoryError: not even one row fits (or, in the reproducible mode, not the fixed shape).
        """
        names, flat = _flat(x, timesteps, rows)
        if self.fixed_rows is not None:
            return self._padded_parts(names, flat, self.fixed_rows), self.fixed_rows
        parts: list[torch.Tensor] = []

        def run(places: Sequence[int]) -> None:
            part = slice(places[0], places[-1] + 1)
            parts.append(self._call(names, tuple(tensor[part] for tensor in flat)))

        def failed(_: int, error: Exception) -> None:
            raise error

        # Any other error than missing memory is divided by request, not by row: the engine does that.
        size = run_in_parts(range(len(x)), run, failed, device=self.family.device, size=most, divide=out_of_memory)
        return parts[0] if len(parts) == 1 else torch.cat(parts), size

    def trace(self, x: torch.Tensor, timesteps: torch.Tensor, rows: Row) -> None:
        """On a CPU, record the forward once on example rows and replay it without Python from then on.

        The operators and their results stay the same; the interpreter's work between them is saved, a fifth to a quarter
        of a small batch's time. A recording that gives other results for other row counts and sizes is not used.
        """
        if not self._record or self.family.device.type != "cpu":
            return
        names, flat = _flat(x, timesteps, rows)
        forward = over_flat_inputs(self.family, names)
        self._note_bank(names)
        with warnings.catch_warnings():
            # torch.jit.trace is deprecated in favour of torch.compile, which needs a C++ compiler and a minute per shape.
            # torch is pinned; with a later version that has no torch.jit.trace, the forward is not recorded.
            warnings.simplefilter("ignore")
            try:
                traced = torch.jit.trace(_Module(forward).eval(), flat, check_trace=False)
                traced = torch.jit.freeze(traced)
                more = [torch.cat([tensor] * 3) for tensor in flat]
                tall, wide = (more[0].repeat(1, 1, *times) for times in ((2, 1), (1, 2)))
                same = all(torch.equal(traced(*one), forward(*one)) for one in (flat, (tall, *more[1:]), (wide, *more[1:])))
            except Exception as error:  # a forward may do many things that cannot be recorded
                log.warning("the forward cannot be recorded (%s): it runs through Python", type(error).__name__)
                return
        if same:
            self._traced[kind_of(names, flat[1:])] = traced
        else:
            log.warning("the recorded forward gives other results: it runs through Python")

    def capture(self, x: torch.Tensor, timesteps: torch.Tensor, rows: Row, most: int) -> None:
        """On CUDA, capture the forward for every row count up to ``most`` that steps are padded to.

        Args:
            x: (1, c, h, w) an example of the latents; graphs hold for this shape alone.
            timesteps: (1,).
            rows: (1, ...) tensors by name.
            most: rows of one call that fit into memory.
        """
        if self._graphs is None:
            return
        names, flat = _flat(x, timesteps, rows)
        self._note_bank(names)
        sizes = [size for size in ((self.fixed_rows,) if self.fixed_rows else BUCKETS) if size <= most]
        self._graphs.capture(over_flat_inputs(self.family, names), names, flat, sizes)

    def _note_bank(self, names: tuple[str, ...]) -> bool:
        """Keep in mind which layers with updates a recording of these rows knows; whether there are others than before."""
        adapters = self.family.adapters
        if ADAPTER not in names or adapters is None or adapters.bank.num_layers == self._bank_layers:
            return False
        self._bank_layers = adapters.bank.num_layers
        return True

    def _renew(self, names: tuple[str, ...], flat: Flat) -> None:
        """Drop what was recorded and captured with adapters once more layers have updates than it knows. On a CPU, record anew."""
        if self._note_bank(names):
            self._traced = {kind: forward for kind, forward in self._traced.items() if ADAPTER not in kind[0]}
            if self._graphs:
                self._graphs.forget(ADAPTER)
            self.trace(flat[0], flat[1], dict(zip(names, flat[2:], strict=True)))

    def _padded_parts(self, names: tuple[str, ...], flat: Flat, size: int) -> torch.Tensor:
        parts = []
        for i in range(0, len(flat[0]), size):
            part = tuple(tensor[i : i + size] for tensor in flat)
            parts.append(self._call(names, tuple(pad(tensor, size) for tensor in part))[: len(part[0])])
        return torch.cat(parts)

    def _call(self, names: tuple[str, ...], flat: Flat) -> torch.Tensor:
        self._renew(names, flat)
        if self._graphs is not None and (out := self._graphs(names, flat)) is not None:
            return out
        forward = self._traced.get(kind_of(names, flat[1:]))
        return (forward or over_flat_inputs(self.family, names))(*flat).float()


def _flat(x: torch.Tensor, timesteps: torch.Tensor, rows: Row) -> tuple[tuple[str, ...], Flat]:
    """The names in order, and all inputs in that order: recordings and graphs take no mappings."""
    names = tuple(sorted(rows))
    return names, (x, timesteps, *(rows[name] for name in names))


def over_flat_inputs(family: Family, names: tuple[str, ...]) -> Forward:
    """``family.denoise`` over flat inputs."""

    def forward(x: torch.Tensor, timesteps: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        rows = dict(zip(names, tensors, strict=True))
        if ADAPTER not in rows:
            return family.denoise(x, timesteps, rows)
        assert family.adapters is not None  # a job that names adapters is not admitted otherwise
        with family.adapters.bank.on(rows.pop(ADAPTER)):
            return family.denoise(x, timesteps, rows)

    return forward


class _Module(torch.nn.Module):
    """A forward in the shape that the recorder takes."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self._forward = forward

    def forward(self, *flat: torch.Tensor) -> torch.Tensor:
        return self._forward(*flat)
