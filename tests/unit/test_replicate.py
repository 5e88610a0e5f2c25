"""Replicate's dialect through its unmodified client: a real API on loopback over fakeredis, and the fake worker."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import replicate
from pydantic import SecretStr
from replicate.exceptions import ModelError, ReplicateError
from replicate.prediction import Prediction
from replicate.webhook import InvalidSignatureError, Webhooks, WebhookSigningSecret
from support.live_api import Live, live_api, new_key
from support.receiver import Receiver

from latentline import Settings, records
from latentline.api.dialects.replicate.names import find
from latentline.images import Images
from latentline.jobs import JobError, JobWarning
from latentline.predictions import full_name, version_of
from latentline.testing import TINY_PNG
from latentline_worker.callbacks.deliverer import Deliverer
from latentline_worker.callbacks.message import Links

MODEL = "latentline/latentline-emoji"
SECRET = "whsec_" + "A" * 32
SETTINGS = Settings(
    model_aliases="sdxl=latentline-emoji", callback_allow="127.0.0.1/32", callback_ports="1-65535", callback_secret=SecretStr(SECRET)
)


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Iterator[Live]:
    with live_api(monkeypatch, SETTINGS) as live:
        yield live


@pytest.fixture
def client(live: Live) -> Iterator[replicate.Client]:
    made = replicate.Client(api_token="none", base_url=str(live.http.base_url).rstrip("/") + "/replicate")
    made.poll_interval = 0.02
    yield made
    made._client.close()


@pytest.fixture
def working(live: Live) -> Iterator[None]:
    """The fake worker runs whatever waits."""
    end = threading.Event()

    def work() -> None:
        while not end.wait(0.01):
            live.worker.run_all()

    thread = threading.Thread(target=work)
    thread.start()
    yield
    end.set()
    thread.join()


@pytest.mark.parametrize("ref", [MODEL, f"{MODEL}:{version_of('latentline-emoji')}", "latentline/sdxl"])
def test_run_gives_files(client: replicate.Client, working: None, ref: str) -> None:
    output = client.run(ref, input={"prompt": "a cat", "num_outputs": 2, "scheduler": "K_EULER", "seed": 3})
    assert [one.read() for one in output] == [TINY_PNG] * 2


def test_a_wait_that_runs_out_is_answered_starting_and_run_polls_on(client: replicate.Client, live: Live) -> None:
    made = client.models.predictions.create(model=MODEL, input={"prompt": "a cat", "num_inference_steps": 4}, wait=1)
    assert made.status == "starting" and made.output is None
    claim = live.worker.records.claim(live.worker.take() or "", "fake", 30)
    assert claim is not None
    assert client.predictions.get(made.id).status == "processing"
    live.worker.finish(claim)
    made.wait()
    assert made.status == "succeeded" and made.output and made.metrics and made.progress and made.progress.current == 4
    assert made.logs and made.logs.startswith("Using seed: ")
    assert live.http.get(f"/v1/jobs/{made.id}").json()["status"] == "succeeded"


def test_logs_say_what_the_worker_warns_of(client: replicate.Client, live: Live) -> None:
    made = client.predictions.create(version=MODEL, input={"prompt": "a cat"})
    claim = live.worker.records.claim(live.worker.take() or "", "fake", 30)
    assert claim is not None
    warning = JobWarning(code="prompt_truncated", field="prompt", message="prompt has more tokens than are read")
    live.worker.records.warn(made.id, claim.token, [warning])
    live.worker.finish(claim)
    made.reload()
    assert made.logs and warning.message in made.logs.splitlines() and made.progress


def test_create_list_cancel(client: replicate.Client, live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    made = client.predictions.create(version=version_of("latentline-emoji"), input={"prompt": "a cat", "output_format": "jpg"})
    assert (made.status, made.model, made.version) == ("starting", MODEL, version_of("latentline-emoji"))
    native = live.submit(prompt="made elsewhere")
    page = client.predictions.list()
    assert [one.id for one in page.results] == [native["id"], made.id] and page.next is None
    assert page.results[1].input and page.results[1].input["output_format"] == "jpeg"
    made.cancel()
    assert made.status == "canceled" and client.predictions.get(made.id).completed_at
    monkeypatch.setattr("latentline.api.dialects.replicate.routes.PAGE_SIZE", 3)
    for _ in range(3):
        live.submit()
    first = client.predictions.list()
    assert len(first.results) == 3 and first.next
    assert [one.id for one in client.predictions.list(first.next).results][-2:] == [native["id"], made.id]


def test_stream(client: replicate.Client, working: None) -> None:
    events = list(client.stream(MODEL, input={"prompt": "a cat", "num_inference_steps": 3, "go_fast": True}))
    kinds = [event.event.value for event in events]
    assert kinds[0] == "logs" and kinds[-2:] == ["output", "done"] and kinds.count("logs") == 5
    assert "go_fast was ignored: num_inference_steps decides" in events[0].data
    assert "| 3/3" in events[-3].data and "done" not in kinds[:-1]
    assert events[-2].data.read() == TINY_PNG  # type: ignore[attr-defined]


def test_through_https_outputs_are_urls_of_the_api(live: Live, working: None) -> None:
    """Behind a proxy that ends TLS. The key that a client sends along stays with the API."""
    headers = {"X-Forwarded-Proto": "https", "Prefer": "wait"}
    made = live.http.post("/replicate/v1/predictions", json={"version": MODEL, "input": {"prompt": "a cat"}}, headers=headers).json()
    base = str(live.http.base_url).rstrip("/").replace("http:", "https:")
    assert made["output"] == [f"{base}/v1/jobs/{made['id']}/images/0"] and made["urls"]["get"].startswith(f"{base}/replicate/v1/")
    assert live.http.get(made["output"][0].replace("https:", "http:")).content == TINY_PNG


def test_a_failed_prediction(client: replicate.Client, live: Live, working: None) -> None:
    live.worker.fail_with = JobError(code="out_of_memory", message="needs 9 GB")
    with pytest.raises(ModelError, match="out_of_memory: needs 9 GB"):
        client.run(MODEL, input={"prompt": "a cat"})
    with pytest.raises(RuntimeError, match="out_of_memory"):
        list(client.stream(MODEL, input={"prompt": "a cat"}))


def test_models_and_versions(client: replicate.Client) -> None:
    assert [one.id for one in client.models.list().results] == [MODEL, "latentline/sdxl"]
    model = client.models.get(MODEL)
    assert model.latest_version and model.versions.list().results[0].id == model.latest_version.id == version_of("latentline-emoji")
    assert "prompt" in model.latest_version.openapi_schema["components"]["schemas"]["Input"]["properties"]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no prompt": ({"input": {}}, "input.prompt"),
    "unknown input": ({"input": {"prompt": "x", "steps": 3}}, "input.steps"),
    "a size": ({"input": {"prompt": "x", "width": 1024, "height": 1024}}, "input.width"),
    "a scheduler": ({"input": {"prompt": "x", "scheduler": "K_LMS"}}, "input.scheduler"),
    "a webhook": ({"input": {"prompt": "x"}, "webhook": "ftp://x"}, "webhook"),
    "an event": (
        {"input": {"prompt": "x"}, "webhook": "http://127.0.0.1:8080/", "webhook_events_filter": ["end"]},
        "webhook_events_filter",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_names_the_field_in_this_dialects_words(client: replicate.Client, live: Live, name: str) -> None:
    body, field = BAD[name]
    answer = live.http.post("/replicate/v1/predictions", json=body | {"version": MODEL})
    assert answer.status_code == 422 and answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["invalid_fields"][0]["field"] == field and problem["detail"].startswith(f"{field}: ")
    assert "num_images" not in answer.text and "tenant" not in answer.text and problem["title"] == "Input validation failed"


def test_unknown_models_versions_predictions(client: replicate.Client) -> None:
    with pytest.raises(ReplicateError, match="version: got 'stability-ai/sdxl'; allowed: one of: latentline/latentline-emoji") as found:
        client.run("stability-ai/sdxl", input={"prompt": "x"})
    assert found.value.status == 404 and found.value.title == "Not Found"
    with pytest.raises(ReplicateError, match="version: got"):
        client.predictions.create(version="0" * 64, input={"prompt": "x"})
    with pytest.raises(ReplicateError, match="no job"):
        client.predictions.get("0" * 32)
    with pytest.raises(ReplicateError, match="Prefer"):
        client.predictions.create(version=MODEL, input={"prompt": "x"}, wait=61)


def test_webhooks_become_callbacks(client: replicate.Client, live: Live) -> None:
    url = "http://127.0.0.1:8080/hook"
    wanted = {
        None: {"job.running", "job.succeeded", "job.failed", "job.cancelled"},
        ("completed",): {"job.succeeded", "job.failed", "job.cancelled"},
        ("start",): {"job.running"},
    }
    for events, native in wanted.items():
        more = {} if events is None else {"webhook_events_filter": list(events)}
        made = client.predictions.create(version=MODEL, input={"prompt": "x"}, webhook=url, **more)  # type: ignore[arg-type]
        callback = live.http.get(f"/v1/jobs/{made.id}").json()["request"]["callback"]
        assert callback["url"] == url and set(callback["events"]) == native
    made = client.predictions.create(version=MODEL, input={"prompt": "x"}, webhook=url, webhook_events_filter=["logs"])
    assert live.http.get(f"/v1/jobs/{made.id}").json()["request"]["callback"] is None


def test_webhooks_are_predictions_and_valid_by_the_clients_own_validator(client: replicate.Client, live: Live) -> None:
    receiver = Receiver()
    made = client.predictions.create(version=MODEL, input={"prompt": "x", "num_outputs": 2, "go_fast": True}, webhook=receiver.url)
    live.worker.run_all()
    deliverer = Deliverer(live.worker.records, [SECRET], SETTINGS.callback_rule)
    for event in ("running_1", "succeeded"):
        deliverer.deliver(f"msg_{made.id}_{event}")
    receiver.close()
    begun, ended = (Prediction(**json.loads(body)) for _, body in receiver.requests)
    assert (begun.status, begun.output, begun.completed_at) == ("processing", None, None)
    base = str(live.http.base_url).rstrip("/")
    assert ended.output == [f"{base}/v1/jobs/{made.id}/images/{i}" for i in range(2)], "without keys of the store to sign others"
    read = client.predictions.get(made.id)
    assert ended.dict(exclude={"output"}) == read.dict(exclude={"output"}) and ended.progress and ended.logs and "go_fast" in ended.logs
    secret = client.webhooks.default.secret()
    for headers, body in receiver.requests:
        Webhooks.validate(headers=headers, body=body.decode(), secret=secret, tolerance=300)
        with pytest.raises(InvalidSignatureError):
            Webhooks.validate(headers=headers, body=body.decode() + " ", secret=secret)


def test_with_keys_a_tenants_webhooks_are_valid_by_the_secret_that_the_operator_was_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Images, "sign", lambda _, key: f"https://store.example/{key}?signed")
    links = Links.of(Settings(s3_access_key_id="id", s3_secret_access_key=SecretStr("secret")))
    receiver = Receiver()
    with live_api(monkeypatch, SETTINGS.model_copy(update={"auth": "keys"})) as live:
        client = replicate.Client(api_token=new_key(live, tenant="shop"), base_url=str(live.http.base_url).rstrip("/") + "/replicate")
        with pytest.raises(ReplicateError, match="latentline secrets create shop") as refused:
            client.webhooks.default.secret()
        assert refused.value.status == 404 and SECRET not in str(refused.value)
        shown = records.run(live.worker.redis, records.create_secret("shop")).secret
        made = client.predictions.create(version=MODEL, input={"prompt": "x"}, webhook=receiver.url, webhook_events_filter=["completed"])
        live.worker.run_all()
        Deliverer(live.worker.records, [SECRET], SETTINGS.callback_rule, links=links).deliver(f"msg_{made.id}_succeeded")
        client._client.close()
    receiver.close()
    ((headers, body),) = receiver.requests
    assert Prediction(**json.loads(body)).output == [f"https://store.example/shop/{made.id}/1/0.png?signed"], "no key is needed"
    Webhooks.validate(headers=headers, body=body.decode(), secret=WebhookSigningSecret(key=shown), tolerance=300)
    with pytest.raises(InvalidSignatureError):
        Webhooks.validate(headers=headers, body=body.decode(), secret=WebhookSigningSecret(key=SECRET))


def test_names() -> None:
    names = {full_name(model): model for model in ("emoji", "base/sdxl", "a/b/c")}
    assert list(names) == ["latentline/emoji", "base/sdxl", "a/b--c"]
    assert find("base/sdxl", names) == "base/sdxl" == find(version_of("base/sdxl"), names)
    assert find(f"a/b--c:{version_of('a/b/c')}", names) == "a/b/c"
    assert find("latentline/gone", names) == "gone" and find("x/y--z", names) == "x/y/z", "names that a model would have"
    for unknown in ("a/b--c:0", "0" * 64):
        assert find(unknown, names) not in names.values()
