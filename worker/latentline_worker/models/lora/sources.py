"""Where the files of adapters are: a folder, or whatever else lists them and hands them out."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from latentline.errors import ModelError

SUFFIX = ".safetensors"


class Source(Protocol):
    """Files of adapters by name. Any thread may use it; none that owns a device."""

    def list(self) -> dict[str, Hashable]:
        """The names that are there now, each with a stamp that changes when its file does.

        Raises:
            LatentlineError: it cannot be listed now.
        """
        ...

    def stamp(self, name: str) -> Hashable:
        """The stamp of one file.

        Raises:
            ModelError: it is gone.
        """
        ...

    def head(self, name: str) -> AbstractContextManager[Path]:
        """A file of which the names and shapes of the tensors can be read, and their values need not be there."""
        ...

    def whole(self, name: str) -> Path:
        """The whole file.

        Raises:
            ModelError: it is gone, or is not the one that it should be.
            StoreUnavailable: it cannot be had now.
        """
        ...


class Folder:
    """``NAME.safetensors`` files in a folder."""

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise ModelError(f"{path}: no such folder of adapters")
        self._path = path

    def list(self) -> dict[str, Hashable]:
        found: dict[str, Hashable] = {}
        for path in self._path.glob(f"*{SUFFIX}"):
            try:
                found[path.stem] = self.stamp(path.stem)
            except ModelError:
                continue  # it went between the two looks
        return found

    def stamp(self, name: str) -> Hashable:
        try:
            stat = self.whole(name).stat()
        except OSError:
            raise ModelError(f"adapter {name}: its file is gone") from None
        return stat.st_mtime_ns, stat.st_size

    @contextmanager
    def head(self, name: str) -> Iterator[Path]:
        yield self.whole(name)

    def whole(self, name: str) -> Path:
        return self._path / f"{name}{SUFFIX}"
