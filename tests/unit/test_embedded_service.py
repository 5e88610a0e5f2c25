"""An embedded service starts on ports that no other process took, and leaves no child behind."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from latentline.errors import ConfigurationError
from latentline_worker.embedded.process import Child, clean_env
from latentline_worker.embedded.service import START_TRIES, EmbeddedService


class Service(EmbeddedService):
    """Each of its children ends at once with one of the messages; one without a message answers."""

    START_TIMEOUT_S = 60.0
    PORT_TAKEN = ("already in use",)

    def __init__(self, folder: Path, *messages: str) -> None:
        super().__init__()
        self._folder, self._messages = folder, list(messages)
        self.children: list[Child] = []
        self.ports: list[int] = []

    def _launch(self) -> Child:
        self.port = self.port or 1000 + len(self.children)
        self.ports.append(self.port)
        message = self._messages.pop(0)
        code = f"raise SystemExit({message!r})" if message else "import time; time.sleep(600)"
        self.children.append(Child("the service", [sys.executable, "-c", code], self._folder / "log", clean_env()))
        self._answering = not message
        return self.children[-1]

    def _answers(self) -> bool:
        return self._answering


def test_a_port_that_another_process_took_is_replaced(tmp_path: Path) -> None:
    with Service(tmp_path, "port 1000 is already in use", "") as service:
        assert service.ports == [1000, 1001] and service.port == 1001
        assert service.child is service.children[1] and service.child.alive
    assert not any(child.alive for child in service.children)


def test_a_restart_keeps_its_port_and_ends_the_child_before(tmp_path: Path) -> None:
    service = Service(tmp_path, "", "")
    service.start()
    service.start()
    assert [child.alive for child in service.children] == [False, True]
    assert service.ports == [1000, 1000]
    service.stop()


@pytest.mark.parametrize(
    ("messages", "num_tries"), [(["already in use"] * START_TRIES, START_TRIES), (["no such file"], 1)], ids=["taken", "broken"]
)
def test_a_service_that_does_not_start_says_why(tmp_path: Path, messages: list[str], num_tries: int) -> None:
    service = Service(tmp_path, *messages)
    with pytest.raises(ConfigurationError, match=messages[0]):
        service.start()
    assert len(service.children) == num_tries
    assert not any(child.alive for child in service.children)
