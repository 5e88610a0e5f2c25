"""The lanes that are kept ready, and how many of them there may be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from latentline_worker.models.base import Family

from .clock import StepClock
from .failures import release_memory
from .lane import Lane
from .memory import Memory
from .network import Network
from .request import LaneKey

MAX_LANES = 8  # kept ready, in use or not; each holds slots, and on a GPU captured graphs


class Lanes(Mapping[LaneKey, Lane]):
    """Lanes by key, the least recently used first. Opening one drops the empty ones that have been unused for longest.

    Args:
        families: the loaded models by id.
        networks: by model.
        memory: decides how many images a lane may hold.
        clock: marks the parts of the lanes' steps.
        opened: told of each lane that is opened.
    """

    def __init__(
        self,
        families: Mapping[str, Family],
        networks: Mapping[str, Network],
        memory: Memory,
        clock: StepClock,
        opened: Callable[[LaneKey], None],
    ) -> None:
        self._families = families
        self._networks = networks
        self._memory = memory
        self._clock, self._opened = clock, opened
        self._lanes: dict[LaneKey, Lane] = {}

    def __getitem__(self, key: LaneKey) -> Lane:
        return self._lanes[key]

    def __iter__(self) -> Iterator[LaneKey]:
        return iter(self._lanes)

    def __len__(self) -> int:
        return len(self._lanes)

    def use(self, key: LaneKey) -> Lane:
        """The lane, opened if it does not exist, which is now the most recently used one.

        Raises:
            OutOfMemory: it does not exist and would not fit.
        """
        if key not in self._lanes:
            self._open(key)
        lane = self._lanes[key] = self._lanes.pop(key)
        return lane

    def _open(self, key: LaneKey) -> None:
        network = self._networks[key.model]
        self._memory.check(key, network.fixed_rows or 1)
        empty = [other for other, lane in self._lanes.items() if not lane.num_used]
        for other in empty[: max(0, len(self._lanes) - MAX_LANES + 1)]:
            del self._lanes[other]
            release_memory(network.family.device)
        self._lanes[key] = Lane(self._families[key.model], key, network, self._clock)
        self._opened(key)

    def has_slots(self, key: LaneKey, num_images: int) -> bool:
        """Whether memory allows that many more images in the lane. An empty lane takes any job."""
        used = self._lanes[key].num_used
        return not used or used + num_images <= self._memory.num_slots(key)
