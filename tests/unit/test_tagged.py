"""Jobs of a tenant by their metadata, on the real broker: in pages, and none left out where many have the same time."""

from __future__ import annotations

import pytest
import redis
from support.jobs import submit

from latentline import records, routing
from latentline.records import Look, tagged


@pytest.mark.parametrize("spread_ms", [0, 1, 700])
def test_every_job_is_found_whatever_the_pages_cut(empty_valkey: redis.Redis, monkeypatch: pytest.MonkeyPatch, spread_ms: int) -> None:
    monkeypatch.setitem(tagged.__globals__, "AT_ONCE", 4)
    ids = submit(empty_valkey, 30, metadata={"session": "abc"})
    submit(empty_valkey, 3, metadata={"session": "abcd"})
    empty_valkey.zadd(routing.tenant_index_key("default"), {job_id: 1_700_000_000_000 + i * spread_ms for i, job_id in enumerate(ids)})
    found = records.run(empty_valkey, tagged("default", "session", "abc", 1_700_000_000_000))
    assert {one.job_id for one in found} == set(ids) and len(found) == 30
    assert [one.at_ms for one in found] == sorted(one.at_ms for one in found)
    assert len(records.run(empty_valkey, tagged("default", "session", "abc"))) == 30
    assert records.run(empty_valkey, tagged("default", "session", "ab")) == []


def test_a_look_at_several_tenants_gives_what_is_not_known(empty_valkey: redis.Redis) -> None:
    first, second = submit(empty_valkey, 2)
    (other,) = submit(empty_valkey, tenant="bob", metadata={"a": 1})
    looks = [Look("default", 0, [first]), Look("bob", 0, []), Look("nobody", 0, [])]
    ours, theirs, none = records.run(empty_valkey, records.newest(looks))
    assert [one.job_id for one in ours] == [second] and [(one.job_id, one.metadata) for one in theirs] == [(other, {"a": 1})] and none == []
    assert records.run(empty_valkey, records.newest_at_ms("bob")) == theirs[0].at_ms
    assert records.run(empty_valkey, records.newest_at_ms("nobody")) == 0
