"""The lanes that are kept ready, and how many of them there may be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from .failures import release_memory
from .lane import Lane
from .memory import Memory
from .network import Network
from .request import LaneKey

MAX_LANES = 8  # kept ready, in use or not; each holds slots, and on a GPU captured graphs


class Lanes(Mapping[LaneKey, Lane]):
    """Lanes by key, the least recently used first. Opening one drops the empty ones that have been unused for longest.

    Args:
        make: makes an empty lane.
        network: forgets what it captured for a dropped lane's shape.
        memory: decides how many images a lane may hold.
    """

    def __init__(self, make: Callable[[LaneKey], Lane], network: Network, memory: Memory) -> None:
        self._make = make
        self._network = network
        self._memory = memory
        self._lanes: dict[LaneKey, Lane] = {}

    def __getitem__(self, key: LaneKey) -> Lane:
        return self._lanes[key]

    def __iter__(self) -> Iterator[LaneKey]:
        return iter(self._lanes)

    def __len__(self) -> int:
        return len(self._lanes)

    def open(self, key: LaneKey, width: int, rows: int) -> None:
        """Add a lane that does not exist yet.

        Args:
            key: of the lane.
            width: of its prompt embeds.
            rows: that one forward has at least.

        Raises:
            OutOfMemory: the lane would not fit.
        """
        self._memory.check(key, width, rows)
        empty = [other for other, lane in self._lanes.items() if not lane.num_used]
        for other in empty[: max(0, len(self._lanes) - MAX_LANES + 1)]:
            del self._lanes[other]
            self._network.forget(other.latent_shape)
            release_memory(self._network.family.device)
        self._lanes[key] = self._make(key)

    def use(self, key: LaneKey) -> Lane:
        """The lane, which is now the most recently used one."""
        lane = self._lanes[key] = self._lanes.pop(key)
        return lane

    def has_slots(self, key: LaneKey, num_images: int, width: int) -> bool:
        """Whether memory allows that many more images in the lane. An empty lane takes any job."""
        used = self._lanes[key].num_used
        return not used or used + num_images <= self._memory.num_slots(key, width)
