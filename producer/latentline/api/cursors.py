"""How far a stream of many jobs has come: the ``id`` of its events, from which ``Last-Event-ID`` resumes.

An id holds the position in every job's own stream. Nothing is kept on the server, so any process of the API can go on, and no
order between the streams of two jobs is assumed: nothing is lost and nothing comes twice.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable
from typing import Self

from latentline.errors import InvalidRequest
from latentline.jobs import JobEvent
from latentline.listener import GONE
from latentline.records import Created

MAX_JOBS = 100  # on one stream; an id then has up to 2,500 characters
# A job that is stored after a look at a tenant's jobs may have a time that is so much before that of the newest one there: two can
# have the same, and a broker that takes over has a clock of its own.
OVERLAP_MS = 1000

_ENTRY = re.compile(r"([A-Za-z0-9_-]{8}):(?:([0-9a-f]{1,15})(?:-([0-9a-f]{1,15}))?|(x))")


_GROUP = re.compile(r"g([0-9a-f]{1,12})-([0-9a-f]{1,12})(?:\.(.+))?")


class Cursor:
    """Job by job, the last event that was told. A job is named by 48 bits of a hash of its id."""

    def __init__(self, entries: dict[str, str] | None = None) -> None:
        self._entries = entries or {}  # name of the job -> name and position, as they stand in an id

    @classmethod
    def parse(cls, text: str | None) -> Self:
        """Raises InvalidRequest for what is no id of such a stream."""
        return cls(cls._read(text, MAX_JOBS))

    @staticmethod
    def _read(text: str | None, most: int) -> dict[str, str]:
        parts = text.split(".") if text else []
        found = [_ENTRY.fullmatch(part) for part in parts]
        if len(parts) > most or not all(found):
            raise InvalidRequest("last_event_id", text, "an id that a stream of these jobs gave")
        return {entry[1]: entry[0] for entry in found if entry}

    def after(self, job_id: str) -> str | None:
        """The id in the job's own stream after which to go on; None for its beginning."""
        found = _ENTRY.fullmatch(self._entries.get(_name(job_id), ""))
        return f"{int(found[2], 16)}-{int(found[3] or '0', 16)}" if found and found[2] else None

    def gone(self, job_id: str) -> bool:
        """Whether it was told that the job is not there."""
        return self._entries.get(_name(job_id), "").endswith(":x")

    def told(self, event: JobEvent) -> str:
        """Note an event; its id."""
        name = _name(event.job_id)
        if event.type == GONE:
            self._entries[name] = f"{name}:x"
        else:
            milliseconds, _, number = event.id.partition("-")
            self._entries[name] = f"{name}:{int(milliseconds):x}" + (f"-{int(number):x}" if number not in ("", "0") else "")
        return ".".join(self._entries.values())


class GroupCursor(Cursor):
    """The same for jobs that are not named: it also holds up to when the jobs that are not in it were told.

    A job leaves it after its last event, once no other job can be found late that was stored before. So it stays short.
    """

    def __init__(self, entries: dict[str, str] | None = None, since_ms: int | None = None, told_ms: int = 0) -> None:
        super().__init__(entries)
        self.since_ms = since_ms
        """From when on the jobs in it were stored; None for the cursor of a new stream."""
        self._told_ms = told_ms
        self._mark_ms = 0  # when the newest job that is followed was stored
        self._times: dict[str, int] = {}  # name of the job -> when it was stored
        self._ended: dict[str, int] = {}  # the same of jobs whose last event was told

    @classmethod
    def parse(cls, text: str | None) -> Self:
        if not text:
            return cls()
        found = _GROUP.fullmatch(text)
        if not found:
            raise InvalidRequest("last_event_id", text, "an id that a stream of these jobs gave")
        return cls(cls._read(found[3], 3 * MAX_JOBS), int(found[1], 16), int(found[2], 16))

    @property
    def num_open(self) -> int:
        """Jobs that are followed and whose last event was not told yet."""
        return len(self._times) - len(self._ended)

    def untold(self, found: Iterable[Created]) -> list[Created]:
        """Those of the jobs whose end may not have been told; first those with a position. Asked once, before any is followed."""
        jobs = list(found)
        old = [one for one in jobs if self._follows(one)]
        there = {_name(one.job_id) for one in old}
        self._entries = {name: entry for name, entry in self._entries.items() if name in there}  # the others are gone
        return old + [one for one in jobs if self.is_new(one)]

    def is_new(self, one: Created) -> bool:
        """Whether a job was neither followed nor told before."""
        return not self._follows(one) and one.at_ms > self._told_ms

    def begin(self, one: Created) -> str | None:
        """Note that a job is followed; the id in its own stream after which to go on."""
        name = _name(one.job_id)
        self._times[name] = one.at_ms
        self._mark_ms = max(self._mark_ms, one.at_ms)
        self._entries.setdefault(name, f"{name}:0")
        return self.after(one.job_id)

    def told(self, event: JobEvent) -> str:
        super().told(event)
        if event.terminal or event.type == GONE:
            self.ended(event.job_id)
        since_ms = min([self._told_ms, *self._times.values()])
        return ".".join([f"g{since_ms:x}-{self._told_ms:x}", *self._entries.values()])

    def ended(self, job_id: str) -> None:
        """Note that nothing more comes of a job."""
        self._ended[_name(job_id)] = self._times[_name(job_id)]
        self._drop_ended()

    def _drop_ended(self) -> None:
        """Take out ended jobs that are older than any that may still be found; more of them where there are too many."""
        self._told_ms = max(self._told_ms, self._mark_ms - OVERLAP_MS)
        for name, at_ms in sorted(self._ended.items(), key=lambda ended: ended[1]):
            if at_ms > self._told_ms:
                if len(self._ended) <= MAX_JOBS or at_ms == self._mark_ms:
                    break
                self._told_ms = at_ms
            for kept in (self._entries, self._times, self._ended):
                del kept[name]

    def _follows(self, one: Created) -> bool:
        return _name(one.job_id) in self._entries


def _name(job_id: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(job_id.encode()).digest()[:6]).decode()
