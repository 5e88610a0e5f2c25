"""What the embedded services have in common: a child process on free ports that ends with its owner."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Self

from latentline.errors import ConfigurationError

from .process import Child

START_TRIES = 3  # each with other ports


class EmbeddedService(ABC):
    """A service in a child process. As a context manager it is started on entry and stopped on exit."""

    START_TIMEOUT_S: ClassVar[float]
    PORT_TAKEN: ClassVar[tuple[str, ...]]  # what its log says, one of these, when another process took a port first

    def __init__(self) -> None:
        self.port = 0  # 0: not chosen yet
        self._child: Child | None = None

    @property
    def child(self) -> Child | None:
        return self._child

    def start(self) -> None:
        """Start and wait until the service answers. If another process takes one of the ports first, try others.

        Raises:
            ConfigurationError: it does not start; the message ends with its log's last lines.
        """
        self.stop()
        for tries_left in reversed(range(START_TRIES)):
            self._child = self._launch()
            try:
                self._child.wait_until(self._answers, self.START_TIMEOUT_S)
                return
            except ConfigurationError as error:
                self._child.stop()
                if not tries_left or not any(text in str(error) for text in self.PORT_TAKEN):
                    raise
                self.port = 0

    def stop(self) -> None:
        if self._child:
            self._child.stop()

    @abstractmethod
    def _launch(self) -> Child:
        """Start the process, on ports that are free; a service that keeps its port does so while ``port`` is not 0."""

    @abstractmethod
    def _answers(self) -> bool:
        """Whether the service is ready."""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
