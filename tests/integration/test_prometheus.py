"""A real Prometheus scrapes a live stack: what the dashboard shows is there, and each alert fires once in its case.

The rules are those of ``deploy/`` with what a test cannot wait for made shorter: ``for`` is left out, and ``SHORTER`` changes thresholds
and windows. ``deploy/prometheus/alerts_test.yaml`` holds the rules as they are against series that are made up.
"""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest
import yaml
from support.cluster import THIS_CODE, Cluster, Code
from support.prometheus import Prometheus
from support.proxy import Proxy
from support.receiver import Receiver
from support.shipped import FOLDER, alert_expressions, dashboard_expressions
from support.tiny import tiny_pipeline

from latentline import records, routing
from latentline.jobs import JobRequest, ModelInfo, Phase
from latentline_worker.embedded.broker import Broker
from latentline_worker.embedded.process import Child, free_port
from latentline_worker.embedded.store import Store

# The fleet is looked at more often than each five seconds.
API = Code(THIS_CODE.root, "import latentline.api.metrics\nlatentline.api.metrics.LOOK_S = 0.5")
GHOST = "ghost"  # a model that no worker serves
SHORTER = {
    "LatentlineQueueOld": ("> 300", "> 3"),
    "LatentlineCallbacksLate": ("> 300", "> 3"),
    "LatentlineWorkerStuck": ("[5m]", "[5s]"),
    "LatentlineMemoryFull": ("> 0.97", "> 0"),
}
# Provoked by the tests below.
OF_JOBS = {
    "LatentlineNoWorker", "LatentlineQueueOld", "LatentlineJobsFailing", "LatentlineDeadLetters", "LatentlineFencedCommits",
    "LatentlineMemoryFull",
}  # fmt: skip
OF_AN_OUTAGE = {"LatentlineBrokerDown", "LatentlineApiErrors"}
OF_A_DELIVERER = {"LatentlineProcessDown", "LatentlineCallbacksLate"}
OF_A_WORKER = {"LatentlineWorkerStuck"}


def shorter() -> str:
    """The rules of ``deploy/`` that fire at once."""
    rules = yaml.safe_load((FOLDER / "alerts.yaml").read_text())
    for rule in rules["groups"][0]["rules"]:
        rule.pop("for", None)
        was, becomes = SHORTER.get(rule["alert"], ("", ""))
        assert was in rule["expr"]
        rule["expr"] = rule["expr"].replace(was, becomes) if was else rule["expr"]
    return yaml.safe_dump(rules)


@dataclass
class Scraped:
    """Two processes of the API, a worker of a tiny model and a deliverer, and the Prometheus that scrapes them."""

    cluster: Cluster
    prometheus: Prometheus
    ports: dict[str, int]
    apis: list[httpx.Client]
    between: Proxy
    """Between the API's processes and the broker."""
    deliverer: Child
    receiver: Receiver

    def fired(self, alerts: set[str]) -> None:
        """Each of these alerts fires, for one thing only."""
        for alert in sorted(alerts):
            self.prometheus.until(f'count(ALERTS{{alertname="{alert}", alertstate="firing"}}) == 1')

    def scrape(self, instance: str) -> str:
        answer = httpx.get(f"http://127.0.0.1:{self.ports[instance]}/metrics", timeout=30, trust_env=False)
        assert answer.status_code == 200
        return answer.text


@pytest.fixture(scope="module")
def live(real_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scraped]:
    folder = tmp_path_factory.mktemp("scraped")
    model = folder / "tiny"
    tiny_pipeline(vae_scale_factor=4).save_pretrained(model, safe_serialization=True)
    with contextlib.ExitStack() as opened:
        broker = opened.enter_context(Broker(folder / "broker", "secret"))
        cluster = opened.enter_context(contextlib.closing(Cluster(folder, broker, real_store, model)))
        ports = {name: free_port() for name in ("api-1", "api-2", "worker", "callbacks")}
        port = {name: str(number) for name, number in ports.items()}
        prometheus = opened.enter_context(contextlib.closing(Prometheus(folder, ports, shorter())))
        worker = cluster.start_worker(wait=False, LATENTLINE_METRICS_PORT=port["worker"])
        between = opened.enter_context(contextlib.closing(Proxy(broker.port)))
        url = broker.url.replace(f":{broker.port}/", f":{between.port}/")
        apis = [
            opened.enter_context(
                contextlib.closing(cluster.start_api(code=API, LATENTLINE_REDIS_URL=url, LATENTLINE_METRICS_PORT=port[name]))
            )
            for name in ("api-1", "api-2")
        ]
        deliverer = cluster.start_callbacks(LATENTLINE_METRICS_PORT=port["callbacks"])
        cluster.until_ready([worker])
        receiver = opened.enter_context(contextlib.closing(Receiver()))
        yield Scraped(cluster, prometheus, ports, apis, between, deliverer, receiver)


def test_each_alert_is_provoked_by_a_test_here() -> None:
    assert sorted([*OF_JOBS, *OF_AN_OUTAGE, *OF_A_DELIVERER, *OF_A_WORKER]) == sorted(alert_expressions())


def test_every_expression_of_the_dashboard_returns_a_series(live: Scraped) -> None:
    cluster = live.cluster
    for _ in range(2):  # a rate begins with the second sample of a series
        cluster.submit(3, num_inference_steps=60, callback={"url": live.receiver.url})
        cluster.submit(1, prompt="a cat [nan@700]", num_inference_steps=4)
        cluster.finish()
        for api in live.apis:
            api.get("/v1/jobs")
        live.prometheus.until('sum(latentline_job_errors_total) > 0 and sum(latentline_http_requests_total{route="/v1/jobs"}) > 0')
    for expression in dashboard_expressions():
        cluster.until(lambda expression=expression: any(not math.isnan(value) for _, value in live.prometheus.query(expression)))  # type: ignore[misc]


def test_what_is_told_of_the_fleet_is_not_doubled_by_a_second_process_of_the_api(live: Scraped) -> None:
    offer_ghost(live)
    requests = [JobRequest.parse({"prompt": "a cat", "num_inference_steps": 2, "model": GHOST})] * 3
    live.cluster.client.submit_many(requests)
    live.prometheus.until(f'count(latentline_queued_jobs{{model="{GHOST}"}} == 3) == 2')  # both have looked
    told = {labels["__name__"] for labels, _ in live.prometheus.query('{__name__=~"latentline_.+", instance="api-1"}')}
    of_fleet = {name for name in told if not name.startswith(("latentline_http_", "latentline_event_streams"))}
    assert len(of_fleet) >= 8
    word, seen, now = re.compile(r"\blatentline_\w+\b"), set(), time.time()
    for expression in [*dashboard_expressions(), *alert_expressions().values()]:
        if not (here := of_fleet & set(word.findall(expression))):
            continue
        seen |= here
        of_one = word.sub(lambda name: f'{name[0]}{{instance="api-1"}}', expression)
        both, one = (dict(_by_labels(live.prometheus.query(text, now))) for text in (expression, of_one))
        slack = 2.0 if "seconds" in expression else 0.0  # the two processes look at different moments
        assert both == pytest.approx(one, abs=slack), expression
    assert seen == of_fleet


def _by_labels(samples: list[tuple[dict[str, str], float]]) -> Iterator[tuple[str, float]]:
    for labels, value in samples:
        yield str(sorted((name, text) for name, text in labels.items() if name != "instance")), value


def offer_ghost(live: Scraped) -> None:
    """A model that was announced by a worker that has ended since."""
    ghost = ModelInfo(id=GHOST, family="sd", default_width=64, default_height=64, max_pixels=64 * 64)
    live.cluster.records.announce("has ended", [ghost])
    live.cluster.redis.zrem(routing.workers_key(), "has ended")


def test_alerts_of_jobs_fire_once(live: Scraped) -> None:
    """After the tests above: jobs of a model that nobody serves wait, and two jobs have failed."""
    cluster = live.cluster
    cluster.redis.lpush(routing.CALLBACK_QUEUE, "not a message")  # becomes a dead letter
    cluster.s3_proxy.delay_s = 1.0  # before each chunk, so that jobs are seen while they upload
    uploading = cluster.submit(5, num_inference_steps=1)
    for job in uploading:
        cluster.until(lambda job=job: cluster.get(job).phase is Phase.UPLOADING)  # type: ignore[misc]
        cluster.redis.hincrby(routing.job_key(job), "token", 1)  # as if another worker had claimed it
    cluster.s3_proxy.delay_s = 0.0
    cluster.submit(2, num_inference_steps=150)  # they hold memory for some seconds
    live.fired(OF_JOBS)


def test_alerts_of_a_broker_that_is_away_fire_once_and_scrapes_answer_with_what_is_known(live: Scraped) -> None:
    known = f'latentline_queued_jobs{{model="{GHOST}"}} 3.0'
    assert known in live.scrape("api-1")
    for break_it in (live.between.refuse, lambda: setattr(live.between, "mode", "hang")):
        break_it()
        live.between.reset()
        live.cluster.until(lambda: all("latentline_broker_up 0.0" in live.scrape(name) for name in ("api-1", "api-2")))
        assert known in live.scrape("api-1")
        if live.between.mode == "refuse":
            live.cluster.until(lambda: [api.get("/v1/jobs").status_code for api in live.apis] == [503, 503])
            live.prometheus.until('latentline_http_requests_total{status="503"}')
            for api in live.apis:  # a rate begins with the second sample
                api.get("/v1/jobs")
            live.fired(OF_AN_OUTAGE)
        live.between.accept()
        live.cluster.until(lambda: all("latentline_broker_up 1.0" in live.scrape(name) for name in ("api-1", "api-2")))


def test_alerts_of_a_deliverer_that_has_ended_fire_once(live: Scraped) -> None:
    live.deliverer.stop()
    (job,) = live.cluster.submit(1, num_inference_steps=1, callback={"url": live.receiver.url})
    live.cluster.finish([job])
    (callback,) = records.run(live.cluster.redis, records.callbacks(job))
    records.run(live.cluster.redis, records.replay_callback(callback["id"]))  # due at once, not after the deliverer's grace
    live.fired(OF_A_DELIVERER)


def test_the_alert_of_a_worker_that_hangs_fires_once(live: Scraped) -> None:
    live.cluster.submit(1, prompt="a cat [wedge@700]", num_inference_steps=10)
    live.fired(OF_A_WORKER)
