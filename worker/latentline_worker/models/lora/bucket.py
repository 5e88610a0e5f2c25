"""Adapters under one prefix of a bucket: listed, their heads read from afar, and fetched into a bounded folder when a job names them."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import threading
import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from botocore.exceptions import BotoCoreError, ClientError

from latentline.errors import ConfigurationError, ModelError, StoreUnavailable

from .file import MAX_BYTES
from .sources import SUFFIX

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

log = logging.getLogger(__name__)

SUMS = "SHA256SUMS"  # beside the adapters, in the format of sha256sum: then each has to be in it, and to match
HEAD_BYTES = 256 << 10  # of an object, read first: the names and shapes of most adapters' tensors fit
MAX_HEAD_BYTES = 64 << 20
LISTED_S = 60.0  # a listing serves all models for this long
CHUNK_BYTES = 1 << 20
MISCONFIGURED = ("AccessDenied", "NoSuchBucket", "SignatureDoesNotMatch", "InvalidAccessKeyId")  # error codes that no retry helps
ABANDONED_S = 3600  # a part of a file that is older was left behind by a process that was killed


class _Object(NamedTuple):
    """An adapter as it was listed; anything else is another stamp."""

    etag: str
    num_bytes: int
    sha256: str | None  # that it has to have


class Bucket:
    """``PREFIX/NAME.safetensors`` objects, and nothing else of the bucket.

    Files that were fetched stay in ``cache``, together at most ``max_bytes``; those used least recently go. Processes may share it.

    Args:
        s3: a client with time limits of its own.
        bucket: its name.
        prefix: ends in a slash.
        cache: a folder, which is made.
    """

    def __init__(self, s3: S3Client, bucket: str, prefix: str, cache: Path, max_bytes: int) -> None:
        self._s3, self._bucket, self._prefix, self._cache, self._max_bytes = s3, bucket, prefix, cache, max_bytes
        self._listed: dict[str, _Object] = {}
        self._listed_at = float("-inf")
        self._lock = threading.Lock()  # guards the listing
        self._fetching = threading.Lock()  # one fetch at a time: several together would only share the same network
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(f"lora_cache: got {str(cache)!r}; allowed: a folder that can be written: {error}") from None

    def list(self) -> dict[str, Hashable]:
        with self._lock:
            if time.monotonic() - self._listed_at >= LISTED_S:
                self._listed, self._listed_at = self._look(), time.monotonic()
            return dict(self._listed)

    def look_again(self) -> None:
        """Let the next listing be a new one."""
        self._listed_at = float("-inf")

    def _look(self) -> dict[str, _Object]:
        found: dict[str, tuple[str, int]] = {}
        try:
            for page in self._s3.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=self._prefix, Delimiter="/"):
                for entry in page.get("Contents", ()):
                    found[entry["Key"].removeprefix(self._prefix)] = entry["ETag"], entry["Size"]
        except (ClientError, BotoCoreError) as error:
            raise self._problem("list adapters in", error) from error
        sums = self._sums() if SUMS in found else None
        return {
            name.removesuffix(SUFFIX): _Object(etag, size, None if sums is None else sums.get(name, ""))
            for name, (etag, size) in found.items()
            if name.endswith(SUFFIX)
        }

    def _sums(self) -> dict[str, str]:
        try:
            text = self._s3.get_object(Bucket=self._bucket, Key=self._prefix + SUMS)["Body"].read().decode()
        except (ClientError, BotoCoreError, UnicodeDecodeError) as error:
            raise self._problem(f"read {SUMS} in", error) from error
        lines = (line.split(maxsplit=1) for line in text.splitlines())
        return {parts[1].removeprefix("*"): parts[0].lower() for parts in lines if len(parts) == 2}

    def stamp(self, name: str) -> Hashable:
        return self._object(name)

    def _object(self, name: str) -> _Object:
        try:
            return self._listed[name]
        except KeyError:
            raise ModelError(f"adapter {name}: its file is gone") from None

    @contextmanager
    def head(self, name: str) -> Iterator[Path]:
        one = self._object(name)
        most = min(MAX_BYTES, self._max_bytes)
        if one.num_bytes > most:
            raise ModelError(f"adapter {name}: {one.num_bytes} bytes; allowed: {most}")
        if one.sha256 == "":
            raise ModelError(f"adapter {name}: it is not in {SUMS} beside it; allowed: those that are")
        data = self._read(name, one, min(HEAD_BYTES, one.num_bytes))
        needed = 8 + int.from_bytes(data[:8], "little")  # the length of the header comes first in a safetensors file
        if needed > min(MAX_HEAD_BYTES, one.num_bytes):
            raise ModelError(f"adapter {name}: cannot be read as safetensors: a header of {needed - 8} bytes")
        if needed > len(data):
            data = self._read(name, one, needed)
        with tempfile.NamedTemporaryFile(dir=self._cache, prefix=".head-") as file:
            file.write(data)
            file.truncate(one.num_bytes)  # the values are a hole, which takes no space
            file.flush()
            yield Path(file.name)

    def _read(self, name: str, one: _Object, count: int) -> bytes:
        try:
            answer = self._s3.get_object(Bucket=self._bucket, Key=self._key(name), Range=f"bytes=0-{max(0, count - 1)}")
            self._check_version(name, one, answer["ETag"])
            return answer["Body"].read()[:count]
        except (ClientError, BotoCoreError) as error:
            raise self._problem(f"read adapter {name} in", error) from error

    def whole(self, name: str) -> Path:
        one = self._object(name)
        path = self._cache / (hashlib.sha256(f"{self._bucket}/{self._key(name)} {one}".encode()).hexdigest() + SUFFIX)
        if _used_now(path):
            return path
        with self._fetching:
            if not _used_now(path):  # by the thread that fetched before this one
                log.info("adapter %s: fetching %d bytes", name, one.num_bytes)
                self._fetch(name, one, path)
                _used_now(path)
                self._drop_old(path)
        return path

    def _fetch(self, name: str, one: _Object, path: Path) -> None:
        digest = hashlib.sha256()
        handle, part = tempfile.mkstemp(dir=self._cache, prefix=".part-")
        try:
            with os.fdopen(handle, "wb") as file:
                answer = self._s3.get_object(Bucket=self._bucket, Key=self._key(name))
                self._check_version(name, one, answer["ETag"])
                for chunk in answer["Body"].iter_chunks(CHUNK_BYTES):
                    digest.update(chunk)
                    file.write(chunk)
                    if file.tell() > one.num_bytes:
                        break
                received = file.tell()
            if received != one.num_bytes:
                raise StoreUnavailable(f"adapter {name}: {received} bytes came of {one.num_bytes}")
            if one.sha256 is not None and digest.hexdigest() != one.sha256:
                raise ModelError(f"adapter {name}: its SHA-256 sum is {digest.hexdigest()}; allowed: {one.sha256 or 'none'}, by {SUMS}")
            os.replace(part, path)
        except (ClientError, BotoCoreError) as error:
            raise self._problem(f"fetch adapter {name} from", error) from error
        except OSError as error:  # of the folder; the store's are of botocore
            raise StoreUnavailable(f"adapter {name}: cannot be kept: {error}") from error
        finally:
            Path(part).unlink(missing_ok=True)

    def _drop_old(self, newest: Path) -> None:
        """Keep the folder within its bound, and free of what killed processes have left."""
        files = []
        for path in self._cache.iterdir():
            try:
                stat = path.stat()
                if path.name.startswith(".") and time.time() - stat.st_mtime > ABANDONED_S:
                    path.unlink()
                elif path.suffix == SUFFIX and path != newest:
                    files.append((stat.st_mtime_ns, stat.st_size, path))
            except FileNotFoundError:
                continue  # another process was faster
        left = self._max_bytes - newest.stat().st_size
        for _, size, path in sorted(files, reverse=True):
            left -= size
            if left < 0:
                path.unlink(missing_ok=True)

    def _check_version(self, name: str, one: _Object, etag: str) -> None:
        if etag != one.etag:
            self.look_again()
            raise StoreUnavailable(f"adapter {name} has changed in its bucket: it has to be looked at again")

    def _key(self, name: str) -> str:
        return f"{self._prefix}{name}{SUFFIX}"

    def _problem(self, what: str, error: Exception) -> ConfigurationError | ModelError | StoreUnavailable:
        code = error.response["Error"]["Code"] if isinstance(error, ClientError) else type(error).__name__
        message = f"cannot {what} s3://{self._bucket}/{self._prefix}: {code}"
        if code in ("NoSuchKey", "404"):
            self.look_again()
            return ModelError(message)
        return (
            ConfigurationError(message) if code in ("AccessDenied", "NoSuchBucket", "SignatureDoesNotMatch") else StoreUnavailable(message)
        )


def _used_now(path: Path) -> bool:
    """Note that a file is used; False if there is none."""
    try:
        os.utime(path, ns=(time.time_ns(), time.time_ns()))  # finer than the kernel's own
    except FileNotFoundError:
        return False
    return True
