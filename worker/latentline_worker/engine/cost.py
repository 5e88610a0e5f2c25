"""How long a denoise step takes at each number of rows, learned while running. Torch-free."""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Hashable
from dataclasses import dataclass, field

SAMPLES = 9  # times kept per row count; the median is used, so that one disturbed step changes nothing
TRUSTED = 3  # times needed before a row count is judged
ENOUGH_THROUGHPUT = 0.95  # Use the smallest batch that reaches this share of the best throughput: more only adds latency.
LOOK_AGAIN = 512  # steps after which larger batches are tried again, in case early times were disturbed
RECOVERY = 512  # steps without trouble after which a lowered limit is doubled: the memory may be free again


@dataclass
class _Lane:
    cap: int  # rows that fit by the memory measured at warm-up
    limit: int  # at most the cap; lower after memory ran out
    times: defaultdict[int, deque[float]] = field(default_factory=lambda: defaultdict(lambda: deque(maxlen=SAMPLES)))
    steps: int = 0
    clean_steps: int = 0
    known: list[tuple[int, float, int]] | None = None  # (rows, median seconds, number of times); cached until the next time
    knee: int | None = None  # likewise
    at_least: int = 1  # Lower bound on the row budget; overrides the measured knee during calibration.


class CostModel:
    """Step seconds by number of rows for each lane, and the number of rows beyond which throughput stops rising.

    A lane starts at one row and doubles its rows while that raises throughput, in rows per second.

    Args:
        max_rows: rows that no step may exceed.
    """

    def __init__(self, max_rows: int) -> None:
        if max_rows < 1:
            raise ValueError(f"max_rows: got {max_rows}; allowed: at least 1")
        self.max_rows = max_rows
        self._lanes: defaultdict[Hashable, _Lane] = defaultdict(lambda: _Lane(max_rows, max_rows))

    def observe(self, lane: Hashable, rows: int, seconds: float) -> None:
        """A step of ``rows`` rows took ``seconds``."""
        entry = self._lanes[lane]
        entry.times[rows].append(seconds)
        entry.steps += 1
        entry.clean_steps += 1
        entry.known = entry.knee = None
        if entry.limit < entry.cap and entry.clean_steps >= RECOVERY:
            entry.limit, entry.clean_steps = min(entry.cap, 2 * entry.limit), 0

    def cap(self, lane: Hashable, rows: int) -> None:
        """Set the rows that no step of this lane may ever exceed."""
        entry = self._lanes[lane]
        entry.cap, entry.limit = rows, min(entry.limit, rows)

    def lower(self, lane: Hashable, rows: int) -> None:
        """Limit steps to ``rows`` rows for now, because more did not fit into memory."""
        entry = self._lanes[lane]
        entry.limit, entry.clean_steps, entry.knee = max(1, min(entry.limit, rows)), 0, None

    def explore(self, lane: Hashable, rows: int) -> None:
        """Set a lower bound on the row budget, within what memory allows: times of small counts alone may mislead."""
        self._lanes[lane].at_least = rows

    def limit(self, lane: Hashable) -> int:
        """Rows that memory allows."""
        return self._lanes[lane].limit

    def seconds(self, lane: Hashable, rows: int) -> float:
        """Expected seconds of a step of ``rows`` rows: linear between measured row counts, proportional beyond the largest."""
        known = self._known(self._lanes[lane])
        if not known:
            return 0.0
        place = bisect_left(known, rows, key=lambda entry: entry[0])
        if place == len(known):
            return known[-1][1] * rows / known[-1][0]
        high, high_s, _ = known[place]
        if high == rows or place == 0:
            return high_s
        low, low_s, _ = known[place - 1]
        return low_s + (high_s - low_s) * (rows - low) / (high - low)

    def best(self) -> dict[Hashable, tuple[int, int, float]]:
        """For each lane with measured steps: how many there were, and rows and seconds of a step with the best throughput.

        From any thread; a lane whose times are just being sorted anew is left out.
        """
        found = {}
        for lane, entry in list(self._lanes.items()):
            if known := entry.known:
                rows, seconds, _ = max(known, key=lambda one: one[0] / one[1])
                found[lane] = entry.steps, rows, seconds
        return found

    def budget(self, lane: Hashable) -> int:
        """Rows to put into one step."""
        entry = self._lanes[lane]
        if entry.knee is None:
            entry.knee = self._knee(entry)
        rows = max(entry.knee, entry.at_least)
        if entry.steps % LOOK_AGAIN < TRUSTED <= entry.steps:
            rows *= 2
        return min(rows, entry.limit)

    def _knee(self, entry: _Lane) -> int:
        known = [(count, seconds) for count, seconds, times in self._known(entry) if times >= TRUSTED]
        if not known:
            return 1
        best = max(count / seconds for count, seconds in known)
        enough = next(count for count, seconds in known if count / seconds >= ENOUGH_THROUGHPUT * best)
        largest = known[-1][0]
        # Throughput still rises at the largest count tried: try twice as many.
        return 2 * largest if 2 * enough > largest else enough

    @staticmethod
    def _known(entry: _Lane) -> list[tuple[int, float, int]]:
        if entry.known is None:
            entry.known = sorted((count, statistics.median(times), len(times)) for count, times in entry.times.items())
        return entry.known
