"""Writing and deleting result images in any S3-compatible store."""

from __future__ import annotations

import base64
import hashlib
import logging
import math
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from latentline.errors import ConfigurationError, StoreUnavailable
from latentline.images import connect_s3
from latentline.settings import Settings

log = logging.getLogger(__name__)

TRIES = 3  # botocore waits between them, with jitter
# Error codes that mean wrong settings: retrying does not help.
MISCONFIGURED = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied", "NoSuchBucket", "403", "404"}


class ImageStore:
    """Write access to the bucket of result images."""

    def __init__(self, settings: Settings) -> None:
        self._bucket, self._region, self._retention_s = settings.s3_bucket, settings.s3_region, settings.retention_s
        self._s3 = connect_s3(settings, read_timeout_s=10, retries=TRIES)

    def ensure_bucket(self) -> None:
        """Create the bucket if it does not exist.

        Raises:
            ConfigurationError: the store refuses these credentials.
            StoreUnavailable: the store does not answer.
        """
        try:
            self._s3.head_bucket(Bucket=self._bucket)
        except ClientError as error:
            if error.response["Error"]["Code"] not in ("404", "NoSuchBucket"):
                raise self._domain_error(error, "check") from error
            try:
                # AWS wants the region named, except for us-east-1.
                region: Any = {} if self._region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": self._region}}
                self._s3.create_bucket(Bucket=self._bucket, **region)
            except self._s3.exceptions.BucketAlreadyOwnedByYou:
                return  # another worker created it first
            except (ClientError, BotoCoreError) as failure:
                raise self._domain_error(failure, "create") from failure
            self._set_expiry_rule()
        except BotoCoreError as error:
            raise self._domain_error(error, "check") from error

    def _set_expiry_rule(self) -> None:
        """Let the store itself delete old images from a bucket that this worker created, also when no worker runs.

        Workers delete exactly at the end of the retention. The rule counts whole days from the upload, so it gets one day
        more. Buckets that existed before are left alone: writing a rule would replace all of their rules.
        """
        days = math.ceil(self._retention_s / 86400) + 1
        rule: Any = {"ID": "latentline-retention", "Status": "Enabled", "Filter": {"Prefix": ""}, "Expiration": {"Days": days}}
        try:
            self._s3.put_bucket_lifecycle_configuration(Bucket=self._bucket, LifecycleConfiguration={"Rules": [rule]})
        except (ClientError, BotoCoreError) as error:
            log.warning("%s; only workers will delete images", self._domain_error(error, "set an expiry rule on"))

    def put(self, key: str, data: bytes, content_type: str, metadata: dict[str, str]) -> None:
        """Store one object. Content-MD5 lets the store refuse data that was damaged on the way.

        Raises:
            ConfigurationError: the store refuses these credentials.
            StoreUnavailable: the store does not answer, or cannot take the object now.
        """
        digest = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
        try:
            self._s3.put_object(Bucket=self._bucket, Key=key, Body=data, ContentType=content_type, ContentMD5=digest, Metadata=metadata)
        except (ClientError, BotoCoreError) as error:
            raise self._domain_error(error, f"store {key!r} in") from error

    def delete_all(self, prefix: str) -> bool:
        """Delete every object under a prefix; False if the store did not do it, with a warning in the log."""
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
