"""Small pictures for lists and grids: ``/v1/jobs/{id}/images/{n}/thumbnail``, made from the picture when it is asked for.

Made here and not by the worker: most pictures are never seen in a list, a second object for each would double the requests to the
store, and pictures of older workers have thumbnails too. What was made is kept in memory, and browsers keep it for an hour.
"""

from __future__ import annotations

import asyncio
import io
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from PIL import Image

from latentline.requests import MAX_SIZE_PX

from .answers import errors
from .conditional import IF_NONE_MATCH, unchanged
from .dependencies import Reading
from .methods import IS_HEAD
from .pictures import lasting, picture_of

MAX_CACHE_BYTES = 32 * 1024 * 1024  # some 1,000 thumbnails of 256 pixels
MAX_AT_ONCE = 2  # made at the same time, each from a picture in memory: one of 2048 x 2048 takes 12 MB
QUALITY = 80  # of WebP

router = APIRouter(prefix="/v1", tags=["jobs"])


class Thumbnails:
    """Makes thumbnails and keeps those that were asked for last. One object for each application."""

    def __init__(self, max_bytes: int = MAX_CACHE_BYTES) -> None:
        self._max_bytes, self._num_bytes = max_bytes, 0
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._making: dict[str, asyncio.Task[bytes]] = {}
        self._places = asyncio.Semaphore(MAX_AT_ONCE)

    async def get(self, name: str, width: int, fetch: Callable[[], Awaitable[bytes]]) -> bytes:
        """A thumbnail as WebP.

        Args:
            name: of the picture and the width; equal ones are the same thumbnail.
            fetch: gives the picture.
        """
        if name in self._kept:
            self._kept.move_to_end(name)
            return self._kept[name]
        task = self._making.get(name)
        if task is None:
            task = self._making[name] = asyncio.create_task(self._make(name, width, fetch))
            task.add_done_callback(lambda _: self._making.pop(name))
        return await asyncio.shield(task)  # others may wait for it when this client goes

    async def _make(self, name: str, width: int, fetch: Callable[[], Awaitable[bytes]]) -> bytes:
        async with self._places:
            data = await asyncio.to_thread(shrink, await fetch(), width)
        self._keep(name, data)
        return data

    def _keep(self, name: str, data: bytes) -> None:
        self._kept[name] = data
        self._num_bytes += len(data)
        while self._num_bytes > self._max_bytes and len(self._kept) > 1:
            _, dropped = self._kept.popitem(last=False)
            self._num_bytes -= len(dropped)


def shrink(data: bytes, width: int) -> bytes:
    """A picture as WebP of at most so many pixels width; a smaller one keeps its size. What the file says of itself is left out."""
    with Image.open(io.BytesIO(data)) as picture:
        picture.draft("RGB", (width, width))  # a JPEG is decoded at a fraction of its size
        small = picture.convert("RGB")
    small.thumbnail((width, MAX_SIZE_PX))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=QUALITY)
    return buffer.getvalue()


@router.get(
    "/jobs/{job_id}/images/{number}/thumbnail",
    response_class=Response,
    openapi_extra={"parameters": [IF_NONE_MATCH]},
    responses={
        200: {"content": {"image/webp": {"schema": {"type": "string", "format": "binary"}}}, "description": "The thumbnail"},
        304: {"description": "Unchanged since the answer with this ETag"},
        **errors(404),
    },
)
async def get_thumbnail(
    request: Request,
    jobs: Reading,
    job_id: str,
    number: int,
    width: Annotated[Literal["64", "128", "256", "512"], Query(description="Pixels; the height follows")] = "256",
) -> Response:
    """A small copy of a picture of a job, as WebP. It never changes: browsers keep it for an hour without asking."""
    image = picture_of(await jobs.get(job_id), number)
    name = f"{image.sha256}-{width}"
    headers = lasting(name)
    if unchanged(request, headers["ETag"]):
        return Response(status_code=304, headers=headers)
    if request.scope.get(IS_HEAD):
        return Response(headers=headers, media_type="image/webp")
    thumbnails: Thumbnails = request.app.state.thumbnails
    data = await thumbnails.get(name, int(width), lambda: jobs.picture(image))
    return Response(data, headers=headers, media_type="image/webp")
