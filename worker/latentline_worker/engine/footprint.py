"""The bytes that a model's activations take: measured at one size, and for other sizes counted from shapes alone."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from latentline_worker.models.base import Family

from .network import ADAPTER, over_flat_inputs
from .request import LaneKey
from .rows import num_bytes, zeros

log = logging.getLogger(__name__)


class _Peak(TorchDispatchMode):
    """Sums the sizes of live operator outputs. Weights, other tensors from before, and views of them do not count.

    Args:
        fake: makes tensors without content of those that have some, where only shapes are to be computed.
    """

    def __init__(self, fake: FakeTensorMode | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._fake = fake
        self._live: dict[int, tuple[int, int]] = {}  # storage -> bytes, tensors that share it
        self._before: dict[int, torch.Tensor] = {}  # by storage; kept, because an address would be used again
        self._now = 0
        self.bytes: int = 0  # the peak so far

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(torch.Tensor, self._given, (args, kwargs or {}))
        out = func(*args, **kwargs)
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor)
        return out

    def _given(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._fake and not isinstance(tensor, FakeTensor):
            tensor = self._fake.from_tensor(tensor)
        if (storage := _storage(tensor)) not in self._live:
            self._before[storage] = tensor
        return tensor

    def _add(self, tensor: torch.Tensor) -> None:
        storage, size = _storage(tensor), tensor.untyped_storage().nbytes()
        if storage in self._before:
            return
        _, sharers = self._live.get(storage, (size, 0))
        self._live[storage] = (size, sharers + 1)
        self._now += 0 if sharers else size
        self.bytes = max(self.bytes, self._now)
        weakref.finalize(tensor, self._drop, storage)

    def _drop(self, storage: int) -> None:
        size, sharers = self._live.pop(storage)
        if sharers > 1:
            self._live[storage] = (size, sharers - 1)
        else:
            self._now -= size


def _storage(tensor: torch.Tensor) -> int:
    """An address that tells storages apart while they exist. That of their content is 0 where there is none."""
    return int(tensor.untyped_storage()._cdata)


@contextmanager
def peak_bytes(device: torch.device) -> Iterator[Callable[[], int]]:
    """Peak of the bytes that the block allocated, beyond what was in use before it.

    On CUDA the allocator tells. For the CPU PyTorch keeps no statistics, so operators' outputs are summed there.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield lambda: torch.cuda.max_memory_allocated() - before
    else:
        with _Peak() as peak:
            yield lambda: peak.bytes


@torch.inference_mode()
def count_row(family: Family, key: LaneKey) -> int:
    """Peak of the activations of one network row in a lane, from the shapes alone: nothing is computed and no memory taken.

    With a bank of adapters, of a row that has one.

    Raises:
        Exception: the forward needs values and not only shapes; any kind.
    """
    fake = FakeTensorMode()
    with fake:
        names = tuple(name for name, _, _ in key.signature)
        rows = zeros(key.signature, (1,), family.device)
        tensors = [rows[name] for name in names]
        if family.adapters and family.adapters.bank.num_layers:
            names, tensors = (*names, ADAPTER), [*tensors, torch.zeros(1, dtype=torch.int64, device=family.device)]
        x, t = torch.zeros(1, *key.latent_shape, device=family.device), torch.zeros(1, device=family.device)
        peak = _Peak(fake)
        with peak:
            over_flat_inputs(family, names)(x, t, *tensors)
    return peak.bytes


class Footprint:
    """Bytes of a model's activations.

    A row's are counted from its shapes and multiplied by the ratio of measured to counted bytes at the model's own size. In
    proportion to the latents they are for U-Nets only: where texts share the sequence with the picture, a small picture takes more.
    A forward that needs values to be traced falls back to that proportion.

    Args:
        family: the model.
        key: the lane in which it was measured.
        row: bytes measured of a row's forward.
        decode: bytes measured of one image's decode, which are in proportion to its pixels.
        num_pixels: of one image of that lane.
        text: bytes measured of encoding a micro-batch of texts.
    """

    def __init__(self, family: Family, key: LaneKey, row: float, decode: float, num_pixels: int, text: float = 0.0) -> None:
        self.family: Family | None = family  # None while the model is not loaded; nothing is counted of it then
        self._key = key
        self._row = row
        self.decode_per_latent = decode / key.num_latents
        self.pixels_per_latent = num_pixels / key.num_latents
        self.text, self.text_row = text, num_bytes(key.signature)
        self._counted: dict[LaneKey, int] = {}

    def row(self, key: LaneKey) -> float:
        """Of one row of a lane's forward. Counting takes a second or so for a large model, once for each lane."""
        own, counted = self._count(self._key), self._count(key)
        return self._row * (counted / own if own and counted else key.num_latents / self._key.num_latents)

    def _count(self, key: LaneKey) -> int:
        """0 where it cannot be counted."""
        if key not in self._counted:
            try:
                assert self.family is not None
                self._counted[key] = count_row(self.family, key)
            except Exception as error:  # whatever a forward makes of tensors without content
                log.warning("%s: the bytes of a row cannot be counted (%s): taken in proportion to the latents", key.model, error)
                self._counted[key] = 0
        return self._counted[key]
