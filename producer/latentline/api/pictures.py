"""Pictures through the API: ``/v1/jobs/{id}/images/{n}``, for browsers that cannot reach the object store."""

from __future__ import annotations

import re
from typing import Annotated, Any

from fastapi import APIRouter, Header, Request
from fastapi.responses import Response

from latentline.errors import PictureNotFound
from latentline.jobs import ImageRef, JobRecord

from .answers import errors
from .conditional import IF_NONE_MATCH, unchanged
from .dependencies import Reading
from .methods import IS_HEAD

KEPT_S = 3600  # a browser keeps a picture for so long without asking; it never changes

router = APIRouter(prefix="/v1", tags=["jobs"])

_KINDS: dict[str, Any] = {f"image/{kind}": {"schema": {"type": "string", "format": "binary"}} for kind in ("png", "webp", "jpeg")}


@router.get(
    "/jobs/{job_id}/images/{number}",
    response_class=Response,
    openapi_extra={"parameters": [IF_NONE_MATCH]},
    responses={
        200: {"content": _KINDS, "description": "The picture"},
        206: {"content": _KINDS, "description": "The part of it that Range asks for"},
        304: {"description": "Unchanged since the answer with this ETag"},
        416: {"description": "The picture has no such part"},
        **errors(404),
    },
)
async def get_picture(
    request: Request,
    jobs: Reading,
    job_id: str,
    number: int,
    if_range: Annotated[str | None, Header()] = None,
    range_: Annotated[str | None, Header(alias="Range")] = None,
) -> Response:
    """A picture of a job, counted from 0. ``Range`` with one range of bytes is honoured."""
    image = picture_of(await jobs.get(job_id), number)
    headers = {**lasting(image.sha256), "Accept-Ranges": "bytes"}
    if unchanged(request, headers["ETag"]):
        return Response(status_code=304, headers=headers)
    part = _part(range_, image.num_bytes) if if_range in (None, headers["ETag"]) else None
    if part and part[0] >= image.num_bytes:
        return Response(status_code=416, headers={"Content-Range": f"bytes */{image.num_bytes}"})
    start, end = part or (0, image.num_bytes - 1)
    if part:
        headers["Content-Range"] = f"bytes {start}-{end}/{image.num_bytes}"
    if request.scope.get(IS_HEAD):
        headers["Content-Length"] = str(end - start + 1)
        return Response(status_code=206 if part else 200, headers=headers, media_type=image.content_type)
    data = await jobs.picture(image, *(part or ()))
    return Response(data, 206 if part else 200, headers, image.content_type)


def picture_of(record: JobRecord, number: int) -> ImageRef:
    """Picture ``number`` of a job, counted from 0; raises PictureNotFound."""
    images = record.images
    if not 0 <= number < len(images):
        raise PictureNotFound(f"job {record.id!r} has {len(images)} pictures, and {number} is none of them: they count from 0")
    return images[number]


def lasting(name: str) -> dict[str, str]:
    """The headers of what never changes under this name."""
    return {"ETag": f'"{name}"', "Cache-Control": f"private, max-age={KEPT_S}, immutable", "X-Content-Type-Options": "nosniff"}


def _part(range_: str | None, size: int) -> tuple[int, int] | None:
    """The first and last byte that a Range header asks for; None for one of another form, which is ignored (RFC 9110, 14.2)."""
    found = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", range_ or "")
    if not found or found[0] == "bytes=-":
        return None
    first, last = found[1], found[2]
    if not first:  # the last so many bytes
        return (max(0, size - int(last)), size - 1) if int(last) else (size, size)
    if last and int(last) < int(first):
        return None
    return int(first), min(int(last) if last else size - 1, size - 1)
