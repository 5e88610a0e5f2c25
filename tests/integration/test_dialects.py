"""What holds in every dialect: one suite of behaviours, asked of each in its own words. A real broker, a worker that a test plays."""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
import redis
from support import dialects
from support.dialects import A1111, NATIVE_WORDS, Ask, OpenAI, Speaker
from support.jobs import PATIENCE_S, until
from support.live_api import serving
from support.mcp_dialect import MCP
from support.proxy import Proxy

from latentline import AsyncClient, Settings, records, routing
from latentline.api.app import create_app
from latentline.api.dialects import common
from latentline.api.leavers import Leavers
from latentline.connection import connect
from latentline.jobs import MAX_BODY_BYTES, MAX_IMAGES, MAX_PROMPT_CHARS, Claim, JobError, JobRecord, JobWarning, Phase, Status
from latentline.keys import NewKey
from latentline.mcp.server import create_server
from latentline.records import Beat
from latentline.testing import MODEL, TINY_PNG, FakeImages, FakeWorker

OVER_MCP = MCP()
SPEAKERS = (*dialects.SPEAKERS, OVER_MCP)
WAITING = [speaker for speaker in SPEAKERS if speaker.waits]
by_name: dict[str, Any] = {"ids": lambda speaker: speaker.name}


@dataclass
class Bench:
    """An API with keys, and a worker whose every move the test makes."""

    http: httpx.Client
    redis: redis.Redis
    proxy: Proxy
    images: FakeImages
    worker: FakeWorker
    pool: ThreadPoolExecutor
    key: str = ""
    tenant: str = ""
    made: list[Future[httpx.Response]] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)

    def new_key(self, tenant: str, *scopes: str, **limits: int) -> str:
        new = NewKey.parse(tenant=tenant, scopes=scopes or ("submit", "read"), limits=limits)
        return records.run(self.redis, records.create_key(new))[0]

    def post(self, speaker: Speaker, ask: Ask | None = None, key: str | None = None, **more: Any) -> httpx.Response:
        """An answer that comes at once: an error, or that of a dialect that does not wait.

        Args:
            more: a body that is none, as httpx takes it; without, that of what is asked for.
        """
        headers = speaker.headers(self.key if key is None else key)
        if more:
            return self.http.post(speaker.path, headers=headers | more.pop("headers", {}), **more)
        return speaker.send(self.http, headers, speaker.body(ask or Ask()))

    def start(self, speaker: Speaker, ask: Ask | None = None) -> tuple[str, Future[httpx.Response]]:
        """A job of this test's tenant, and the answer to whoever asked for it."""
        before = {record.id for record in self.jobs()}
        answer = self.pool.submit(self.post, speaker, ask)
        self.made.append(answer)

        def found() -> str | None:
            if answer.done() and speaker.refused(answer.result()):
                raise AssertionError(answer.result().text)
            return next((record.id for record in self.jobs() if record.id not in before), None)

        return until(found), answer

    def jobs(self) -> list[JobRecord]:
        return records.run(self.redis, records.list_jobs(tenant=self.tenant))[0]

    def get(self, job_id: str) -> JobRecord:
        return records.run(self.redis, records.get(job_id))

    def claim(self, job_id: str, lease_s: float = 30) -> Claim:
        assert self.worker.take() == job_id
        claim = self.worker.records.claim(job_id, self.worker.name, lease_s)
        assert claim is not None
        self.claims.append(claim)
        return claim


@pytest.fixture(scope="module")
def running(valkey_url: str) -> Iterator[Bench]:
    broker, images = connect(valkey_url), FakeImages()
    broker.flushall()
    proxy = Proxy(broker.connection_pool.connection_kwargs["port"])
    worker = FakeWorker(broker, images)
    settings = Settings(
        auth="keys", redis_url=valkey_url.replace(str(proxy.target), str(proxy.port)), model_aliases="dall-e-9=latentline-emoji"
    )  # type: ignore[arg-type]
    client = AsyncClient(settings)
    client.images = images  # type: ignore[assignment]
    with ExitStack() as stack:
        http, _ = stack.enter_context(serving(create_app(client=client)))
        tools = create_server(str(http.base_url), None, wait_s=PATIENCE_S, max_bytes=400_000)
        over_mcp, _ = stack.enter_context(serving(tools.streamable_http_app()))  # type: ignore[arg-type]
        OVER_MCP.at = str(over_mcp.base_url.join("/mcp"))
        pool = stack.enter_context(ThreadPoolExecutor(8))
        yield Bench(http, broker, proxy, images, worker, pool)
    proxy.close()
    broker.close()


@pytest.fixture
def bench(running: Bench) -> Iterator[Bench]:
    running.worker.announce()
    running.tenant = f"tenant-{uuid.uuid4().hex[:8]}"
    running.key = running.new_key(running.tenant)
    yield running
    running.images.down, running.worker.fail_with = False, None
    running.proxy.accept()
    running.proxy.filter = lambda onward, data: (data, False)
    for record in running.jobs():
        if not record.status.terminal:
            records.run(running.redis, records.cancel(record.id, 600))
    for claim in running.claims:
        if not running.get(claim.record.id).status.terminal:
            running.worker.finish(claim)
    while running.worker.take():
        pass
    for answer in running.made:
        answer.exception(PATIENCE_S)
    running.made.clear()
    running.claims.clear()


def problem(speaker: Speaker, answer: httpx.Response, status: int, code: str, word: str | None = None) -> None:
    """An error: its native code, the dialect's status and shape, and the field in the dialect's own word."""
    shown = "model_not_found" if word == "model" else code
    assert (speaker.code(answer), answer.status_code) == (code, speaker.status(shown, status)), answer.text
    assert speaker.blamed(answer) == (word and speaker.field_of(word))
    if speaker.name != "native":
        assert not [one for one in NATIVE_WORDS if one in answer.text and one not in speaker.words]


def by(*speakers: Speaker) -> Callable[[Any], Any]:
    """Run a test by these dialects, without those that cannot have what it is about."""

    def mark(test: Any) -> Any:
        return pytest.mark.parametrize("speaker", [one for one in speakers if test.__name__ not in one.lacks], **by_name)(test)

    return mark


every = by(*SPEAKERS)


def test_what_a_dialect_lacks_is_something_that_the_suite_asks_for() -> None:
    assert all(lacking in globals() and why for speaker in SPEAKERS for lacking, why in speaker.lacks.items())


@every
def test_accepted_run_and_answered_with_pictures(bench: Bench, speaker: Speaker) -> None:
    job_id, answer = bench.start(speaker, Ask("a tent", steps=3, count=2, size=(96, 64), model="latentline-emoji", sampler="euler", seed=5))
    request = bench.get(job_id).request
    assert (request.prompt, request.num_inference_steps, request.num_images, request.seed) == ("a tent", 3, 2, 5)
    assert (request.width, request.height, request.scheduler, request.tenant) == (96, 64, "euler", bench.tenant)
    bench.worker.run_all()
    done = answer.result(PATIENCE_S)
    assert speaker.job_id(done) == job_id and speaker.pictures(bench.http, done, speaker.headers(bench.key)) == [TINY_PNG] * 2


@every
def test_what_a_request_leaves_out_is_the_models_own(bench: Bench, speaker: Speaker) -> None:
    job_id, _ = bench.start(speaker, Ask("a tent", steps=None))
    request = bench.get(job_id).request
    assert (request.width, request.height, request.num_inference_steps, request.num_images) == (64, 64, 20, 1)
    assert (request.model, request.scheduler, request.guidance_scale) == (MODEL.id, "dpmpp_2m", 5.0)


@every
def test_progress(bench: Bench, speaker: Speaker) -> None:
    job_id, _ = bench.start(speaker, Ask(steps=4))
    claim = bench.claim(job_id)
    seen = []
    for step in (1, 3):
        bench.worker.progress(claim, Phase.DENOISING, step)
        seen.append(speaker.progress(bench.http, job_id, speaker.headers(bench.key)))
    bench.worker.finish(claim)
    assert seen == [0.25, 0.75]


@every
def test_cancelled_while_it_runs(bench: Bench, speaker: Speaker) -> None:
    job_id, answer = bench.start(speaker, Ask(steps=4))
    claim = bench.claim(job_id)
    bench.worker.progress(claim, Phase.DENOISING, 1)
    canceller = speaker if speaker.name != "openai" else Speaker()  # OpenAI has no word for it
    canceller.cancel(bench.http, job_id, canceller.headers(bench.key))
    bench.worker.finish(claim)
    assert bench.get(job_id).status is Status.CANCELLED
    if speaker.waits:
        assert speaker.ended(answer.result(PATIENCE_S)) == "cancelled"


@every
def test_a_job_that_fails(bench: Bench, speaker: Speaker) -> None:
    bench.worker.fail_with = JobError(code="out_of_memory", message="it takes 3 bytes more than there are")
    job_id, answer = bench.start(speaker)
    bench.worker.run_all()
    done = answer.result(PATIENCE_S)
    if speaker.waits:
        assert speaker.ended(done) == "failed" and job_id in done.text and "out_of_memory: it takes 3 bytes" in done.text
        assert speaker.code(done) == "job_failed"


@every
def test_a_worker_that_is_lost_in_the_middle(bench: Bench, speaker: Speaker) -> None:
    job_id, answer = bench.start(speaker, Ask(steps=4))
    claim = bench.claim(job_id, lease_s=0.01)
    bench.worker.records.beat([Beat(job_id, claim.token, Phase.DENOISING, 2, 0)])
    until(lambda: job_id in bench.worker.records.reclaim())
    bench.worker.run_all()
    done = answer.result(PATIENCE_S)
    assert speaker.pictures(bench.http, done, speaker.headers(bench.key)) == [TINY_PNG] and bench.get(job_id).attempt == 2


@every
def test_what_the_worker_warns_of(bench: Bench, speaker: Speaker) -> None:
    job_id, answer = bench.start(speaker)
    claim = bench.claim(job_id)
    warning = JobWarning(code="prompt_truncated", field="prompt", message="prompt has more tokens than are read")
    assert bench.worker.records.warn(job_id, claim.token, [warning])
    bench.worker.finish(claim)
    done = answer.result(PATIENCE_S)
    job = bench.http.get(f"/v1/jobs/{job_id}", headers=Speaker().headers(bench.key)) if not speaker.waits else done
    assert warning.message in job.text


BAD = {
    "a size that the model does not make": (Ask(size=(68, 64)), "size"),
    "a size that is too large": (Ask(size=(1024, 1024)), "size"),
    "an unknown model": (Ask(model="midjourney"), "model"),
    "an empty prompt": (Ask(prompt=""), "prompt"),
    "a blank prompt": (Ask(prompt=" \n"), "prompt"),
    "a prompt that is too long": (Ask(prompt="a" * (MAX_PROMPT_CHARS + 1)), "prompt"),
    "an unknown sampler": (Ask(sampler="restart"), "sampler"),
    "a negative seed": (Ask(seed=-2), "seed"),
    "a seed that is too large": (Ask(seed=2**32), "seed"),
    "a last seed that is too large": (Ask(seed=2**32 - 1, count=2), "seed"),
    "too many pictures": (Ask(count=MAX_IMAGES + 1), "count"),
    "no picture": (Ask(count=0), "count"),
    "too many steps": (Ask(steps=151), "steps"),
}


@every
@pytest.mark.parametrize("name", BAD)
def test_refused(bench: Bench, speaker: Speaker, name: str) -> None:
    ask, word = BAD[name]
    problem(speaker, bench.post(speaker, ask), 422, "invalid_request", word)
    assert bench.jobs() == []


@every
def test_bodies_that_are_none(bench: Bench, speaker: Speaker) -> None:
    problem(speaker, bench.post(speaker, content=b"{", headers={"content-type": "application/json"}), 422, "invalid_request", "body")
    problem(speaker, bench.post(speaker, content=b"[]", headers={"content-type": "application/json"}), 422, "invalid_request", "body")
    problem(speaker, bench.post(speaker, data={"prompt": "a cat"}), 415, "unsupported_media_type")
    problem(speaker, bench.post(speaker, Ask(prompt="a" * MAX_BODY_BYTES)), 413, "body_too_large")


@every
def test_keys(bench: Bench, speaker: Speaker) -> None:
    problem(speaker, speaker.send(bench.http, {}, speaker.body(Ask())), 401, "not_authenticated")
    problem(speaker, bench.post(speaker, key="not a key"), 401, "not_authenticated")
    problem(speaker, bench.post(speaker, key=f"ll_{'0' * 12}_{'A' * 43}"), 401, "not_authenticated")
    problem(speaker, bench.post(speaker, key=bench.new_key(bench.tenant, "read")), 403, "not_allowed")
    assert bench.jobs() == []


@every
def test_too_much_queued_and_too_many_submissions(bench: Bench, speaker: Speaker) -> None:
    bench.key = bench.new_key(bench.tenant, max_jobs=1)
    bench.start(speaker)
    full = bench.post(speaker)
    problem(speaker, full, 429, "tenant_quota_exceeded")
    assert speaker.retry_after_s(full) > 0
    key = bench.new_key(f"{bench.tenant}-2", rate=1)
    first = bench.pool.submit(bench.post, speaker, None, key)
    until(lambda: bench.redis.zcard(routing.tenant_index_key(f"{bench.tenant}-2")))
    problem(speaker, bench.post(speaker, key=key), 429, "rate_exceeded")
    bench.worker.run_all()
    assert not speaker.refused(first.result(PATIENCE_S))


@every
def test_the_broker_is_away(bench: Bench, speaker: Speaker) -> None:
    bench.proxy.refuse()
    problem(speaker, bench.post(speaker), 503, "broker_unavailable")
    bench.proxy.accept()
    bench.start(speaker)


@every
def test_the_store_is_away(bench: Bench, speaker: Speaker) -> None:
    bench.images.down = True
    problem(speaker, bench.post(speaker), 503, "store_unavailable")


@every
def test_no_worker_is_there(bench: Bench, speaker: Speaker) -> None:
    bench.redis.hset(routing.models_key(), "gone", MODEL.model_copy(update={"id": "gone"}).first_fields())
    answer = bench.post(speaker, Ask(model="gone"))
    problem(speaker, answer, 503, "no_worker")
    assert speaker.retry_after_s(answer) > 0


@every
def test_paths_and_methods_that_are_none(bench: Bench, speaker: Speaker) -> None:
    headers = speaker.headers(bench.key)
    problem(speaker, bench.http.get(f"{speaker.path}/there/is/none", headers=headers), 404, "not_found")
    problem(speaker, bench.http.get(f"{speaker.path}/there/is%0A/none", headers=headers), 404, "not_found")
    answer = bench.http.put(speaker.path, headers=headers)
    problem(speaker, answer, 405, "method_not_allowed")
    options = bench.http.options(speaker.path, headers=headers)
    assert options.status_code == 204 and options.headers["allow"] == answer.headers["allow"] and "POST" in answer.headers["allow"]


@every
def test_an_alias_that_the_operator_has_set(bench: Bench, speaker: Speaker) -> None:
    if speaker.name in ("native", "mcp"):
        problem(speaker, bench.post(speaker, Ask(model="dall-e-9")), 422, "invalid_request", "model")
        return
    job_id, _ = bench.start(speaker, Ask(model="dall-e-9"))
    assert bench.get(job_id).request.model == MODEL.id
    assert "dall-e-9" in bench.post(speaker, Ask(model="dall-e-8")).text, "a name that is none is answered with those that are"


@every
@pytest.mark.parametrize("maker", SPEAKERS, **by_name)
def test_a_job_of_one_dialect_is_seen_in_the_others_and_by_its_tenant_alone(bench: Bench, speaker: Speaker, maker: Speaker) -> None:
    job_id, _ = bench.start(maker, Ask(steps=4))
    claim = bench.claim(job_id)
    bench.worker.progress(claim, Phase.DENOISING, 1)
    if not speaker.shows_running:
        bench.worker.finish(claim)
    assert speaker.sees(bench.http, job_id, speaker.headers(bench.key))
    assert not speaker.sees(bench.http, job_id, speaker.headers(bench.new_key("another-tenant")))
    assert speaker.sees(bench.http, job_id, speaker.headers(bench.new_key("an-admin", "admin")))


@every
def test_a_failure_of_the_server_is_told_without_its_text(bench: Bench, speaker: Speaker, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("a secret")

    monkeypatch.setattr("latentline.api.service.JobService._own", broken)
    answer = bench.post(speaker)
    problem(speaker, answer, 500, "internal_error")
    assert "secret" not in answer.text
    if speaker.name != "mcp":  # whose answer is a tool's
        assert answer.headers["connection"] == "close"


# What only dialects that wait for a job have.


@by(*WAITING)
def test_the_limit_of_waiting(bench: Bench, speaker: Speaker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "WAIT_LIMIT_S", 0.05)
    job_id, answer = bench.start(speaker)
    late = answer.result(PATIENCE_S)
    problem(speaker, late, 504, "wait_timeout")
    assert job_id in late.text and bench.get(job_id).status is Status.QUEUED, "the job goes on"
    if speaker.name == "openai":
        assert (late.headers["x-should-retry"], late.headers["x-request-id"]) == ("false", job_id)


def sent(bench: Bench, count: int, prompt: str = "a cat", http: httpx.Client | None = None) -> httpx.Response:
    headers = OpenAI().headers(bench.key) | {"x-stainless-retry-count": str(count)}
    return (http or bench.http).post(OpenAI.path, headers=headers, json={"prompt": prompt, "steps": 2}, timeout=PATIENCE_S)


def give_up(bench: Bench, speaker: Speaker) -> str:
    """A request whose client closes its connection while the job waits; the job's id."""
    (port,) = [bench.http.base_url.port]
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as impatient, pytest.raises(httpx.ReadTimeout):
        impatient.post(speaker.path, headers=speaker.headers(bench.key), json=speaker.body(Ask()), timeout=0.3)
    return until(lambda: next((record.id for record in bench.jobs()), None))  # type: ignore[no-any-return]


def test_openai_a_client_that_does_not_come_back_is_cancelled_for_after_the_grace(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Leavers, "grace_s", 0.05)
    job_id = give_up(bench, OpenAI())
    until(lambda: bench.get(job_id).status is Status.CANCELLED)
    again = bench.pool.submit(sent, bench, 1)
    until(lambda: len(bench.jobs()) == 2)  # what was given up goes to nobody
    bench.worker.run_all()
    assert again.result(PATIENCE_S).json()["id"] != job_id


def test_openai_a_client_that_comes_back_is_not(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Leavers, "grace_s", 0.5)
    job_id = give_up(bench, OpenAI())
    again = bench.pool.submit(sent, bench, 1)
    until(lambda: bench.redis.hget(routing.job_key(job_id), "sending") == "1")
    time.sleep(0.7)
    bench.worker.run_all()
    assert again.result(PATIENCE_S).json()["id"] == job_id and len(bench.jobs()) == 1


def test_a1111_a_client_that_goes_away_cancels_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Leavers, "grace_s", 0.0)
    job_id = give_up(bench, A1111())
    (done,) = bench.worker.run_all()
    assert (done.id, done.status) == (job_id, Status.SUCCEEDED)


def test_openai_a_request_that_is_sent_again_to_another_process_gets_its_job(bench: Bench) -> None:
    bench.key = bench.new_key(bench.tenant, rate=1)  # what is sent again is not counted
    job_id = give_up(bench, OpenAI())
    bench.worker.run_all()
    client = AsyncClient(Settings(auth="keys", redis_url=f"redis://127.0.0.1:{bench.proxy.target}/0"))  # type: ignore[arg-type]
    client.images = bench.images  # type: ignore[assignment]
    with serving(create_app(client=client)) as (another, _):
        assert sent(bench, 1, http=another).json()["id"] == job_id
        assert sent(bench, 2, http=another).json()["id"] == job_id
        assert sent(bench, 0, "a cat", http=another).status_code == 429, "without the mark it is another request"
    assert len(bench.jobs()) == 1 and hashlib.sha256(TINY_PNG).hexdigest() == bench.get(job_id).images[0].sha256


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({}, "prompt", "missing_required_parameter"),
    ({"width": 64}, "width", "unknown_parameter"),
    ({"prompt": ""}, "prompt", "string_below_min_length"),
    ({"prompt": "a" * (MAX_PROMPT_CHARS + 1)}, "prompt", "string_above_max_length"),
    ({"n": 0}, "n", "integer_below_min_value"),
    ({"n": MAX_IMAGES + 1}, "n", "integer_above_max_value"),
    ({"n": "two"}, "n", "invalid_type"),
    ({"prompt": 7}, "prompt", "invalid_type"),
    ({"stream": 1}, "stream", "invalid_value"),
    ({"guidance": -1.0}, "guidance", "decimal_below_min_value"),
    ({"guidance": 31.0}, "guidance", "decimal_above_max_value"),
    ({"size": "large"}, "size", "invalid_value"),
    ({"output_format": "gif"}, "output_format", "invalid_value"),
    ({"model": "x"}, "model", "model_not_found"),
    ({"partial_images": 4}, "partial_images", "integer_above_max_value"),
    ({"loras": [{"name": "x"}]}, "loras", "invalid_value"),
]


@pytest.mark.parametrize(("body", "param", "code"), WRONG)
def test_openai_the_words_of_its_errors(bench: Bench, body: dict[str, Any], param: str, code: str) -> None:
    answer = bench.post(OpenAI(), json={"prompt": "a cat", **body} if body else {})
    error = answer.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)
    assert error["message"].startswith(f"{param}: got ") and answer.status_code == (404 if code == "model_not_found" else 400)


def test_openai_what_a_request_and_its_sending_again_ask_of_the_broker(bench: Bench) -> None:
    """Scripts that the API calls: submit, three looks at the job, and a note that the answer went out; instead of submit, take."""
    calls: list[int] = []

    def count(onward: bool, data: bytes) -> tuple[bytes, bool]:
        calls.append(data.count(b"EVALSHA") if onward else 0)
        return data, False

    def all_noted() -> bool:
        return all(bench.redis.hget(routing.job_key(record.id), "answer") == "written" for record in bench.jobs())

    job_id, answer = bench.start(OpenAI())
    bench.worker.run_all()
    answer.result(PATIENCE_S)
    until(all_noted)
    bench.proxy.filter = count
    _, answer = bench.start(OpenAI())
    bench.worker.run_all()
    answer.result(PATIENCE_S)
    until(all_noted)
    assert 4 <= sum(calls) <= 5  # one look less where the job ends before the first
    calls.clear()
    assert sent(bench, 1).json()["id"] != job_id, "the newest"
    until(all_noted)
    assert 4 <= sum(calls) <= 6  # and the record of the job that it took


def test_openai_a_stream_tells_of_a_failure_and_is_given_up_too(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.worker.fail_with = JobError(code="out_of_memory", message="no room")
    _, answer = bench.start(OpenAI(), Ask(more={"stream": True}))
    bench.worker.run_all()
    assert '"code": "image_generation_failed"' in answer.result(PATIENCE_S).text
    monkeypatch.setattr(Leavers, "grace_s", 0.05)
    headers, body = OpenAI().headers(bench.key), {"prompt": "a dog", "stream": True}
    with bench.http.stream("POST", OpenAI.path, headers=headers, json=body) as stream:
        job_id = stream.headers["x-request-id"]
    until(lambda: bench.get(job_id).status is Status.CANCELLED)
