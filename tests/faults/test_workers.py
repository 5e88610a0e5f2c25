"""Worker processes that are killed, stopped, told to end, or given a job that breaks them."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from click.testing import CliRunner
from support.cluster import EACH_MODEL, LEASE_S, Cluster
from support.collector import CLIENT_SPAN, TRACE_ID, TRACEPARENT, Collector, Span, in_trace, tree
from support.receiver import Receiver

from latentline import records, routing
from latentline.cli import main
from latentline.jobs import Status

Figure = Callable[..., None]


def of(cluster: Cluster) -> str:
    """For a row of the report."""
    return " (flow matching)" if cluster.flow else ""


def check_trace(collector: Collector, job_id: str, lost: int) -> None:
    """The trace of a job that lost its worker: both attempts below the span in which it was submitted, the second linked to the first."""

    def told(found: list[Span]) -> list[Span]:
        return [span for span in found if span.name == "attempt" and span.attributes["latentline.job.id"] == job_id]

    spans = collector.until(TRACE_ID, lambda found: len(told(found)) > lost)
    first, second = told(spans)[lost - 1 : lost + 1]
    own = {first.span_id, second.span_id}
    print(tree([first, second, *(span for span in spans if span.parent_id in own)]))
    assert first.parent_id == second.parent_id == CLIENT_SPAN
    assert (first.attributes["latentline.outcome"], second.attributes["latentline.outcome"]) == ("lost", "succeeded")
    assert (first.failed, second.failed, second.links) == (True, False, ((TRACE_ID, first.span_id),))
    assert first.attributes["latentline.worker"] != second.attributes["latentline.worker"] == second.instance
    steps = {span.parent_id: sum(event["count"] for kind, event in span.events if kind == "steps") for span in spans if span.events}
    assert steps[second.span_id] == 100 - second.attributes["latentline.resumed_from"] and steps[first.span_id] > 0
    names = [span.name for span in spans if span.parent_id == second.span_id]
    assert {"claim", "denoising", "uploading", "settle"} <= set(names)


@EACH_MODEL
def test_a_killed_workers_jobs_go_on_elsewhere_from_their_checkpoints(
    cluster: Cluster, receiver: Receiver, collector: Collector, full: bool, figure: Figure
) -> None:
    """kill -9 under load, over and over: nothing lost, nothing doubled, few steps done twice; traces tell it."""
    full = full and not cluster.flow
    kills = 100 if full else 1
    rng = random.Random(0)
    cluster.start_worker()
    cluster.start_worker()
    cluster.start_callbacks()
    hit: list[tuple[str, int]] = []  # jobs, and the attempt that was lost
    resumed_after: list[float] = []
    repeated: list[int] = []
    repeated_s: list[float] = []
    for _ in range(kills):
        cluster.until_ready(cluster.workers())  # another worker is there to take the jobs over
        while len(cluster.client.list(Status.QUEUED, limit=200)[0]) < 4:
            with in_trace(TRACEPARENT):
                cluster.submit(4, num_inference_steps=100, callback={"url": receiver.url})
        cluster.until(lambda: cluster.running(step=8))
        time.sleep(rng.uniform(0, 2))  # at any moment of a job's life
        victim = rng.choice(cluster.workers())
        before = {r.id: r for r in cluster.running() if str(r.worker).endswith(f":{victim.process.pid}")}
        seconds, micros = cluster.redis.time()
        killed_at = seconds + micros / 1e6
        cluster.kill(victim)
        cluster.start_worker(wait=False)
        for job_id, record in before.items():

            def next_attempt(job_id: str = job_id, attempt: int = record.attempt) -> bool:
                now = cluster.get(job_id)
                return now.attempt > attempt or now.status.terminal

            cluster.until(next_attempt)
            events = records.run(cluster.redis, records.events(job_id))
            attempts = [i for i, event in enumerate(events) if event.type == "job.running"]
            if len(attempts) > record.attempt:
                hit.append((job_id, record.attempt))
            if len(attempts) > record.attempt:  # another attempt has begun: from which step, and what of this attempt is repeated
                start = events[attempts[record.attempt]]
                this_attempt = events[attempts[record.attempt - 1] : attempts[record.attempt]]
                again = [e for e in this_attempt if e.type == "job.progress" and e.data["step"] > start.data["step"]]
                repeated.append(max((e.data["step"] for e in again), default=start.data["step"]) - start.data["step"])
                repeated_s.append(again[-1].at - again[0].at if again else 0.0)
                resumed_after.append(next(e.at for e in this_attempt if e.type == "job.queued") - killed_at)
    cluster.finish(timeout_s=300)
    cluster.until(lambda: len(receiver.answered) == len(cluster.accepted))
    ended = cluster.check_invariants()
    figure(
        f"kill -9 a worker under load{of(cluster)}",
        kills=kills,
        jobs=len(cluster.accepted),
        ended=ended,
        callbacks_told_once=len(receiver.answered),
        hit=len(repeated),
        longest_until_requeued_s=round(max(resumed_after, default=0.0), 2),
        most_steps_repeated=max(repeated, default=0),
        mean_steps_repeated=round(sum(repeated) / max(1, len(repeated)), 1),
        longest_repeated_s=round(max(repeated_s, default=0.0), 2),
    )
    assert repeated, "no job was hit: the test shows nothing"
    if kills == 1:  # a worker that is killed may take the spans of jobs with it that it had ended
        for job_id, number in hit:
            check_trace(collector, job_id, number)
    if full:  # times are judged only on a machine that does nothing else
        # A checkpoint is due every 0.2 s, less often if all of them would cost over 1% of the time; a beat may report steps that are
        # newer than the newest checkpoint.
        assert max(repeated_s) <= 1
        assert max(resumed_after) <= LEASE_S + 2


def test_a_zombies_commits_are_fenced(cluster: Cluster, figure: Figure) -> None:
    """SIGSTOP past two leases, then CONT."""
    zombie = cluster.start_worker()
    ids = cluster.submit(4, num_inference_steps=100)
    cluster.until(lambda: len(cluster.running(step=2)) >= 4)
    cluster.kill(zombie, signal.SIGSTOP)
    cluster.start_worker()
    time.sleep(2 * LEASE_S)
    cluster.until(lambda: all(cluster.get(i).attempt == 2 or cluster.get(i).status.terminal for i in ids))
    cluster.kill(zombie, signal.SIGCONT)
    done = cluster.finish()
    ended = cluster.check_invariants()
    assert {record.worker for record in done} == {done[0].worker} and not str(done[0].worker).endswith(f":{zombie.process.pid}")
    cluster.until(lambda: zombie.log.read_text().count("another worker owns it now") == 4)
    figure("SIGSTOP past two leases, then CONT", jobs=len(ids), ended=ended, fenced=4)


def test_a_worker_told_to_end_hands_its_jobs_over_at_once(cluster: Cluster, full: bool, figure: Figure) -> None:
    """SIGTERM under load."""
    first = cluster.start_worker()
    cluster.start_worker()
    ids = cluster.submit(12, num_inference_steps=100)
    cluster.until(lambda: any(str(r.worker).endswith(f":{first.process.pid}") for r in cluster.running(step=5)))
    mine = [r for r in cluster.running() if str(r.worker).endswith(f":{first.process.pid}")]
    started = time.monotonic()
    cluster.kill(first, signal.SIGTERM)
    first.process.wait(60)
    took = time.monotonic() - started
    cluster.finish()
    ended = cluster.check_invariants()
    handed_over = [cluster.get(record.id) for record in mine]
    resumed = [record for record in handed_over if record.timings.get("resumed_from", 0) > 0]
    figure("SIGTERM under load", jobs=len(ids), in_flight=len(mine), resumed=len(resumed), exited_after_s=round(took, 2), ended=ended)
    assert resumed, "no job was handed over with its steps"
    assert not full or took <= 5 + 2, "drain + 2 s"


@EACH_MODEL
@pytest.mark.parametrize("fault", ["oom", "nan", "error", "kill"])
def test_only_the_guilty_job_dies(cluster: Cluster, full: bool, figure: Figure, fault: str) -> None:
    """Out of memory at step n; NaN; an error; a job that kills its process. Always at the same of ten steps."""
    rounds = 20 if full and not cluster.flow else 1
    innocents = guilty = lost_workers = 0
    cluster.start_worker()
    for _ in range(rounds):
        (bad,) = cluster.submit(1, prompt=f"a cat [{fault}@700]", num_inference_steps=10)
        good = cluster.submit(5, num_inference_steps=30)
        deadline = time.monotonic() + 240
        while not all(cluster.get(i).status.terminal for i in [bad, *good]):
            assert time.monotonic() < deadline, cluster.children[-1].tail()
            if not cluster.alive():  # an operator's supervisor restarts what has died
                lost_workers += 1
                cluster.start_worker()
            time.sleep(0.05)
        guilty += cluster.get(bad).status is Status.FAILED
        innocents += sum(cluster.get(i).status is not Status.SUCCEEDED for i in good)
    codes = {"oom": "out_of_memory", "nan": "numerical_error", "error": "internal_error", "kill": "worker_lost"}
    assert cluster.get(bad).error is not None and cluster.get(bad).error.code == codes[fault]  # type: ignore[union-attr]
    cluster.check_invariants((Status.SUCCEEDED, Status.FAILED))
    figure(
        f"a job with {fault} at timestep 700{of(cluster)}",
        rounds=rounds,
        guilty_failed=guilty,
        innocents_lost=innocents,
        workers_lost=lost_workers,
    )
    assert (guilty, innocents) == (rounds, 0)


def test_a_wedged_worker_loses_its_jobs_and_its_process(cluster: Cluster, figure: Figure) -> None:
    """A network call that never returns: the device hangs. The job behind it ends like one that kills its process."""
    stall = {"LATENTLINE_STALL_S": "3"}
    cluster.start_worker(**stall)
    (bad,) = cluster.submit(1, prompt="a cat [wedge@700]", num_inference_steps=10)
    good = cluster.submit(5, num_inference_steps=30)
    statuses = []

    def all_ended() -> bool:
        if not cluster.alive():
            statuses.append(cluster.children[-1].process.returncode)
            cluster.start_worker(**stall)
        return all(cluster.get(i).status.terminal for i in [bad, *good])

    cluster.until(all_ended, 240)
    error = cluster.get(bad).error
    assert error is not None and error.code == "worker_lost" and set(statuses) == {os.EX_SOFTWARE}
    assert {cluster.get(i).status for i in good} == {Status.SUCCEEDED}
    ended = cluster.check_invariants((Status.SUCCEEDED, Status.FAILED))
    figure("a network call that never returns", workers_ended=len(statuses), innocents_lost=0, ended=ended)


def test_a_parent_of_several_workers_that_is_killed_leaves_none_behind(cluster: Cluster, figure: Figure) -> None:
    """One process per device; the two devices do not exist, and the children run on the CPU. They hand their jobs over."""
    parent = cluster.start_worker(wait=False, CUDA_VISIBLE_DEVICES="0,1", LATENTLINE_CONCURRENCY="4")
    cluster.until(lambda: parent.log.read_text(errors="replace").count(": ready\n") == 2)
    ids = cluster.submit(8, num_inference_steps=100)
    cluster.until(lambda: len({r.worker for r in cluster.running(step=3)}) == 2)
    children = psutil.Process(parent.process.pid).children()
    cluster.kill(parent)
    gone, alive = psutil.wait_procs(children, timeout=60)
    assert len(gone) == 2 and not alive
    cluster.start_worker()
    done = cluster.finish()
    figure("the parent of two workers is killed", jobs=len(ids), left_behind=len(alive), ended=cluster.check_invariants())
    assert any(record.timings["resumed_from"] > 0 for record in done)


def test_a_flipped_byte_in_the_weights_stops_the_start(cluster: Cluster, tiny_model: Path, figure: Figure) -> None:
    from latentline_worker.models import checksums

    checksums.write(tiny_model)
    weights = next((tiny_model / "unet").glob("*.safetensors"))
    whole = weights.read_bytes()
    middle = len(whole) // 2
    try:
        weights.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        worker = cluster.start_worker(wait=False)
        status = worker.process.wait(120)
    finally:
        weights.write_bytes(whole)
        (tiny_model / checksums.NAME).unlink()
    assert status == 1 and f"{weights}: its SHA-256 sum" in worker.tail() and "Traceback" not in worker.tail()
    figure("a flipped byte in the weights", exit_status=status)


def test_a_clock_that_is_a_minute_ahead_doubles_nothing(cluster: Cluster, figure: Figure) -> None:
    cluster.start_worker(FAULT_SKEW_S="60")
    cluster.start_worker()
    ids = cluster.submit(12, num_inference_steps=60)
    done = cluster.finish()
    ended = cluster.check_invariants()
    assert {record.attempt for record in done} == {1}
    assert len({record.worker for record in done}) == 2, "one of the workers did nothing: the test shows nothing"
    figure("a worker's clock 60 s ahead", jobs=len(ids), ended=ended, most_attempts=1)


@EACH_MODEL
def test_the_picture_of_a_resumed_job_is_the_uninterrupted_one(cluster: Cluster, figure: Figure, tmp_path: Path) -> None:
    """Bit-identical in the reproducible mode, the sampler's noise included; so `latentline verify` finds as well."""
    fields = {"num_inference_steps": 150, "scheduler": cluster.noisy, "num_images": 2}
    mode = {"LATENTLINE_REPRODUCIBLE_ROWS": "4"}
    worker = cluster.start_worker(**mode)
    (alone,) = cluster.submit(1, **fields)
    cluster.finish([alone])
    seed = cluster.get(alone).request.seed
    job = cluster.client.submit(model=cluster.model.name, prompt="a cat", seed=seed, **fields)  # type: ignore[arg-type]
    cluster.accepted.append(job.id)
    # Wait for the checkpoint itself: on a busy machine checkpoints are written less often.
    cluster.until(lambda: int(cluster.redis.hget(routing.job_key(job.id), "checkpoint_step") or 0) >= 10)
    os.kill(worker.process.pid, signal.SIGKILL)
    cluster.start_worker(**mode)
    cluster.finish()
    cluster.check_invariants()
    resumed = cluster.get(job.id)
    assert resumed.timings["resumed_from"] > 0 and resumed.timings["denoise_steps"] < 150
    pictures = [[cluster.client.images.download(image.key) for image in cluster.get(i).images] for i in (alone, job.id)]
    pixels = [[_pixels(data) for data in group] for group in pictures]
    assert pixels[0] == pixels[1]
    with contextlib.closing(cluster.start_api()) as http:
        of_lost, of_resumed = pictures[0][1], pictures[1][0]
        again = [verified(http, tmp_path, picture) for picture in (of_lost, of_resumed)]
        fresh = cluster.client.images.download(cluster.get(again[0]["job_id"]).images[0].key)
        again.append(verified(http, tmp_path, fresh))  # made by the worker that is there now
        timeline = cluster.client.timeline(job.id)
    assert [one["outcome"] for one in again] == ["equal"] * 3 and {one["largest_difference"] for one in again} == {0}
    assert [(one.worker, one.outcome) for one in timeline.attempts] == [(1, "lost"), (2, "succeeded")]
    assert timeline.attempts[1].resumed_from == resumed.timings["resumed_from"]
    assert sum(run.count for run in timeline.attempts[1].steps) == resumed.timings["denoise_steps"]
    assert timeline.attempts[0].steps and timeline.attempts[0].made is None, "what it had reported is kept"
    figure(f"a resumed job's picture{of(cluster)}", bit_identical=True, resumed_from=resumed.timings["resumed_from"])


def verified(http: httpx.Client, folder: Path, picture: bytes) -> dict[str, Any]:
    """What `latentline verify` says of a picture."""
    file = folder / "picture.png"
    file.write_bytes(picture)
    result = CliRunner().invoke(main, ["verify", str(file), "--json", "--url", str(http.base_url)])
    assert result.exit_code in (0, 1), result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def _pixels(data: bytes) -> bytes:
    import io

    from PIL import Image

    return Image.open(io.BytesIO(data)).tobytes()
