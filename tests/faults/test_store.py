"""An object store that fails, is slow, or refuses the worker's credentials."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from support.cluster import Cluster
from support.proxy import Mode

from latentline import records
from latentline.jobs import Status

Figure = Callable[..., None]


@pytest.mark.parametrize(
    ("mode", "fault"), [("http500", "S3 answers 500"), ("http507", "the store's disk is full (507)"), ("hang", "S3 does not answer")]
)
def test_a_store_that_fails_for_a_while_costs_a_retry_and_no_denoising(cluster: Cluster, figure: Figure, mode: Mode, fault: str) -> None:
    cluster.start_worker()
    cluster.s3_proxy.reset()
    cluster.s3_proxy.mode = mode
    (first,) = cluster.submit(1, num_inference_steps=20)

    def tried_again() -> bool:
        return any(e.data.get("delay_s") for e in records.run(cluster.redis, records.events(first)))

    # A try that fails at once may be over before a heartbeat reports it.
    cluster.until(lambda: cluster.get(first).phase == "uploading" or tried_again())
    # The device goes on meanwhile.
    (second,) = cluster.submit(1, num_inference_steps=60)
    cluster.until(lambda: cluster.get(second).step >= 10 or cluster.get(second).phase == "uploading")
    assert not cluster.get(first).status.terminal
    cluster.until(tried_again)
    cluster.s3_proxy.mode = "pass"
    cluster.s3_proxy.reset()
    done = cluster.finish([first])[0]
    cluster.finish()
    ended = cluster.check_invariants()
    assert done.attempt > 1 and done.timings["denoise_steps"] == 0, "its latents were kept"
    figure(fault, attempts=done.attempt, steps_denoised_again=int(done.timings["denoise_steps"]), ended=ended)


def test_a_slow_store_slows_admission_and_never_the_device(cluster: Cluster, figure: Figure) -> None:
    cluster.start_worker(LATENTLINE_CONCURRENCY="4")
    cluster.s3_proxy.reset()
    cluster.s3_proxy.delay_s = 1.0
    ids = cluster.submit(12, num_inference_steps=10)
    most = 0

    def all_ended() -> bool:
        nonlocal most
        most = max(most, len(cluster.client.list(Status.RUNNING, limit=200)[0]))
        return all(cluster.get(job_id).status.terminal for job_id in ids)

    cluster.until(all_ended)
    figure("S3 slow (1 s a chunk)", jobs=len(ids), most_in_flight=most, ended=cluster.check_invariants())
    assert most <= 4


def test_a_store_that_takes_away_the_rights_fails_the_job_with_a_clear_code(cluster: Cluster, figure: Figure) -> None:
    """Another try would not help. The worker goes on, and uploads again once it has its rights back."""
    cluster.start_worker()
    cluster.s3_proxy.reset()
    cluster.s3_proxy.mode = "http403"
    (refused,) = cluster.submit(1, num_inference_steps=20)
    (failed,) = cluster.finish([refused])
    assert failed.status is Status.FAILED and failed.error is not None and failed.error.code == "configuration_error"
    cluster.s3_proxy.mode = "pass"
    cluster.s3_proxy.reset()
    (later,) = cluster.finish(cluster.submit(1, num_inference_steps=20))
    assert later.status is Status.SUCCEEDED
    figure("S3 refuses the credentials while jobs run", code=failed.error.code, attempts=failed.attempt)
    cluster.check_invariants((Status.SUCCEEDED, Status.FAILED))


def test_wrong_credentials_are_named_at_the_start(cluster: Cluster, figure: Figure) -> None:
    worker = cluster.start_worker(wait=False, LATENTLINE_S3_SECRET_ACCESS_KEY="x" * 40)
    assert worker.process.wait(120) == 1
    assert "cannot check bucket 'images': 403" in worker.tail() and "Traceback" not in worker.tail()
    figure("S3 credentials are wrong", exit_status=1)
