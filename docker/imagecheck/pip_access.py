"""What a build needs of this machine's pip configuration: the same index, constraints and certificates inside of it."""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from .commands import output

# How packages are reached. Everything else (where to install, what to log, colours) is the image's own business.
KEYS = (
    "index-url", "extra-index-url", "find-links", "no-index", "trusted-host", "cert", "client-cert", "proxy", "constraint",
    "timeout", "default-timeout", "retries",
)  # fmt: skip
CERTIFICATE_VARIABLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE")  # in the order in which pip's requests looks


@dataclass(frozen=True)
class PipAccess:
    """A pip.conf for the build, and the files and folders of this machine that it names."""

    config: str
    paths: tuple[Path, ...]


def machine_pip() -> PipAccess:
    """Of the pip that runs this check: its configuration files and the PIP_* variables."""
    listing = output([sys.executable, "-m", "pip", "config", "list"])
    return access(parse(listing), os.environ)


def parse(listing: str) -> dict[str, str]:
    """Names and values of ``pip config list``; a variable goes before a file's line, and a command's section before [global]."""
    found: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}
    for line in listing.splitlines():
        name, _, value = line.partition("=")
        section, _, key = name.rpartition(".")
        if section in found and key in KEYS:
            found[section][key] = str(ast.literal_eval(value))
    return found["global"] | found["install"] | found[":env:"]


def access(values: Mapping[str, str], environment: Mapping[str, str]) -> PipAccess:
    values = dict(values)
    if "cert" not in values:  # pip's own bundle does not hold a private authority that the environment names
        bundle = next((environment[name] for name in CERTIFICATE_VARIABLES if environment.get(name)), "")
        values |= {"cert": bundle} if bundle else {}
    # Values of several words stand on lines of their own: pip splits at blanks and line ends alike.
    lines = [f"{key} = " + "\n    ".join(value.split()) for key, value in sorted(values.items())]
    return PipAccess("\n".join(["[global]", *lines, ""]), tuple(_outermost(_named(values))))


def _named(values: Mapping[str, str]) -> Iterable[Path]:
    for key, value in values.items():
        for word in value.split():
            parts = urlsplit(word)
            path = Path(unquote(parts.path) if parts.scheme == "file" else word)
            if not path.is_absolute() or not path.exists():
                continue
            # The pages of an index in files link to wheels beside it.
            yield path.parent if key.endswith("index-url") else path


def _outermost(paths: Iterable[Path]) -> list[Path]:
    """Without what lies in another one of them."""
    distinct = sorted(set(paths))
    return [path for path in distinct if not any(other in path.parents for other in distinct)]
