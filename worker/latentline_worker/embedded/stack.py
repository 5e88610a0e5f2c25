"""Broker, object store, API and worker on this machine, as one thing that starts and stops."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Self

import httpx

from latentline.connection import connect
from latentline.errors import ConfigurationError
from latentline.routing import workers_key
from latentline.settings import Settings

from .broker import Broker
from .process import Child, clean_env
from .store import Store

READY_TIMEOUT_S = 180.0  # a cold start imports torch and loads a model
DRAIN_S = 5.0  # how long jobs that upload at the end may take
# With LATENTLINE_METRICS_PORT: what is added to it for each part. The worker comes last, since GPU n takes its port + n.
METRICS_OFFSETS = {"API": 0, "deliverer": 1, "worker": 2}

Tell = Callable[[str, str, float | None], None]
"""What is told while a stack starts: the part, what it does now, and the seconds that it took once it is done."""


class Stack:
    """All of latentline on embedded services. Stopped in data-flow order: worker, API, store, broker.

    Args:
        data_dir: where broker and store keep their data, credentials and logs; kept between runs.
        port: of the API on 127.0.0.1; 0 for any free one.
        model: what the worker serves; None for the bundled model.
        tell: is called as the parts start.

    Raises:
        ConfigurationError: on entry, when a part does not start; the message ends with its log's last lines.
    """

    def __init__(self, data_dir: Path, port: int = 0, model: str | None = None, tell: Tell = lambda *_: None) -> None:
        self._folder = data_dir.resolve()
        self._port = port
        self._model = model
        self._tell = tell
        self._lock: IO[str] | None = None
        self._socket: socket.socket | None = None
        self._broker: Broker | None = None
        self._store: Store | None = None
        self._api: Child | None = None
        self._worker: Child | None = None
        self._callbacks: Child | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def environment(self) -> dict[str, str]:
        """The LATENTLINE variables of every process that uses this stack."""
        if self._broker is None or self._store is None:
            raise ConfigurationError("the stack is not started")
        return {"LATENTLINE_REDIS_URL": self._broker.url, **self._store.environment}

    @property
    def metrics(self) -> dict[str, str]:
        """Where each part serves its metrics; empty without ``LATENTLINE_METRICS_PORT``."""
        wanted = Settings()
        if not wanted.metrics_port:
            return {}
        return {part: f"http://{wanted.metrics_host}:{wanted.metrics_port + offset}/metrics" for part, offset in METRICS_OFFSETS.items()}

    @property
    def settings(self) -> Settings:
        return Settings.from_variables(self.environment)

    def start(self) -> None:
        try:
            self._take_folder()
            self._take_port()
            keys = self._credentials()
            self._broker = Broker(self._folder / "broker", keys["password"])
            reader = keys["reader_key"], keys["reader_secret"]
            self._store = Store(self._folder / "store", keys["access_key"], keys["secret_key"], reader=reader)
            with self._starting("broker", "starts"):
                self._broker.start()
                with contextlib.closing(connect(self._broker.url)) as client:
                    client.delete(workers_key())  # a worker announced in the last run would make this one ready too early
            with self._starting("object store", "starts"):
                self._store.start()
            secret = keys["callback_secret"]
            worker = [sys.executable, "-m", "latentline_worker.generate.launch", *(["--model", self._model] if self._model else [])]
            self._worker = Child("the worker", worker, self._folder / "worker.log", self._process_environment("worker", secret))
            assert self._socket is not None  # _take_port made it
            fd = self._socket.fileno()
            command = [sys.executable, "-m", "latentline.cli", "callbacks", "serve"]
            env = self._process_environment("deliverer", secret) | self._store.reader_environment
            self._callbacks = Child("the callback deliverer", command, self._folder / "callbacks.log", env)
            api = [sys.executable, "-m", "latentline.cli", "api", "--fd", str(fd)]
            env = self._process_environment("API", secret)
            self._api = Child("the API", api, self._folder / "api.log", env, pass_fds=[fd])
            with self._starting("API", f"starts on {self.url}"):
                self._api.wait_until(lambda: self._answers("/healthz"), READY_TIMEOUT_S)
            model = self._model or env.get("LATENTLINE_MODELS") or env.get("LATENTLINE_MODEL") or "the bundled model"
            with self._starting("worker", f"loads {model}"):
                self._worker.wait_until(self._ready, READY_TIMEOUT_S)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End every process, in data-flow order; then the port and the folder are free."""
        if self._worker:
            self._worker.stop(DRAIN_S + 10)
        if self._callbacks:
            self._callbacks.stop()
        if self._api:
            self._api.stop()
        if self._socket:
            self._socket.close()
        if self._store:
            self._store.stop()
        if self._broker:
            self._broker.stop()
        if self._lock:
            self._lock.close()

    def dead(self) -> Child | None:
        """A part that has ended on its own, if any."""
        parts = (self._worker, self._callbacks, self._api, self._store and self._store.child, self._broker and self._broker.child)
        return next((part for part in parts if part and not part.alive), None)

    def _process_environment(self, part: str, callback_secret: str) -> dict[str, str]:
        """The whole environment of the worker, the API or the deliverer."""
        env = self.environment | {"LATENTLINE_CALLBACK_SECRET": callback_secret, "LATENTLINE_DRAIN_S": str(DRAIN_S)}
        env |= {"LATENTLINE_AUTH": "none"}  # on loopback alone
        if port := Settings().metrics_port:
            env |= {"LATENTLINE_METRICS_PORT": str(port + METRICS_OFFSETS[part])}
        # The operator's settings for callbacks, model and batching apply here too; addresses of services do not.
        given = {key: value for key, value in os.environ.items() if key.startswith("LATENTLINE_") and key not in env}
        return clean_env(**(given | env))

    @contextlib.contextmanager
    def _starting(self, part: str, does: str) -> Iterator[None]:
        started = time.monotonic()
        self._tell(part, does, None)
        yield
        self._tell(part, "ready", time.monotonic() - started)

    def _ready(self) -> bool:
        if self._api and not self._api.alive:
            raise ConfigurationError(f"the API ended with status {self._api.process.returncode}:\n{self._api.tail()}")
        return self._answers("/readyz")

    def _answers(self, path: str) -> bool:
        try:
            return httpx.get(f"{self.url}{path}", timeout=5, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    def _take_folder(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self._folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigurationError(f"--data-dir: {self._folder} is in use by another latentline up") from None

    def _take_port(self) -> None:
        # Bound here and handed to the API, so that no other process can take the port in between.
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind(("127.0.0.1", self._port))
            self._socket.listen()  # two sockets may be bound to one port until one of them listens
        except (OSError, OverflowError) as error:
            raise ConfigurationError(f"--port: {self._port} cannot be used: {error}") from None
        self._port = self._socket.getsockname()[1]

    def _credentials(self) -> dict[str, str]:
        path = self._folder / "credentials.json"
        from latentline.webhooks import generate_secret

        made = {
            "password": secrets.token_hex(16),
            "access_key": secrets.token_hex(10),
            "secret_key": secrets.token_hex(20),
            "reader_key": secrets.token_hex(10),
            "reader_secret": secrets.token_hex(20),
            "callback_secret": generate_secret(),
        }
        if path.exists():
            made |= json.loads(path.read_text())  # of an earlier run, which may not have known all of them
        path.touch(mode=0o600)
        path.write_text(json.dumps(made))
        return made

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
