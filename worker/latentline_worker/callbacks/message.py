"""What a callback tells: the job as it was at the event, and URLs of its pictures that are signed when it is sent."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime, timedelta
from typing import Any

from latentline.callbacks import CallbackData, CallbackImage, CallbackMessage
from latentline.errors import ConfigurationError
from latentline.images import Images
from latentline.jobs import ImageRef, JobRecord
from latentline.predictions import picture_url, prediction
from latentline.settings import Settings

log = logging.getLogger(__name__)


class Links:
    """URLs of pictures, signed on this machine: the store is not asked."""

    def __init__(self, images: Images, life_s: int) -> None:
        self._images, self._life_s = images, life_s

    @classmethod
    def of(cls, settings: Settings) -> Links | None:
        """None, with a warning, where these settings do not allow to sign."""
        # Without any of them, boto3 would look for credentials of the machine, over the network too.
        if not settings.model_fields_set & {"s3_access_key_id", "s3_bucket"}:
            log.warning("callbacks carry no URLs of pictures: LATENTLINE_S3_* are not set for this process")
            return None
        images = Images(settings)
        try:
            images.sign("a picture")
        except ConfigurationError as error:
            log.warning("callbacks carry no URLs of pictures: %s", error.message)
            return None
        return cls(images, settings.presign_ttl_s)

    def sign(self, key: str) -> tuple[str, datetime]:
        """A URL of the object, and until when it is good."""
        now = datetime.now(UTC).replace(microsecond=0)  # taken first, so that the store's limit is not before the one that is stated
        return self._images.sign(key), now + timedelta(seconds=self._life_s)


def message_body(taken: dict[str, Any], links: Links | None) -> bytes:
    """The JSON of a callback, or of a prediction where the job came by Replicate's dialect. A try that comes later has URLs of its own."""
    record: JobRecord = taken["record"]
    base = record.request.callback.prediction_base if record.request.callback else None
    if base is not None:
        return json.dumps(prediction(record, base, _output(record, base, links)), ensure_ascii=False).encode()
    data = CallbackData(
        id=record.id,
        status=record.status.value,
        model=record.request.model,
        attempt=record.attempt,
        step=record.step,
        num_steps=record.num_steps,
        created_at=record.created_at,
        started_at=record.started_at,
        finished_at=record.finished_at,
        images=tuple(_image(image, links) for image in record.images),
        error=record.error,
        warnings=record.warnings,
        tenant=record.request.tenant,
        metadata=record.request.metadata,
    )
    at = datetime.fromtimestamp(taken["at"], UTC)
    return CallbackMessage(id=taken["id"], type=taken["type"], timestamp=at, seq=taken["seq"], data=data).model_dump_json().encode()


def _output(record: JobRecord, base: str, links: Links | None) -> list[str] | None:
    """URLs that open the pictures without a key; where none can be signed, the API's, which want one."""
    urls = [links.sign(image.key)[0] if links else picture_url(base, record, number) for number, image in enumerate(record.images)]
    return urls or None


def _image(image: ImageRef, links: Links | None) -> CallbackImage:
    url, until = links.sign(image.key) if links else (None, None)
    return CallbackImage(**image.model_dump(exclude={"url"}), url=url, url_expires_at=until)
