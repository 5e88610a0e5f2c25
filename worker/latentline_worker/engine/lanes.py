"""The lanes that are kept ready, and the account of the memory that they share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from latentline_worker.models.base import Family

from .clock import StepClock
from .decoder import Decoder
from .failures import release_memory
from .lane import GROWTH, Lane
from .memory import STEP_SHARE, Memory
from .network import Network
from .request import LaneKey, Request

MAX_LANES = 8  # kept ready, in use or not: each holds slots


class Lanes(Mapping[LaneKey, Lane]):
    """Lanes by key, the least recently used first.

    The slots of all lanes, what waits for a decode, and the largest step that any of the lanes may take stay within the memory's
    room. A lane that needs more than is left drops the empty ones that have been unused for longest.

    Args:
        families: the loaded models by id.
        networks: by model.
        memory: the budget.
        clock: marks the parts of the lanes' steps.
        decoder: holds images that wait.
        max_rows: of one forward, whatever memory allows.
        opened: told of each lane that is opened, and of how many rows a forward may have there.
    """

    def __init__(
        self,
        families: Mapping[str, Family],
        networks: Mapping[str, Network],
        memory: Memory,
        clock: StepClock,
        decoder: Decoder,
        max_rows: int,
        opened: Callable[[LaneKey, int], None],
    ) -> None:
        self._families = families
        self._networks = networks
        self._memory = memory
        self._clock, self._decoder, self._max_rows, self._opened = clock, decoder, max_rows, opened
        self._lanes: dict[LaneKey, Lane] = {}
        self._rows: dict[LaneKey, int] = {}  # of a forward in each lane, at most
        self._steps: dict[LaneKey, int] = {}  # bytes of the largest step that each lane may take

    def __getitem__(self, key: LaneKey) -> Lane:
        return self._lanes[key]

    def __iter__(self) -> Iterator[LaneKey]:
        return iter(self._lanes)

    def __len__(self) -> int:
        return len(self._lanes)

    @property
    def slot_bytes(self) -> int:
        """What the slots of all lanes take."""
        return sum(lane.num_bytes for lane in self._lanes.values())

    def check(self, request: Request) -> None:
        """Refuse a request that would not fit with nothing beside it.

        Raises:
            OutOfMemory: it would not.
        """
        self._memory.check(request, self._networks[request.work.model].fixed_rows or 1)

    def reserve(self, request: Request, *, may_grow: bool = True) -> Lane | None:
        """The request's lane, with a free slot for each of its images; None while other images take the memory.

        Args:
            request: one that :meth:`check` has passed.
            may_grow: False where free memory is promised to another request.

        Raises:
            torch.OutOfMemoryError: the device has less memory than was measured.
        """
        key = request.lane
        if not (self.suffices(request) and self._lanes[key].num_free >= request.num_images):
            if not may_grow:
                return None
            if key in self._lanes and not self._lanes[key].num_used:
                self.drop(key)  # made anew, it needs no memory for its old slots beside the new ones
            if not self._grow(request):
                return None
        lane = self._lanes[key] = self._lanes.pop(key)  # now the most recently used one
        return lane

    def suffices(self, request: Request) -> bool:
        """Whether the lane is open and, as it is, large enough for the request when it has become empty."""
        lane = self._lanes.get(request.lane)
        if lane is None or lane.num_slots < request.num_images:
            return False
        return self._memory.step_bytes(request.lane, self._rows[request.lane], request.rows) <= self._steps[request.lane]

    def num_decodes(self, model: str, num_latents: int) -> int:
        """Images of so many latents that one decode may have beside the slots, at least one."""
        each = self._memory.decode_bytes(model, num_latents)
        left = self._memory.room - self.slot_bytes - self._decoder.num_bytes
        return max(1, left // each) if each else self._decoder.max_batch

    def _grow(self, request: Request) -> bool:
        """Open the lane or give it more slots, if there is memory for them, and for the steps of such requests."""
        key, lane = request.lane, self._lanes.get(request.lane)
        rows = self._rows[key] if lane else self._num_rows(request)
        step = self._memory.step_bytes(key, rows, request.rows)
        count = max(0, request.num_images - (lane.num_free if lane else 0))
        idle = [other for other, one in self._lanes.items() if not one.num_used and other != key]
        for other in idle[: max(0, len(self._lanes) - MAX_LANES + 1)] if lane is None else ():
            self.drop(other)
        while not self._fits(key, count, step):
            idle = [other for other in idle if other in self._lanes]
            if not idle:
                return False
            self.drop(idle[0])
        # A few at once where there is plenty of room: growing copies the lane's tensors.
        spare = int(self._memory.room * (1 - STEP_SHARE)) - self.slot_bytes
        if 0 < count < GROWTH and GROWTH * self._memory.slot_bytes(key) <= spare and self._fits(key, GROWTH, step):
            count = GROWTH
        if lane is None:
            lane = self._lanes[key] = Lane(self._families[key.model], key, self._networks[key.model], self._clock)
            self._rows[key] = rows
            self._opened(key, rows)
        self._steps[key] = max(step, self._steps.get(key, 0))
        if count:
            lane.grow(count)
        return True

    def _fits(self, key: LaneKey, count: int, step: int) -> bool:
        """Whether ``count`` more slots of a lane fit beside all others, and the largest step beside those."""
        copied = self._lanes[key].num_bytes if key in self._lanes else 0  # while it grows, old and new slots exist
        slots = self.slot_bytes + count * self._memory.slot_bytes(key) + self._decoder.num_bytes
        return slots + max(step, copied, *self._steps.values()) <= self._memory.room

    def _num_rows(self, request: Request) -> int:
        """Rows of a forward in a lane that is opened for this request."""
        fixed = self._networks[request.work.model].fixed_rows
        return fixed or self._memory.num_rows(request.lane, self._max_rows, request.num_images, request.rows)

    def drop(self, key: LaneKey) -> None:
        """Let go of a lane that holds no image."""
        del self._lanes[key], self._steps[key], self._rows[key]
        release_memory(self._families[key.model].device)
