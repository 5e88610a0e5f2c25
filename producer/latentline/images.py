"""Read access to result images: presigned URLs, and whether the object store answers."""

from __future__ import annotations

import threading
import time
from functools import cached_property
from typing import TYPE_CHECKING, Any

from .errors import ConfigurationError, StoreUnavailable
from .settings import Settings

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

REUSED_SHARE = 0.5  # of a URL's life: it is handed out again for so long, so the last client to get it has the other half
MAX_SIGNED = 20_000  # URLs that are kept to be handed out again, some 600 bytes each
CHECK_CACHE_S = 2.0  # a burst of submissions makes one request to the store


class Images:
    """The bucket of result images as producers see it. boto3 is imported on first use."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._checked_at = float("-inf")
        self._problem: str | None = None
        self._lock = threading.Lock()
        self._signed: dict[str, tuple[str, float]] = {}  # key -> URL, until when it is handed out; the oldest first
        self._signed_lock = threading.Lock()

    @cached_property
    def _s3(self) -> S3Client:
        return connect_s3(self._settings, read_timeout_s=2)

    @cached_property
    def _signer(self) -> S3Client:
        """It makes no request: the name under which clients reach the store may not even be one that this process can reach."""
        public = self._settings.s3_public_endpoint_url
        if public is None:
            return self._s3
        return connect_s3(self._settings.model_copy(update={"s3_endpoint_url": public.rstrip("/")}), read_timeout_s=2)

    def presign(self, key: str) -> str:
        """A URL with which anyone can get the object, for ``presign_ttl_s`` seconds at most and half of that at least.

        Signed locally, without a request. The same URL is given again for half of its life, so that clients which poll can keep
        the picture that they have.
        """
        now = time.monotonic()
        with self._signed_lock:
            url, until = self._signed.get(key, ("", now))
            if now >= until:
                url = self.sign(key)
                self._signed.pop(key, None)  # to the end of the order
                self._signed[key] = url, now + self._settings.presign_ttl_s * REUSED_SHARE
                if len(self._signed) > MAX_SIGNED:
                    del self._signed[next(iter(self._signed))]
        return url

    def sign(self, key: str) -> str:
        """A new URL with which anyone can get the object, for ``presign_ttl_s`` seconds; raises ConfigurationError without credentials."""
        from botocore.exceptions import BotoCoreError

        params = {"Bucket": self._settings.s3_bucket, "Key": key}
        try:
            return self._signer.generate_presigned_url("get_object", Params=params, ExpiresIn=self._settings.presign_ttl_s)
        except BotoCoreError as error:
            raise ConfigurationError(
                f"URLs cannot be presigned: {error} (LATENTLINE_S3_ACCESS_KEY_ID and ..._SECRET_ACCESS_KEY)"
            ) from error

    def check(self) -> None:
        """Raise StoreUnavailable unless the bucket answers. The result, good or bad, is reused for two seconds."""
        from botocore.exceptions import BotoCoreError, ClientError

        with self._lock:
            # A failure is reused as well: threads that waited for the lock while the store hung must not each wait again.
            if time.monotonic() - self._checked_at >= CHECK_CACHE_S:
                try:
                    self._s3.head_bucket(Bucket=self._settings.s3_bucket)
                    self._problem = None
                except (BotoCoreError, ClientError) as error:
                    self._problem = f"the object store does not answer for bucket {self._settings.s3_bucket!r}: {error}"
                self._checked_at = time.monotonic()
            if self._problem is not None:
                raise StoreUnavailable(self._problem)

    def download(self, key: str, start: int | None = None, end: int | None = None) -> bytes:
        """The object's bytes, or those from ``start`` to ``end``, both included; raises StoreUnavailable."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            part: Any = {} if start is None else {"Range": f"bytes={start}-{'' if end is None else end}"}
            return self._s3.get_object(Bucket=self._settings.s3_bucket, Key=key, **part)["Body"].read()
        except (BotoCoreError, ClientError) as error:
            raise StoreUnavailable(f"the object store does not give {key!r}: {error}") from error


def connect_s3(settings: Settings, read_timeout_s: float, retries: int = 1) -> S3Client:
    """An S3 client with time limits; one client serves many threads."""
    import boto3
    from botocore.config import Config

    def secret(value: object) -> str | None:
        return value.get_secret_value() if value is not None else None  # type: ignore[attr-defined]

    return boto3.client(
        "s3",
        endpoint_url=settings.s3_endpoint_url,
        region_name=settings.s3_region,
        aws_access_key_id=secret(settings.s3_access_key_id),
        aws_secret_access_key=secret(settings.s3_secret_access_key),
        config=Config(
            signature_version="s3v4",
            connect_timeout=2,
            read_timeout=read_timeout_s,
            retries={"mode": "standard", "total_max_attempts": retries},
            max_pool_connections=32,
            s3={"addressing_style": "path" if settings.s3_endpoint_url else "auto"},
            # Some S3-compatible stores do not support the newer checksum trailers.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )
