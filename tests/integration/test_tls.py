"""TLS connections to the broker: clients and Celery accept certificates of trusted authorities only."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from kombu.exceptions import OperationalError
from support.jobs import PATIENCE_S, celery_app, run_worker, submit
from support.tls import Authority, TlsFront

from latentline import records
from latentline.connection import connect
from latentline.errors import BrokerUnavailable
from latentline.jobs import Status
from latentline.routing import GENERATE_TASK, queue_names
from latentline.testing import MODEL, FakeImages, FakeWorker
from latentline_worker.embedded.broker import _binary
from latentline_worker.embedded.process import Child, clean_env, free_port


@contextlib.contextmanager
def tls_server(binary: str, authority: Authority, folder: Path) -> Iterator[int]:
    """A server that speaks TLS itself."""
    port = free_port()
    command = [binary, "--port", "0", "--tls-port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    command += ["--tls-cert-file", str(authority.certificate), "--tls-key-file", str(authority.key), "--tls-auth-clients", "no"]
    child = Child("the TLS broker", command, folder / "tls.log", clean_env())
    client = connect(f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={authority.ca}")

    def answers() -> bool:
        with contextlib.suppress(redis.ConnectionError):
            return bool(client.ping())
        return False

    try:
        child.wait_until(answers, PATIENCE_S)
        yield port
    finally:
        client.close()
        child.stop()


def tls_binary() -> str:
    """A server on this machine that was built with TLS. The embedded one is not."""
    refusals = {"Failed finding TLS support", "FATAL CONFIG FILE ERROR", "Missing implement of connection type tls"}
    for name in (str(_binary()), "valkey-server", "redis-server"):
        if found := shutil.which(name):
            command = [found, "--port", "0", "--tls-port", str(free_port()), "--save", ""]
            output = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S).stdout  # exits: no certificate
            if not any(refusal in output for refusal in refusals):
                return found
    pytest.skip("no server built with TLS is here: the embedded valkey-server has none, and PATH has no other")


@pytest.fixture(params=["in front of the embedded server", "of the server itself"])
def tls(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Authority]]:
    """``rediss://HOST:PORT/0`` and the authority behind it."""
    authority = Authority(tmp_path / "authority")
    if request.param == "of the server itself":
        with tls_server(tls_binary(), authority, tmp_path) as port:
            yield f"rediss://127.0.0.1:{port}/0", authority
        return
    plain = connect(request.getfixturevalue("valkey_url"))
    plain.flushall()
    front = TlsFront(plain.connection_pool.connection_kwargs["port"], authority)
    yield f"rediss://127.0.0.1:{front.port}/0", authority
    front.close()
    plain.close()


def test_jobs_go_through_tls_from_submission_to_the_worker_and_back(tls: tuple[str, Authority]) -> None:
    url, authority = tls
    url += f"?ssl_ca_certs={authority.ca}"
    with contextlib.closing(connect(url)) as client:
        fake = FakeWorker(client, FakeImages())
        done = threading.Event()

        def generate(job_id: str) -> None:
            fake.run(job_id)
            done.set()

        (job,) = submit(client)
        with celery_app(url, queue_names(MODEL.id)) as app:
            app.task(generate, name=GENERATE_TASK, shared=False)
            with run_worker(app):
                assert done.wait(PATIENCE_S)
        assert records.run(client, records.get(job)).status is Status.SUCCEEDED


def assert_refused(url: str, reason: str) -> None:
    """Clients raise a domain error with its cause, and Celery refuses as well."""
    with contextlib.closing(connect(url)) as client, pytest.raises(BrokerUnavailable, match="is not trusted") as refused:
        records.run(client, records.models())
    assert reason in str(refused.value.__cause__)
    with (
        celery_app(url, queue_names(MODEL.id)) as app,
        app.connection_for_read() as connection,
        pytest.raises(OperationalError, match=reason),
    ):
        connection.ensure_connection(max_retries=1, interval_start=0)


def test_a_certificate_of_another_authority_is_refused_with_the_reason(tls: tuple[str, Authority], tmp_path: Path) -> None:
    url = f"{tls[0]}?ssl_ca_certs={Authority(tmp_path / 'another').ca}"
    assert_refused(url, "certificate verify failed")


def test_a_certificate_for_another_name_is_refused(valkey_url: str, tmp_path: Path) -> None:
    authority = Authority(tmp_path / "authority", "elsewhere.example")
    front = TlsFront(int(valkey_url.rsplit(":", 1)[1].split("/")[0]), authority)
    try:
        url = f"rediss://127.0.0.1:{front.port}/0?ssl_ca_certs={authority.ca}"
        assert_refused(url, "IP address mismatch")
    finally:
        front.close()


def test_the_system_authorities_do_not_vouch_for_a_private_one(tls: tuple[str, Authority]) -> None:
    """Without ``ssl_ca_certs`` the certificate is checked against the system's authorities, not just accepted."""
    with contextlib.closing(connect(tls[0])) as client, pytest.raises(redis.ConnectionError, match="certificate verify failed"):
        client.ping()
