"""The adapters of one model: those that its sources have, those that jobs use now, and the slots in which they lie."""

from __future__ import annotations

import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from latentline.errors import InvalidRequest, ModelError
from latentline.jobs import StoredLora
from latentline.requests import LORA_NAME
from latentline_worker.models.transfer import to_device

from .bank import Bank, Update
from .file import DENOISERS, Adapter, Target, read
from .sources import Source

log = logging.getLogger(__name__)

CACHE_BYTES = 2 << 30  # of adapters that no job uses, in host memory: reading one again costs seconds

Parts = tuple[tuple[str, str, float], ...]
"""(name, SHA-256 of the file, scale) of each adapter of a set: what a picture depends on."""


@dataclass(frozen=True)
class AdapterSet:
    """The adapters of one job."""

    parts: Parts = ()
    adapters: tuple[Adapter, ...] = field(default=(), compare=False, repr=False)

    @property
    def changes_text(self) -> bool:
        """Whether a text encoder is among the parts that they change."""
        return any(part not in DENOISERS for adapter in self.adapters for part in adapter.layers)

    def updates(self) -> Iterator[tuple[tuple[str, str], Update]]:
        """By part and layer: the updates of all adapters as one, ranks behind each other and scales in the second matrix."""
        layers = dict.fromkeys((part, name) for one in self.adapters for part, names in one.layers.items() for name in names)
        for part, name in layers:
            pairs = [
                (*adapter.layers[part][name], scale)
                for adapter, (_, _, scale) in zip(self.adapters, self.parts, strict=True)
                if name in adapter.layers.get(part, ())
            ]
            down = torch.cat([down.float() for down, _, _ in pairs])
            up = torch.cat([up.float() * scale for _, up, scale in pairs], 1)
            yield (part, name), (down, up)


class Adapters:
    """What a family has of adapters.

    :meth:`find` and :meth:`rescan` may be called by any thread, and read files; the others belong to the thread that owns the device.

    Args:
        sources: of their files; where two have the same name, the first one's counts.
        target: the model.
        slots: adapter sets in device memory at once. A set that no job uses stays until its slot is needed.
        rank: of one slot, the ranks of a job's adapters together.
    """

    def __init__(self, sources: Sequence[Source], target: Target, slots: int, rank: int) -> None:
        self._sources, self._target = sources, target
        self._device = next(next(iter(target.modules.values())).parameters()).device
        self.bank = Bank(target, slots, rank)
        self._held: OrderedDict[Parts, int] = OrderedDict()  # set -> its slot, the least recently used first
        self._users: dict[int, int] = dict.fromkeys(range(1, slots + 1), 0)  # slot -> jobs that hold it
        self._cache: OrderedDict[tuple[str, Hashable], Adapter] = OrderedDict()  # by name and stamp of the file
        self._lock = threading.Lock()  # guards the cache
        self.refused: dict[str, str] = {}
        """Files that are no adapters of this model, with the reason."""
        self._seen: dict[str, tuple[Source, Hashable]] = {}
        self.names: tuple[str, ...] = ()
        """The adapters that jobs may name."""
        for adapter in self._look():
            self.bank.reserve(adapter.layers)  # before the forward is recorded, and the memory measured

    def rescan(self) -> bool:
        """Look for adapters that were added, changed or removed; whether jobs may name others than before.

        Only files that are new or have changed are read, and of them only the names and shapes of the tensors.

        Raises:
            LatentlineError: a source cannot be listed now; nothing has changed then.
        """
        before = self.names
        self._look()
        return self.names != before

    def _look(self) -> list[Adapter]:
        """Check every file that is new or has changed; those that this model can use."""
        seen: dict[str, tuple[Source, Hashable]] = {}
        for source in self._sources:
            for name, stamp in source.list().items():
                seen.setdefault(name, (source, stamp))
        refused = {name: reason for name, reason in self.refused.items() if seen.get(name) == self._seen.get(name)}
        found = []
        for name, (source, stamp) in sorted(seen.items()):
            if self._seen.get(name) == (source, stamp):
                continue
            try:
                found.append(self._checked(name, source))
            except ModelError as error:
                refused[name] = error.message
                log.warning("%s", error.message)
        self._seen, self.refused = seen, refused
        self.names = tuple(sorted(seen.keys() - refused.keys()))
        return found

    def _checked(self, name: str, source: Source) -> Adapter:
        if not re.fullmatch(LORA_NAME, name):
            raise ModelError(f"adapter {name}: its name does not match {LORA_NAME}")
        with source.head(name) as path:
            adapter = read(path, name, self._target, only_keys=True)
        if adapter.rank > self.bank.rank:
            raise ModelError(f"adapter {name}: its rank is {adapter.rank}; allowed: {self.bank.rank}")
        return adapter

    def find(self, loras: Sequence[StoredLora]) -> AdapterSet:
        """Read the adapters that a request names, from their files or the cache.

        Raises:
            InvalidRequest: one is not there, or together they have too large a rank.
            ModelError: a file has become unreadable, or another model's.
        """
        for number, lora in enumerate(loras):
            if lora.name not in self.names:
                raise InvalidRequest(f"loras.{number}.name", lora.name, f"one of: {', '.join(self.names) or 'none'}")
        adapters = tuple(self._read(lora.name) for lora in loras)
        if (rank := sum(adapter.rank for adapter in adapters)) > self.bank.rank:
            raise InvalidRequest("loras", [lora.name for lora in loras], f"ranks of {self.bank.rank} together; theirs make {rank}")
        return AdapterSet(tuple((one.name, one.sha256, lora.scale) for one, lora in zip(adapters, loras, strict=True)), adapters)

    def _read(self, name: str) -> Adapter:
        if name not in self._seen:
            raise ModelError(f"adapter {name}: its file is gone")
        source, _ = self._seen[name]
        key = name, source.stamp(name)
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        adapter = read(source.whole(name), name, self._target)
        with self._lock:
            self._cache[key] = adapter
            while sum(one.num_bytes for one in self._cache.values()) > CACHE_BYTES and len(self._cache) > 1:
                self._cache.popitem(last=False)
        return adapter

    def acquire(self, wanted: AdapterSet) -> int | None:
        """The slot of a set, until :meth:`release`; it is written if it is not there yet. None while every slot is in use.

        An empty set is slot 0 and needs no release.
        """
        if not wanted.parts:
            return 0
        slot = self._held.get(wanted.parts)
        if slot is None:
            slot = self._free()
            if slot is None:
                return None
            self.bank.reserve({part: names for one in wanted.adapters for part, names in one.layers.items()})
            self.bank.write(slot, dict(wanted.updates()))
            self._held[wanted.parts] = slot
        self._held.move_to_end(wanted.parts)
        self._users[slot] += 1
        return slot

    def _free(self) -> int | None:
        """A slot that no job holds: an empty one, or that of the least recently used set."""
        taken = set(self._held.values())
        if empty := [slot for slot in self._users if slot not in taken]:
            return empty[0]
        for parts, slot in self._held.items():
            if not self._users[slot]:
                del self._held[parts]
                return slot
        return None

    def release(self, slot: int) -> None:
        """A job that has acquired the slot has left."""
        if slot:
            self._users[slot] -= 1

    @contextmanager
    def on_texts(self, sets: Sequence[Parts]) -> Iterator[None]:
        """Let each text that is encoded in the block take the updates of its own set; all of them are acquired."""
        slots = [self._held[parts] if parts else 0 for parts in sets]
        with self.bank.on(to_device(torch.tensor(slots), self._device) if any(slots) else None):
            yield
