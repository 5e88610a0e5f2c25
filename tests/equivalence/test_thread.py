"""Warm-up, and the thread that owns the device."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
import torch
from support.engines import (
    FIXED_ROWS,
    Decodes,
    assert_cancelled,
    assert_close,
    drain,
    keys,
    limit_for,
    make_engine,
    num_used,
    once,
    run,
    solo,
    work,
)

from latentline.errors import ConfigurationError
from latentline_worker.engine.engine import Engine
from latentline_worker.engine.host_copies import HostCopies
from latentline_worker.engine.lanes import MAX_LANES
from latentline_worker.engine.memory import Memory
from latentline_worker.engine.request import Cancelled, Request
from latentline_worker.models.sd import StableDiffusion


def test_an_engine_that_fails_ends_every_request(
    family: StableDiffusion, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An error in the loop itself, which belongs to no job."""
    engine = make_engine(family)
    begun = threading.Event()

    select = engine.planner.select

    def fail(requests: Sequence[Request]) -> list[Request]:
        if engine.num_steps >= 2:
            begun.set()
            raise RuntimeError("not a job's error")
        return select(requests)

    monkeypatch.setattr(engine.planner, "select", fail)
    first, second = engine.submit(work(family, steps=20)), engine.submit(work(family, steps=20))
    engine.start()
    assert begun.wait(60)
    for request in (first, second, engine.submit(work(family, steps=20))):
        with pytest.raises(Cancelled, match="lost"):
            request.result(60)
    assert engine.stalled_for() == float("inf")
    assert "the engine has failed" in caplog.text
    engine.stop()


def test_warm_up_measures_memory_finds_a_row_budget_and_leaves_nothing_behind(family: StableDiffusion) -> None:
    engine = Engine([family], max_rows=16)
    engine.warm_up()
    key, _ = keys(family)
    assert engine.memory.row_bytes(key) > 0 and engine.memory.decode_bytes("tiny", key.num_latents) > 0
    assert 1 <= engine.planner.cost.budget(key) <= 16
    assert engine.planner.cost.seconds(key, 1) > 0, "nothing was observed"
    assert engine.idle
    assert num_used(engine) == 0
    subject = work(family, steps=5, decode=True)
    assert torch.equal(run(engine, subject)[0].result(0), solo(family, subject))


@once
def test_warm_up_keeps_the_row_budget_within_memory(family: StableDiffusion, measured: Memory) -> None:
    own, _ = keys(family)
    engine = make_engine(family, memory_limit_bytes=limit_for(measured, 1.5 * measured.needed_bytes(own)))
    engine.warm_up()
    rows = engine.memory.num_rows(own, 64)
    assert 1 <= rows < 64
    assert engine.planner.cost.limit(own) == rows
    assert engine.idle and num_used(engine) == 0


@once
def test_warm_up_refuses_fixed_rows_that_do_not_fit(family: StableDiffusion, measured: Memory) -> None:
    own, _ = keys(family)
    # Enough for the forward, were it not for the share that is kept for jobs between steps.
    limit = limit_for(measured, 1.05 * measured.needed_bytes(own, rows=32))
    engine = make_engine(family, fixed_rows=32, memory_limit_bytes=limit)
    with pytest.raises(ConfigurationError, match=r"reproducible_rows: got 32; memory allows \d+$"):
        engine.warm_up()


@once
def test_warm_up_accepts_fixed_rows_that_fit(family: StableDiffusion, measured: Memory) -> None:
    own, _ = keys(family)
    engine = make_engine(family, fixed_rows=32, memory_limit_bytes=limit_for(measured, 1.5 * measured.needed_bytes(own, rows=32)))
    engine.warm_up()
    assert torch.isfinite(run(engine, work(family))[0].result(0)).all()


@once
def test_a_rows_footprint_is_that_of_one_row_in_the_reproducible_mode_too(family: StableDiffusion, measured: Memory) -> None:
    own, _ = keys(family)
    engine = make_engine(family, fixed_rows=FIXED_ROWS)
    engine.warm_up()
    assert engine.memory.row_bytes(own) <= 1.5 * measured.row_bytes(own)


@once
def test_many_threads_submit_and_cancel_while_the_engine_runs(family: StableDiffusion) -> None:
    engine = make_engine(family)
    start = threading.Barrier(8)
    requests: dict[int, list[Request]] = {}

    def client(number: int) -> None:
        start.wait()
        requests[number] = []
        for i in range(5):
            request = engine.submit(work(family, f"thing {number}", steps=3 + i, seeds=(number * 10 + i,), decode=i % 2 == 0))
            requests[number].append(request)
            if i == 4:
                request.cancel("changed my mind")

    threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    engine.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mine in requests.values():
        for i, request in enumerate(mine):
            if i < 4:
                assert request.result(60).shape == ((1, 32, 32, 3) if i % 2 == 0 else (1, 4, 16, 16))
            else:
                request.future.exception(60)  # cancelled, or done before that was seen
    engine.stop()
    assert engine.idle
    assert num_used(engine) == 0
    assert_close(requests[3][1].result(0), solo(family, work(family, "thing 3", steps=4, seeds=(31,))))


@once
def test_stopping_decodes_what_is_denoised_and_cancels_the_rest(family: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, stopping = threading.Event(), threading.Event()
    decodes = Decodes(family, monkeypatch)

    def hold(latents: torch.Tensor, tiled: bool) -> Exception | None:
        entered.set()
        stopping.wait(60)
        return None

    decodes.fails = hold
    engine = make_engine(family, decode_batch=1)
    paid = engine.submit(work(family, "paid", steps=2, seeds=(1, 2, 3), decode=True))
    long = engine.submit(work(family, "long", steps=100))
    engine.start()
    assert entered.wait(60)
    waiting = engine.submit(work(family, "waiting"))
    engine.stop(timeout_s=0)  # only says so: the engine thread stands in the first of three decodes
    assert_cancelled(engine.submit(work(family, "refused")), "shutdown")
    stopping.set()
    engine.stop()
    assert paid.result(0).shape == (3, 32, 32, 3)
    for request in (long, waiting):
        assert_cancelled(request, "shutdown")
    assert num_used(engine) == 0
    assert long.checkpoint is not None
    assert long.checkpoint.step == long.step > 0


@once
def test_decodes_after_a_stop_are_progress_and_each_result_is_published_before_the_next(
    family: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    decodes = Decodes(family, monkeypatch)
    stalls: list[float] = []
    order: list[str] = []
    publish_done = HostCopies.publish_done

    def published(self: HostCopies) -> None:
        order.append("publish")
        publish_done(self)

    def slow(latents: torch.Tensor, tiled: bool) -> Exception | None:
        order.append("decode")
        stalls.append(engine.stalled_for())
        engine.intake.progress_at -= 3600  # an hour passes
        return None

    decodes.fails = slow
    engine = make_engine(family, decode_batch=1)
    paid = engine.submit(work(family, "paid", steps=1, seeds=(1, 2, 3), decode=True))
    engine.step()  # denoised, and the first of three images decoded
    monkeypatch.setattr(HostCopies, "publish_done", published)
    order.clear()
    engine.stop()
    engine.start()
    engine.stop()
    assert paid.result(0).shape == (3, 32, 32, 3)
    assert order == ["decode", "publish"] * 2
    assert len(stalls) == 3 and max(stalls) < 1800, "the watchdog would end a healthy process"


@once
def test_an_engine_that_waited_for_work_is_not_stalled_when_some_comes(family: StableDiffusion) -> None:
    engine = make_engine(family)
    engine.intake.progress_at -= 3600  # idle for an hour
    assert engine.stalled_for() == 0
    engine.submit(work(family))
    assert engine.stalled_for() < 60


@once
def test_a_decode_that_hangs_is_a_stall_also_when_nothing_else_is_left(family: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, go_on = threading.Event(), threading.Event()
    decodes = Decodes(family, monkeypatch)

    def hold(latents: torch.Tensor, tiled: bool) -> Exception | None:
        entered.set()
        go_on.wait(60)
        return None

    decodes.fails = hold
    engine = make_engine(family)
    engine.start()
    request = engine.submit(work(family, decode=True))
    assert entered.wait(60)
    engine.intake.progress_at -= 3600
    assert engine.stalled_for() > 3000
    go_on.set()
    request.result(60)
    engine.stop()


@once
def test_a_device_that_is_lost_fails_the_engine_and_not_one_job_after_the_other(
    family: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denoise(*_: object) -> torch.Tensor:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    engine = make_engine(family)
    monkeypatch.setattr(family, "denoise", denoise)
    requests = [engine.submit(work(family, seeds=(i,))) for i in range(3)]
    engine.start()
    for request in requests:
        with pytest.raises(Cancelled, match="lost"):
            request.result(60)
    assert engine.stalled_for() == float("inf")
    engine.stop()


@once
def test_sizes_do_not_pile_up(family: StableDiffusion) -> None:
    engine = make_engine(family)
    long = engine.submit(work(family, steps=60, size=(32, 32)))
    engine.step()
    for i in range(12):
        engine.submit(work(family, size=(32 + 8 * i, 64), steps=1))
        engine.step()
    assert len(engine.lanes) <= MAX_LANES
    assert long.lane in engine.lanes, "a lane in use stays"
    drain(engine)
    assert torch.isfinite(long.result(0)).all()
