"""A job's timeline on the real stack."""

from __future__ import annotations

import itertools
from typing import Any

import httpx
from click.testing import CliRunner
from support.jobs import PATIENCE_S

from latentline.cli import main
from latentline.timeline import Timeline
from latentline_worker.embedded.stack import Stack


def submit(http: httpx.Client, **fields: Any) -> str:
    answer = http.post("/v1/jobs", json={"prompt": "a red apple", "num_inference_steps": 8, "guidance_scale": 5, **fields})
    job_id: str = answer.raise_for_status().json()["id"]
    return job_id


def timeline(http: httpx.Client, job_id: str) -> Timeline:
    return Timeline.model_validate(http.get(f"/v1/jobs/{job_id}/timeline").raise_for_status().json())


def test_jobs_that_ran_together_tell_every_step_and_how_many_shared_it(stack: Stack, http: httpx.Client) -> None:
    long = submit(http, num_inference_steps=100, scheduler="euler")
    short = [submit(http, prompt=" ".join(["a green cup"] * 20), num_inference_steps=6, scheduler="unipc", seed=i) for i in range(2)]
    for job_id in (long, *short):
        job = http.get(f"/v1/jobs/{job_id}", params={"wait": PATIENCE_S}).raise_for_status().json()
        assert job["status"] == "succeeded", job
    found = {job_id: timeline(http, job_id) for job_id in (long, *short)}
    for job_id, one in found.items():
        (attempt,) = one.attempts
        assert (one.status, attempt.outcome, attempt.resumed_from) == ("succeeded", "succeeded", 0)
        names = [phase.name for phase in attempt.phases]
        assert [name for name in names if name != "waiting"] == ["encoding", "denoising", "decoding", "uploading"]
        counts = [run.count for run in attempt.steps]
        assert sum(counts) == (100 if job_id == long else 6)
        assert [run.first for run in attempt.steps] == list(itertools.accumulate(counts[:-1], initial=1))
        assert all(ms is not None and ms > 0 for run in attempt.steps for ms in run.durations_ms)
        assert all(run.rows == 2 * run.jobs for run in attempt.steps), "all are guided"
        edges = [0.0, attempt.claimed_s, *(phase.start_s for phase in attempt.phases), attempt.ended_s or 0.0]
        assert edges == sorted(edges)
        assert attempt.made is not None and attempt.made.device == "cpu" and len(attempt.made.weights) == 64
    assert max(run.jobs for run in found[short[0]].attempts[0].steps) >= 2
    shared = set(found[short[0]].attempts[0].shared_with or [])  # without keys whoever asks is an admin
    assert shared and shared <= {long, short[1]}  # the long one may be done before these begin
    cut = found[short[0]].attempts[0].made
    assert cut is not None and cut.prompt_tokens > cut.prompt_tokens_read > 0

    shown = CliRunner().invoke(main, ["timeline", long, "--url", stack.url])
    assert shown.exit_code == 0 and max(map(len, shown.stdout.splitlines())) <= 80, shown.output
    assert "denoising" in shown.stdout and "attempt 1, worker 1: succeeded" in shown.stdout
