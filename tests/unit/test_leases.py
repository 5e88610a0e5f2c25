"""The leases thread: leases renewed, progress reported, verdicts heard, checkpoints written once."""

from __future__ import annotations

import base64
import contextlib
import io
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import fakeredis
import numpy as np
import pytest
from PIL import Image

from latentline import records, routing
from latentline.connection import connect
from latentline.errors import BrokerUnavailable
from latentline.jobs import Claim, JobRequest, Phase, resolve
from latentline.records import Beat, Records, Signal, Verdict
from latentline_worker.engine.request import Preview
from latentline_worker.generate import leases as leases_module
from latentline_worker.generate.leased_job import LeasedJob
from latentline_worker.generate.leases import INTERVAL_S, PROGRESS_PER_S, Leases
from latentline_worker.maintenance.liveness import LivenessFile

PATIENCE_S = 60  # how long a test waits for a signal before it fails; no test measures time


@pytest.fixture
def client() -> fakeredis.FakeRedis:
    return fakeredis.FakeRedis(decode_responses=True)


@pytest.fixture
def store(client: fakeredis.FakeRedis) -> Records:
    return Records(client)


class Clock:
    """Seconds that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def leases(store: Records, clock: Clock) -> Leases:
    return Leases(store, lease_s=30, clock=clock)


def claim(client: fakeredis.FakeRedis, **fields: Any) -> Claim:
    request = JobRequest.parse({"prompt": "a cat", "num_inference_steps": 20, **fields})
    job = records.run(client, records.submit([resolve(request)], 600))[0]
    found = Records(client).claim(job.id, "w", 30)
    assert found is not None
    return found


def field(client: fakeredis.FakeRedis, job: LeasedJob, name: str) -> str | None:
    value: str | None = client.hget(routing.job_key(job.claim.record.id), name)
    return value


def previews(client: fakeredis.FakeRedis, job: LeasedJob) -> list[dict[str, Any]]:
    return [event.data for event in records.run(client, records.events(job.claim.record.id)) if event.type == "job.preview"]


def preview_events(client: fakeredis.FakeRedis, job: LeasedJob) -> list[Any]:
    """What the stream says of previews, the earlier ones included: readers get the newest alone."""
    entries = client.xrange(routing.events_key(job.claim.record.id))
    return [fields for _, fields in entries if fields["type"] == "job.preview"]


def eventually(holds: Callable[[], bool], what: str) -> None:
    for _ in range(PATIENCE_S * 100):
        if holds():
            return
        threading.Event().wait(0.01)
    pytest.fail(what)


class InEngine:
    """What the heartbeat sees of a request: how far it is, its newest preview and checkpoint, and whether it was cancelled."""

    def __init__(self, data: bytes | None = None, num_steps: int = 20) -> None:
        self.step, self.num_steps, self.batch_jobs = 3, num_steps, 1
        self.phase, self.work = Phase.DENOISING, None
        self.preview: Preview | None = None
        self.checkpoint = self if data is not None else None
        self.num_serialized = 0
        self.cancelled: list[str] = []
        self.data = data

    def to_bytes(self, _: None) -> bytes | None:
        self.num_serialized += 1
        return self.data or None

    def cancel(self, reason: str) -> None:
        self.cancelled.append(reason)


def attach(job: LeasedJob, request: InEngine) -> InEngine:
    job.attach(cast(Any, request))
    return request


def test_a_beat_renews_the_lease_for_its_whole_length(client: fakeredis.FakeRedis, leases: Leases) -> None:
    with leases.hold(claim(client)) as job:
        client.zadd(routing.leases_key(), {job.claim.record.id: 1})
        client.hset(routing.job_key(job.claim.record.id), "lease_until", 1)
        seconds, _ = client.time()
        leases.beat()
        assert float(field(client, job, "lease_until") or 0) >= seconds + 30
        assert client.zscore(routing.leases_key(), job.claim.record.id) >= seconds + 30


def test_a_job_that_is_no_longer_held_is_not_reported(client: fakeredis.FakeRedis, leases: Leases) -> None:
    with leases.hold(claim(client)) as job:
        before = field(client, job, "lease_until")
    leases.beat()
    assert field(client, job, "lease_until") == before


def test_a_beat_tells_phase_and_step(client: fakeredis.FakeRedis, leases: Leases) -> None:
    with leases.hold(claim(client)) as job:
        leases.beat()
        assert (field(client, job, "phase"), field(client, job, "step")) == ("encoding", "0")
        attach(job, InEngine())
        leases.beat()
        assert (field(client, job, "phase"), field(client, job, "step")) == ("denoising", "3")
        job.uploading = True
        leases.beat()
        assert field(client, job, "phase") == "uploading"


class Calls:
    """Counts the calls of ``records.beat`` and the jobs in each; some fail."""

    def __init__(self, store: Records, monkeypatch: pytest.MonkeyPatch) -> None:
        self._real = store.beat
        self.num_jobs: list[int] = []
        self.fails = False
        monkeypatch.setattr(store, "beat", self)

    def __call__(self, beats: Sequence[Beat]) -> list[Verdict]:
        self.num_jobs.append(len(beats))
        if self.fails:
            raise BrokerUnavailable("away")
        return self._real(beats)


@pytest.fixture
def calls(store: Records, monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(store, monkeypatch)


@pytest.fixture
def held(client: fakeredis.FakeRedis, leases: Leases) -> Iterator[Callable[[int], list[LeasedJob]]]:
    """Makes jobs that are held until the test ends."""
    with contextlib.ExitStack() as stack:
        yield lambda count: [stack.enter_context(leases.hold(claim(client))) for _ in range(count)]


Held = Callable[[int], list[LeasedJob]]


def test_a_beat_with_nothing_to_report_makes_no_call(leases: Leases, held: Held, calls: Calls) -> None:
    leases.beat()
    jobs = held(3)
    requests = [attach(job, InEngine()) for job in jobs]
    leases.beat()
    leases.beat()
    requests[1].phase = Phase.DECODING
    leases.beat()
    assert calls.num_jobs == [3, 1]


@pytest.mark.parametrize(("num_jobs", "every_s"), [(1, INTERVAL_S), (32, 32 / PROGRESS_PER_S)])
def test_steps_are_reported_at_a_bounded_rate_and_phases_at_once(
    leases: Leases, held: Held, calls: Calls, clock: Clock, num_jobs: int, every_s: float
) -> None:
    requests = [attach(job, InEngine()) for job in held(num_jobs)]
    leases.beat()
    for request in requests:
        request.step += 1
    clock.now += every_s - 0.01
    leases.beat()
    assert calls.num_jobs == [num_jobs], "too early for steps"
    requests[0].phase = Phase.DECODING
    leases.beat()
    assert calls.num_jobs == [num_jobs, 1]
    clock.now += 0.01
    leases.beat()
    assert sum(calls.num_jobs[2:]) == num_jobs - 1, "the first has reported its step together with its phase"


def test_a_lease_is_renewed_when_a_third_of_it_has_passed(
    client: fakeredis.FakeRedis, leases: Leases, held: Held, calls: Calls, clock: Clock
) -> None:
    (job,) = held(1)
    leases.beat()
    client.hset(routing.job_key(job.claim.record.id), "lease_until", 1)
    clock.now += 9.9
    leases.beat()
    assert field(client, job, "lease_until") == "1"
    clock.now += 0.1
    leases.beat()
    assert float(field(client, job, "lease_until") or 0) > 1 and calls.num_jobs == [1, 1]


def test_after_a_beat_that_failed_everything_is_reported_again(leases: Leases, held: Held, calls: Calls) -> None:
    jobs = held(2)
    leases.beat()
    request = attach(jobs[0], InEngine())
    request.preview = Preview(2, np.full((1, 4, 6, 3), 200, dtype=np.uint8))
    calls.fails = True
    with pytest.raises(BrokerUnavailable):
        leases.beat()
    calls.fails = False
    leases.beat()
    assert calls.num_jobs == [2, 1, 2], "both leases are renewed, since the broker may have lost its data"
    assert jobs[0]._preview_step == 2


def test_a_job_is_stopped_at_its_deadline_without_the_broker(
    client: fakeredis.FakeRedis, store: Records, leases: Leases, clock: Clock, calls: Calls
) -> None:
    with leases.hold(claim(client, deadline_s=60)) as job, leases.hold(claim(client)) as other:
        request = attach(job, InEngine())
        leases.beat()
        clock.now += 59.5
        leases.beat()
        assert job.stop_reason is None
        clock.now += 0.6
        calls.fails = True
        with contextlib.suppress(BrokerUnavailable):
            leases.beat()
        assert (job.stop_reason, request.cancelled, other.stop_reason) == ("expired", ["expired"], None)


def test_a_cancel_whose_signal_is_lost_is_heard_at_the_renewal(
    client: fakeredis.FakeRedis, leases: Leases, held: Held, clock: Clock
) -> None:
    (job,) = held(1)
    leases.beat()
    records.run(client, records.cancel(job.claim.record.id, 600))
    leases.beat()
    assert job.stop_reason is None
    clock.now += 10
    leases.beat()
    assert job.stop_reason == "cancel"


def test_a_signal_stops_the_job_that_is_held_under_its_token(leases: Leases, held: Held) -> None:
    first, second = held(2)
    record_id, token = first.claim.record.id, first.claim.token
    leases.stop_job(Signal(record_id, token - 1, Verdict.STALE))
    leases.stop_job(Signal("another", token, Verdict.CANCEL))
    assert first.stop_reason is None
    leases.stop_job(Signal(record_id, token, Verdict.CANCEL))
    assert (first.stop_reason, second.stop_reason) == ("cancel", None)


def test_a_stale_job_stops_alone(client: fakeredis.FakeRedis, leases: Leases, held: Held) -> None:
    jobs = held(3)
    client.hset(routing.job_key(jobs[1].claim.record.id), "token", 99)
    leases.beat()
    assert [job.stop_reason for job in jobs] == [None, "stale", None]


def test_a_job_that_continues_from_a_checkpoint_never_goes_back_a_step(client: fakeredis.FakeRedis, leases: Leases, clock: Clock) -> None:
    first = claim(client)
    store = Records(client)
    assert store.checkpoint(first.record.id, first.token, 12, b"state") and store.release(first.record.id, first.token)
    second = store.claim(first.record.id, "w", 30)
    assert second is not None
    with leases.hold(second) as job:
        leases.beat()  # before the engine has it
        assert field(client, job, "step") == "12"
        request = attach(job, InEngine())
        request.step = 0  # in the engine, and not resumed yet
        leases.beat()
        assert field(client, job, "step") == "12"
        request.step = 13
        clock.now += INTERVAL_S
        leases.beat()
        assert field(client, job, "step") == "13"


def test_steps_of_the_job_are_counted_and_not_calls_of_the_network(client: fakeredis.FakeRedis, leases: Leases, clock: Clock) -> None:
    """heun calls the network twice per step, except at the last: 39 calls for 20 steps."""
    with leases.hold(claim(client, scheduler="heun")) as job:
        request = attach(job, InEngine(b"state", num_steps=39))
        request.step = 20
        leases.beat()
        assert field(client, job, "step") == "10"
        assert (field(client, job, "checkpoint_step"), job.checkpoint_step) == ("10", 10)
        request.step = 39
        clock.now += INTERVAL_S
        leases.beat()
        assert field(client, job, "step") == "20"


def test_each_preview_is_sent_once(client: fakeredis.FakeRedis, leases: Leases) -> None:
    def preview(step: int) -> Preview:
        return Preview(step, np.full((1, 4, 6, 3), 200, dtype=np.uint8))

    with leases.hold(claim(client)) as job:
        request = attach(job, InEngine())
        request.preview = preview(2)
        for _ in range(3):
            leases.beat()
        assert len(preview_events(client, job)) == 1
        request.preview = preview(3)
        for _ in range(3):
            leases.beat()
        assert len(preview_events(client, job)) == 2
        (newest,) = previews(client, job)
    (url,) = newest["images"]
    kind, _, data = url.partition(",")
    assert kind == "data:image/webp;base64" and Image.open(io.BytesIO(base64.b64decode(data))).size == (6, 4)


@pytest.mark.parametrize("attached", ["before", "after"])
def test_a_cancel_reaches_the_engine_whether_it_has_the_job_before_or_after(
    client: fakeredis.FakeRedis, leases: Leases, attached: str
) -> None:
    request = InEngine()
    with leases.hold(claim(client)) as job:
        if attached == "before":
            attach(job, request)
        records.run(client, records.cancel(job.claim.record.id, 600))
        leases.beat()
        if attached == "after":
            assert request.cancelled == []
            attach(job, request)
        assert request.cancelled == ["cancel"] and job.stop_reason == "cancel"


def test_the_first_reason_to_stop_counts(client: fakeredis.FakeRedis, leases: Leases) -> None:
    with leases.hold(claim(client)) as job:
        job.stop("cancel")
        job.stop("stale")
    assert job.stop_reason == "cancel"


@pytest.mark.parametrize("data", [b"", b"state"], ids=["too large", "refused"])
def test_a_checkpoint_that_is_not_kept_is_not_sent_again(
    client: fakeredis.FakeRedis, store: Records, leases: Leases, monkeypatch: pytest.MonkeyPatch, data: bytes
) -> None:
    monkeypatch.setattr(store, "checkpoint", lambda *_: False)
    with leases.hold(claim(client)) as job:
        request = attach(job, InEngine(data))
        for _ in range(3):
            leases.beat()
    assert (request.num_serialized, job.checkpoint_step) == (1, 0)


def test_a_checkpoint_that_fails_keeps_no_other_job_from_hearing_its_verdict(
    client: fakeredis.FakeRedis, store: Records, leases: Leases, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> bool:
        raise BrokerUnavailable("away")

    monkeypatch.setattr(store, "checkpoint", away)
    holders = [leases.hold(claim(client)) for _ in range(6)]
    jobs = [holder.__enter__() for holder in holders]
    for job in jobs:
        attach(job, InEngine(b"state"))
    for job in jobs[1:]:
        records.run(client, records.cancel(job.claim.record.id, 600))
    with pytest.raises(BrokerUnavailable):
        leases.beat()
    assert [job.stop_reason for job in jobs] == [None, *["cancel"] * 5]
    for holder in holders:
        holder.__exit__(None, None, None)


def test_with_a_stalled_engine_only_uploads_keep_their_leases(client: fakeredis.FakeRedis, store: Records) -> None:
    leases = Leases(store, lease_s=600, engine_stalled=lambda: True)
    with leases.hold(claim(client)) as denoising, leases.hold(claim(client)) as uploading:
        uploading.uploading = True
        before = field(client, denoising, "lease_until"), field(client, uploading, "lease_until")
        leases.beat()
        assert field(client, denoising, "lease_until") == before[0]
        assert field(client, uploading, "lease_until") != before[1]


def test_whether_uploads_are_left(client: fakeredis.FakeRedis, leases: Leases) -> None:
    with leases.hold(claim(client)) as job:
        assert not leases.uploads_left()
        job.uploading = True
        assert leases.uploads_left()
    assert not leases.uploads_left()


def test_at_the_end_of_a_drain_jobs_are_given_back_without_counting_as_crashes(client: fakeredis.FakeRedis, leases: Leases) -> None:
    with leases.hold(claim(client)) as job:
        leases.release_all()
        assert (field(client, job, "status"), field(client, job, "crashes")) == ("queued", "0")


def test_while_the_broker_is_away_the_process_counts_as_well_and_the_outage_is_passed_on(client: fakeredis.FakeRedis) -> None:
    touched, lost = threading.Event(), threading.Event()
    away = Records(connect("redis://127.0.0.1:9/0"))  # no server listens there
    leases = Leases(away, lease_s=30, touch_liveness_file=touched.set, broker_lost=lost.set)
    with leases.hold(claim(client)):
        leases.start()
        assert touched.wait(PATIENCE_S) and lost.wait(PATIENCE_S)
        touched.clear()
        assert touched.wait(PATIENCE_S), "the loop goes on"
        leases.stop()


def test_a_liveness_file_that_cannot_be_written_costs_no_lease(client: fakeredis.FakeRedis, store: Records, tmp_path: Path) -> None:
    unwritable = LivenessFile(tmp_path / "no such folder" / "ready")
    leases = Leases(store, lease_s=600, touch_liveness_file=unwritable.touch)
    with leases.hold(claim(client)) as job:
        before = field(client, job, "lease_until")
        leases.start()
        eventually(lambda: field(client, job, "lease_until") != before, "the lease was not renewed")
        leases.stop()


class Saved:
    """A checkpoint whose bytes tell its step; compressing it does what a test says."""

    def __init__(self, step: int, compress: Callable[[], object] = lambda: None) -> None:
        self.step, self._compress = step, compress
        self.num_serialized = 0

    def to_bytes(self, _: object) -> bytes:
        self.num_serialized += 1
        self._compress()
        return f"step {self.step}".encode()


def no_memory() -> None:
    raise MemoryError


def test_a_checkpoint_that_cannot_be_compressed_is_logged_once_and_keeps_no_other_job_from_its_own(
    client: fakeredis.FakeRedis, leases: Leases, caplog: pytest.LogCaptureFixture
) -> None:
    broken = Saved(3, no_memory)
    holders = [leases.hold(claim(client)) for _ in range(6)]
    jobs = [holder.__enter__() for holder in holders]
    for job in jobs:
        attach(job, InEngine(b"state"))
    cast(Any, jobs[0].request).checkpoint = broken
    for _ in range(3):
        leases.beat()
    assert broken.num_serialized == 1
    assert [job.checkpoint_step for job in jobs] == [0, *[3] * 5]
    (logged,) = [entry for entry in caplog.records if entry.exc_info]
    assert logged.getMessage() == f"job {jobs[0].claim.record.id}: no checkpoint of network call 3"
    cast(Any, jobs[0].request).checkpoint = Saved(4)
    leases.beat()
    assert jobs[0].checkpoint_step == 4, "the next checkpoint is written again"
    for holder in holders:
        holder.__exit__(None, None, None)


def test_an_older_checkpoint_never_replaces_a_newer_one(client: fakeredis.FakeRedis, store: Records, leases: Leases) -> None:
    """The thread of the leases is still compressing one when the job's own thread writes the last one."""
    with leases.hold(claim(client)) as job:
        request = attach(job, InEngine())
        newer = threading.Thread(target=leases.save_checkpoint, args=(job,))

        def overtaken() -> None:
            request.checkpoint = cast(Any, Saved(20))
            newer.start()
            newer.join(0.5)  # what an unguarded write needs; a guarded one waits for this one to end

        request.checkpoint = cast(Any, Saved(17, overtaken))
        leases.save_checkpoint(job)
        newer.join(PATIENCE_S)
        assert (field(client, job, "checkpoint_step"), job.checkpoint_step) == ("20", 20)
        assert store.load_checkpoint(job.claim.record.id) == b"step 20"


@pytest.mark.parametrize("problem", [BrokerUnavailable("away"), RuntimeError("broken")], ids=["broker", "bug"])
def test_a_job_that_cannot_be_given_back_keeps_no_other_from_it(
    client: fakeredis.FakeRedis, store: Records, leases: Leases, monkeypatch: pytest.MonkeyPatch, problem: Exception
) -> None:
    release, tried = store.release, []

    def fails_once(*args: Any) -> bool:
        tried.append(args)
        if len(tried) == 1:
            raise problem
        return release(*args)

    monkeypatch.setattr(store, "release", fails_once)
    with leases.hold(claim(client)) as first, leases.hold(claim(client)) as second:
        leases.release_all()
        assert sorted([field(client, first, "status"), field(client, second, "status")], key=str) == ["queued", "running"]


def test_a_broker_that_hangs_does_not_hold_up_the_end_for_every_job(
    client: fakeredis.FakeRedis, store: Records, leases: Leases, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, tried = [0.0], []

    def hangs(*args: Any) -> bool:
        tried.append(args)
        now[0] += 5
        raise BrokerUnavailable("away")

    monkeypatch.setattr(store, "release", hangs)
    monkeypatch.setattr(leases_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    holders = [leases.hold(claim(client)) for _ in range(6)]
    for holder in holders:
        holder.__enter__()
    leases.release_all()
    assert len(tried) == 2
    for holder in holders:
        holder.__exit__(None, None, None)
