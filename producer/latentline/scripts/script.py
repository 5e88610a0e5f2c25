"""One Lua script: put together from its file and the libraries that it names, called by its SHA with named arguments."""

from __future__ import annotations

import functools
import hashlib
import re
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from . import names

# In a script's head: `-- uses: clock, jobs` names the files of lib/ that it takes; a library may use others.
_USES = re.compile(r"^-- uses: (.+)$", re.MULTILINE)
# A script's first statement names its arguments, in their order. Callers give them by these names.
_PARAMETERS = re.compile(r"^local ([\w,\s]+?) = unpack\(ARGV\)$", re.MULTILINE)


@dataclass(frozen=True)
class Script:
    """A script as it is sent to the broker."""

    name: str
    source: str
    sha: str
    parameters: tuple[str, ...]

    def arguments(self, **values: Any) -> list[Any]:
        """The values in the script's own order.

        Raises:
            TypeError: for a name that the script does not have, and for one that is missing.
        """
        if values.keys() != set(self.parameters):
            wrong = sorted(values.keys() ^ set(self.parameters))
            raise TypeError(f"script {self.name!r} takes {', '.join(self.parameters)}; unknown or missing: {', '.join(wrong)}")
        return [values[parameter] for parameter in self.parameters]


def load(name: str) -> Script:
    """The script in ``<name>.lua``."""
    body = _read(f"{name}.lua")
    (parameters,) = _PARAMETERS.findall(body)
    libraries: dict[str, str] = {}
    _collect(body, libraries)
    source = "\n".join([_shared(), *libraries.values(), body])
    sha = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()
    return Script(name, source, sha, tuple(re.split(r",\s*", parameters)))


def _collect(text: str, libraries: dict[str, str]) -> None:
    """Add the libraries that a text uses, each behind those that it uses itself."""
    for names_used in _USES.findall(text):
        for library in names_used.split(", "):
            if library not in libraries:
                body = _read(f"lib/{library}.lua")
                _collect(body, libraries)
                libraries[library] = body


@functools.cache
def _read(path: str) -> str:
    return files(__package__).joinpath(path).read_text(encoding="utf-8")


@functools.cache
def _shared() -> str:
    return f"{names.keys()}\n{names.constants()}"
