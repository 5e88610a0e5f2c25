"""The file whose age tells a container probe whether the process is well."""

from __future__ import annotations

import contextlib
from pathlib import Path

from .service import Service


class LivenessFile(Service):
    """Touched while the process is well and removed when it ends. As a service it is touched once a second.

    Errors are ignored: a file that cannot be written makes the probe fail, and must not cost the process its other duties.

    Args:
        path: the file; with None nothing is done.
    """

    def __init__(self, path: Path | None) -> None:
        super().__init__("liveness file")
        self._path = path

    def touch(self) -> None:
        """Set the file's time to now."""
        if self._path:
            with contextlib.suppress(OSError):
                self._path.touch()

    def remove(self) -> None:
        if self._path:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)

    def run_once(self) -> None:
        self.touch()
