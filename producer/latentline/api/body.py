"""The body of a submission: a JSON object, read with limits on its size and on the time that its client takes."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from fastapi import Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from latentline.errors import InvalidRequest
from latentline.jobs import MAX_BODY_BYTES

BODY_S = 10.0  # for the whole body


async def json_object(request: Request, most_bytes: int = MAX_BODY_BYTES) -> dict[str, Any]:
    """The request's body as a JSON object.

    Raises:
        HTTPException: 408 too slow, 413 too large, 415 another content type or an encoded body.
        InvalidRequest: no JSON, no object, or an object that names a field twice.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HTTPException(415, f"content type {kind[:80] or '(none)'!r}; allowed: application/json")
    charset = request.headers.get("content-type", "").lower().partition("charset=")[2].strip(' "')
    if charset not in ("", "utf-8", "utf8"):
        raise HTTPException(415, f"charset {charset[:80]!r}; allowed: utf-8")
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise HTTPException(415, f"content encoding {encoding[:80]!r}; allowed: none")
    _check_length(request, most_bytes)
    try:
        async with asyncio.timeout(BODY_S):
            body = await _read(request, most_bytes)
    except ClientDisconnect:  # nobody reads this answer
        raise HTTPException(400, "the connection was closed before the body was there") from None
    except TimeoutError:
        raise HTTPException(408, f"the body did not arrive within {BODY_S:g} s", {"Connection": "close"}) from None
    try:
        data = json.loads(body.decode(), parse_constant=_refuse_constant, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest("body", bytes(body[:60]), f"a JSON object ({str(error)[:100]})") from None
    if not isinstance(data, dict):
        raise InvalidRequest("body", data, "a JSON object")
    return data


def _check_length(request: Request, most_bytes: int) -> None:
    """Refuse a body whose declared length is over the limit before it is waited for."""
    declared = request.headers.get("content-length", "0")
    if len(declared) > 18 or int(declared) > most_bytes:  # digits: the server has checked that
        raise _too_large(most_bytes)


def _too_large(most_bytes: int) -> HTTPException:
    return HTTPException(413, f"the body is larger than {most_bytes} bytes", {"Connection": "close"})


async def _read(request: Request, most_bytes: int) -> bytearray:
    body = bytearray()
    async for chunk in request.stream():  # counted as it arrives: a chunked body declares no length
        body += chunk
        if len(body) > most_bytes:
            raise _too_large(most_bytes)
    return body


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):  # which of the values counts would depend on who reads it
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidRequest(twice[:80], None, "each field once")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
