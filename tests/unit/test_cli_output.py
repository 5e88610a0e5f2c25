"""What the command line prints and how it ends: text of strangers, errors, exit statuses, JSON."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click
import httpx
import pytest
from support.commands import Service, call, refused, served

from latentline.cli import following, main, remote
from latentline.cli.errors import Failed
from latentline.cli.following import follow
from latentline.errors import BrokerUnavailable
from latentline.terminal import clean, say

ATTACK = "a\x1b[2Jb\rc\nd\x07e\x9b31mf\x7fg\u202eh\u2066i\u2028j\x00k"
SHOWN = r"a\x1b[2Jb\rc\nd\x07e\x9b31mf\x7fg\u202eh\u2066i\u2028j\x00k"

JOB = {
    "id": "x", "status": "succeeded", "phase": None, "step": 2, "num_steps": 2, "queue_position": None, "images": [], "error": None,
    "request": {"prompt": "a cat"},
}  # fmt: skip


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    with served(monkeypatch) as running:
        yield running


def answering(monkeypatch: pytest.MonkeyPatch, answer: Callable[[httpx.Request], httpx.Response]) -> None:
    """Let ``answer`` stand for the API."""
    monkeypatch.setattr(remote.httpx, "Client", partial(httpx.Client, transport=httpx.MockTransport(answer)))
    monkeypatch.setattr(following.httpx, "AsyncClient", partial(httpx.AsyncClient, transport=httpx.MockTransport(answer)))
    monkeypatch.setattr(following, "AGAIN_S", 0.0)


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command and group with its path."""
    for name, command in group.commands.items():
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


ALL = dict(commands(main))
# They serve until they are stopped, or write files and say on stderr how far they are.
WITHOUT_JSON = {("api",), ("worker",), ("callbacks", "serve"), ("evaluate",), ("mcp",)} | {path for path in ALL if path[0] == "train"}
GROUPS = {path for path, command in ALL.items() if isinstance(command, click.Group)}


# Text of strangers


def test_what_controls_a_terminal_is_shown_instead() -> None:
    assert clean(ATTACK) == SHOWN
    assert clean("ünïcode 👩‍🚀 漢字 ‐") == "ünïcode 👩‍🚀 漢字 ‐", "what only looks unusual stays"


def test_an_output_that_is_ascii_only(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    say("é 漢")
    stream.flush()
    assert stream.buffer.getvalue() == b"\\xe9 \\u6f22\n"  # type: ignore[attr-defined]


@pytest.mark.parametrize("as_json", [[], ["--json"]], ids=["text", "json"])
@pytest.mark.parametrize("command", [["status", "x"], ["jobs"], ["models"], ["loras", "list"], ["cancel", "x"]], ids=" ".join)
def test_no_text_of_an_answer_controls_the_terminal(monkeypatch: pytest.MonkeyPatch, command: list[str], as_json: list[str]) -> None:
    image = {"seed": 1, "width": 8, "height": 8, "url": ATTACK}
    job = JOB | {"id": ATTACK, "phase": ATTACK, "status": "running", "images": [image], "request": {"prompt": ATTACK}}
    job["error"] = {"code": ATTACK, "message": ATTACK}
    model = {"id": ATTACK, "family": ATTACK, "default_width": ATTACK, "default_height": 1}
    answers = {"/v1/jobs": {"jobs": [job]}, "/v1/models": {"models": [model]}, "/v1/loras": {"loras": [{"model": ATTACK, "name": ATTACK}]}}
    answering(monkeypatch, lambda request: httpx.Response(200, json=answers.get(request.url.path, job)))
    out = call(*command, *as_json).output
    assert "x1b" in out or "u001b" in out
    assert [character for character in out if clean(character) != character and character != "\n"] == []


@pytest.mark.parametrize("as_json", [[], ["--json"]], ids=["text", "json"])
def test_no_text_of_an_error_controls_the_terminal(monkeypatch: pytest.MonkeyPatch, as_json: list[str]) -> None:
    error = {"code": ATTACK, "message": ATTACK * 1000, "field": ATTACK, "allowed": ATTACK}
    answering(monkeypatch, lambda request: httpx.Response(422, json={"error": error}))
    (line,) = call("models", *as_json, code=2).stderr.splitlines()
    assert clean(line) == line and len(line) < 12_000


@pytest.mark.parametrize(
    "args", [[ATTACK], ["status", ATTACK], ["submit", "a", f"--{ATTACK}"], ["jobs", ATTACK], ["models", "--url", ATTACK]]
)
def test_no_argument_controls_the_terminal(args: list[str]) -> None:
    line = refused(*args)
    assert "x1b" in line and clean(line) == line


def test_a_prompt_of_a_stored_job_is_one_line(service: Service) -> None:
    job_id = service.submit(prompt="two\nlines\x1b[2J" + "x" * 100)
    (line,) = call("status", job_id).stdout.splitlines()
    assert r"two\nlines\x1b[2Jxx" in line and line.endswith("…")


# Help, exit statuses, errors


@pytest.mark.parametrize("path", [(), *ALL], ids=lambda path: " ".join(path) or "latentline")
def test_every_command_has_help_and_json(path: tuple[str, ...]) -> None:
    assert call(*path, "-h").stdout.startswith("Usage: ")
    if path and path not in WITHOUT_JSON | GROUPS:
        assert "as_json" in {option.name for option in ALL[path].params}


@pytest.mark.parametrize(
    ("status", "code"), [(400, 2), (401, 2), (403, 2), (404, 2), (409, 2), (422, 2), (408, 3), (429, 3), (500, 3), (502, 3), (503, 3)]
)
def test_an_exit_status_says_whether_the_same_may_work_later(monkeypatch: pytest.MonkeyPatch, status: int, code: int) -> None:
    answering(monkeypatch, lambda request: httpx.Response(status, json={"error": {"code": "a_code", "message": "so it is"}}))
    assert refused("status", "x", code=code) == "latentline: so it is"
    result = call("status", "x", "--json", code=code)
    assert (result.stdout, json.loads(result.stderr)) == ("", {"error": {"code": "a_code", "message": "so it is"}})


def test_an_error_in_json_names_field_and_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    local = json.loads(call("submit", "a cat", "--steps", "151", "--json", code=2).stderr)["error"]
    assert (local["code"], local["field"], local["allowed"]) == ("invalid_request", "num_inference_steps", "at most 150")
    error = {"code": "invalid_request", "message": "m", "field": "model", "allowed": "this one"}
    answering(monkeypatch, lambda request: httpx.Response(422, json={"error": error}))
    assert json.loads(call("submit", "a cat", "--json", code=2).stderr) == {"error": error}


@pytest.mark.parametrize("args", [["no-such"], ["submit"], ["submit", "a", "--bogus"], ["submit", "a", "--width", "x"], ["jobs", "more"]])
def test_a_wrong_command_line_is_one_line(args: list[str]) -> None:
    assert refused(*args).endswith(" -h shows what there is)")


def test_a_group_alone_shows_its_help() -> None:
    assert call("keys", code=2).stderr.startswith("Usage: ")


def test_a_defect_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no\nway\x1b")

    monkeypatch.setattr(sys.modules["latentline.cli.jobs"], "Api", broken)
    assert "a defect of latentline: RuntimeError: no\\nway\\x1b" in refused("status", "x", code=1)


def test_an_unavailable_broker_is_status_3(monkeypatch: pytest.MonkeyPatch) -> None:
    def away(_: Any) -> None:
        raise BrokerUnavailable("the broker is away")

    monkeypatch.setattr(sys.modules["latentline.cli.dead"], "run", away)
    assert json.loads(call("dead", "list", "--json", code=3).stderr)["error"]["code"] == "broker_unavailable"


# Where images go


@pytest.mark.parametrize(
    ("output", "more", "names"),
    [
        ("cat.gif", [], ".webp"),
        ("cat.png", ["--format", "webp"], "ends in .webp"),
        ("no/such/file/cat.png", [], "cat.png"),
        ("x" * 300 + ".png", [], "-o"),
        ("folder.png\x1b/cat.png", [], "x1b"),
    ],
)
def test_a_place_that_cannot_be_is_refused_before_a_job_is_made(
    service: Service, tmp_path: Path, output: str, more: list[str], names: str
) -> None:
    (tmp_path / "no").touch()
    (tmp_path / "folder.png\x1b").touch()
    assert names in refused("submit", "a cat", "-o", str(tmp_path / output), *more)
    assert service.asked == []


def test_a_files_name_says_its_format(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sent: list[dict[str, Any]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(json.loads(request.content))
        return httpx.Response(202, json=JOB | {"status": "failed", "error": {"code": "c", "message": "m"}})

    answering(monkeypatch, answer)
    monkeypatch.setattr(sys.modules["latentline.cli.jobs"], "follow", lambda api, job, timeout_s: job)
    for name in ("cat.webp", "cat.jpg", "cat.png", "folder"):
        call("submit", "a cat", "-o", str(tmp_path / name), code=1)
    assert [body.get("output") for body in sent] == [{"format": "webp"}, {"format": "jpeg"}, {"format": "png"}, None]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


# Following a job


def test_a_job_is_followed_by_its_events_and_not_by_polls(service: Service) -> None:
    service.start()
    job_id = json.loads(call("submit", "a cat", "--steps", "2", "--wait", "--json").stdout)["id"]
    path = f"/v1/jobs/{job_id}"
    assert service.asked == [("POST", "/v1/jobs"), ("GET", f"{path}/events"), ("GET", path)]


def event(number: int, kind: str, **data: Any) -> str:
    return f"id: {number}-0\nevent: job.{kind}\ndata: {json.dumps(data)}\n\n"


def stream(*events: str) -> httpx.Response:
    return httpx.Response(200, headers={"content-type": "text/event-stream"}, text="".join(events))


def followed(monkeypatch: pytest.MonkeyPatch, streams: list[Any], record: dict[str, Any]) -> tuple[Any, list[str | None]]:
    """The end of a job whose streams are these, one after the other; what each was asked to resume after."""
    asked: list[str | None] = []

    def answer(request: httpx.Request) -> httpx.Response:
        if not request.url.path.endswith("/events"):
            return httpx.Response(200, json=record if not streams else record | {"status": "running"})
        asked.append(request.headers.get("last-event-id"))
        found = streams.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    answering(monkeypatch, answer)
    with click.Context(main).scope():
        return follow(remote.Api("http://x"), JOB | {"status": "queued"}, None), asked


def test_a_stream_that_breaks_is_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = [
        stream(event(1, "queued"), event(2, "progress", step=1)),
        httpx.ConnectError("the API restarts"),
        httpx.Response(503, json={"error": {"message": "not yet"}}),
        stream(": keep-alive\n\n", event(3, "succeeded")),
    ]
    job, asked = followed(monkeypatch, streams, JOB)
    assert job["status"] == "succeeded" and asked == [None, "2-0", "2-0", "2-0"]


def test_a_job_whose_last_event_was_missed_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    assert followed(monkeypatch, [httpx.Response(204)], JOB)[0]["status"] == "succeeded"


@pytest.mark.parametrize(
    ("answer", "says", "status"),
    [
        (httpx.Response(401, json={"error": {"code": "not_authenticated", "message": "the API key was revoked"}}), "revoked", 2),
        (httpx.Response(404, json={"error": {"code": "job_not_found", "message": "no job"}}), "no job", 2),
        (httpx.Response(200, headers={"content-type": "text/html"}, text="<html>"), "another form", 3),
        (stream("event: job.progress\ndata: {\n\n"), "another form", 3),
        (httpx.ConnectError("away"), "does not answer any more; job x goes on", 3),
    ],
)
def test_a_job_that_cannot_be_followed_any_more(monkeypatch: pytest.MonkeyPatch, answer: Any, says: str, status: int) -> None:
    monkeypatch.setattr(following, "UNREACHABLE_S", -1.0)
    with pytest.raises(Failed, match=says) as found:
        followed(monkeypatch, [answer], JOB)
    assert found.value.status == status
