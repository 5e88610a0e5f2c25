"""Images go with their records, and a store that fails or hangs holds up nobody."""

from __future__ import annotations

import threading

import fakeredis
import pytest

from latentline import records, routing
from latentline.jobs import JobRequest
from latentline.records import Records
from latentline_worker.maintenance.expiry import Expiry


class FakeStore:
    """Deletes nothing, says that it did or did not, and may take for ever."""

    def __init__(self, works: bool = True, gate: threading.Event | None = None) -> None:
        self.works, self.gate = works, gate
        self.asked: list[str] = []
        self.entered = threading.Event()

    def delete_all(self, prefix: str) -> bool:
        self.asked.append(prefix)
        self.entered.set()
        if self.gate:
            self.gate.wait(60)
        return self.works


@pytest.fixture
def client() -> fakeredis.FakeRedis:
    return fakeredis.FakeRedis(decode_responses=True)


def ended(client: fakeredis.FakeRedis) -> str:
    """The member of a job whose retention is over."""
    job = records.run(client, records.submit([JobRequest.parse({"prompt": "a cat"})], 600))[0]
    records.run(client, records.cancel(job.id, 600))
    client.zadd(routing.expiring_key(), {f"default/{job.id}": 1})
    return f"default/{job.id}"


def test_images_go_with_their_record(client: fakeredis.FakeRedis) -> None:
    member, store = ended(client), FakeStore()
    Expiry(Records(client), store).expire_some()
    assert store.asked == [f"{member}/"]
    assert not client.exists(routing.expiring_key()) and not client.exists(routing.job_key(member.split("/")[1]))


def test_what_cannot_be_deleted_comes_again_later_and_holds_up_nothing_else(client: fakeredis.FakeRedis) -> None:
    first, store = ended(client), FakeStore(works=False)
    expiry = Expiry(Records(client), store)
    expiry.expire_some()
    second = ended(client)
    store.works = True
    expiry.expire_some()
    assert store.asked == [f"{first}/", f"{second}/"], "not at once again"
    assert client.zrange(routing.expiring_key(), 0, -1) == [first]


def test_a_store_that_hangs_keeps_nobody_from_stopping(client: fakeredis.FakeRedis) -> None:
    ended(client)
    gate = threading.Event()
    store = FakeStore(gate=gate)
    expiry = Expiry(Records(client), store)
    expiry.start()
    assert store.entered.wait(60)
    expiry.stop()  # returns although a deletion is under way
    gate.set()
