"""Finished images into any S3-compatible store."""

from __future__ import annotations

import base64
import hashlib
import logging
import math
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from latentline.errors import ConfigurationError, StoreUnavailable
from latentline.images import connect
from latentline.settings import Settings

log = logging.getLogger(__name__)

TRIES = 3  # botocore waits between them, with jitter
# Answers that no retry mends: the settings are wrong.
MISCONFIGURED = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied", "NoSuchBucket", "403", "404"}


class ImageStore:
    """Write access to the bucket of result images."""

    def __init__(self, settings: Settings) -> None:
        self._bucket, self._region, self._retention_s = settings.s3_bucket, settings.s3_region, settings.retention_s
        self._s3 = connect(settings, read_timeout_s=10, retries=TRIES)

    def ensure_bucket(self) -> None:
        """Create the bucket when it is not there.

        Raises:
            ConfigurationError: the store refuses these credentials.
            StoreUnavailable: it does not answer.
        """
        try:
            self._s3.head_bucket(Bucket=self._bucket)
        except ClientError as error:
            if error.response["Error"]["Code"] not in ("404", "NoSuchBucket"):
                raise self._domain_error(error, "check") from error
            try:
                # AWS wants every region but its first named.
                region: Any = {} if self._region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": self._region}}
                self._s3.create_bucket(Bucket=self._bucket, **region)
            except self._s3.exceptions.BucketAlreadyOwnedByYou:
                return  # another worker was faster
            except (ClientError, BotoCoreError) as failure:
                raise self._domain_error(failure, "create") from failure
            self._let_expire()
        except BotoCoreError as error:
            raise self._domain_error(error, "check") from error

    def _let_expire(self) -> None:
        """A rule on a bucket of our own making: images go with their records, also when no worker runs to delete them.

        The reaper is exact and deletes first; the rule counts whole days from the upload, so it has a day more. Others'
        buckets are left alone: writing a rule replaces all that are there.
        """
        days = math.ceil(self._retention_s / 86400) + 1
        rule: Any = {"ID": "latentline-retention", "Status": "Enabled", "Filter": {"Prefix": ""}, "Expiration": {"Days": days}}
        try:
            self._s3.put_bucket_lifecycle_configuration(Bucket=self._bucket, LifecycleConfiguration={"Rules": [rule]})
        except (ClientError, BotoCoreError) as error:
            log.warning("%s; images are deleted by workers alone", self._domain_error(error, "set an expiry rule on"))

    def put(self, key: str, data: bytes, content_type: str, metadata: dict[str, str]) -> None:
        """Store one object; the store refuses it when what arrives is not what was sent (Content-MD5).

        Raises:
            ConfigurationError, StoreUnavailable: as :meth:`ensure_bucket`.
        """
        digest = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
        try:
            self._s3.put_object(Bucket=self._bucket, Key=key, Body=data, ContentType=content_type, ContentMD5=digest, Metadata=metadata)
        except (ClientError, BotoCoreError) as error:
            raise self._domain_error(error, f"store {key!r} in") from error

    def delete_all(self, prefix: str) -> bool:
        """Delete every object under a prefix; False when the store does not let it happen now."""
        try:
            for page in self._s3.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=prefix):
                for entry in page.get("Contents", ()):
                    self._s3.delete_object(Bucket=self._bucket, Key=entry["Key"])
            return True
        except (ClientError, BotoCoreError) as error:
            log.warning("%s", self._domain_error(error, f"delete {prefix!r} from"))
            return False

    def _domain_error(self, error: Exception, what: str) -> ConfigurationError | StoreUnavailable:
        code = error.response["Error"]["Code"] if isinstance(error, ClientError) else type(error).__name__
        message = f"cannot {what} bucket {self._bucket!r}: {code}"
        return ConfigurationError(message) if code in MISCONFIGURED else StoreUnavailable(message)
