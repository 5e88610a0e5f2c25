"""Conditional requests as in RFC 9110: whether a client has what it asks for already."""

from __future__ import annotations

import re
from typing import Any

from fastapi import Request

# The header in the OpenAPI document. It is read below, since a request may have several.
IF_NONE_MATCH: dict[str, Any] = {
    "name": "if-none-match",
    "in": "header",
    "required": False,
    "schema": {"anyOf": [{"type": "string"}, {"type": "null"}], "title": "If-None-Match"},
}
# One element of a list, which may be empty: an entity tag and what separates it from the next. A tag may hold commas.
# Nothing is tried twice, so a long header costs what it is long.
_ELEMENT = re.compile(r'[ \t]*+(?:(?:W/)?("[\x21\x23-\x7e\x80-\xff]*+")[ \t]*+)?(?:,|\Z)')


def unchanged(request: Request, etag: str) -> bool:
    """Whether ``If-None-Match`` names an answer, given its entity tag, so that 304 says it all.

    Tags are compared weakly (RFC 9110, section 13.1.2). A header that is not as the RFC has it asks for nothing.
    """
    given = ",".join(request.headers.getlist("if-none-match"))
    if given.strip(" \t") == "*":
        return True
    found, at = False, 0
    while at < len(given):
        element = _ELEMENT.match(given, at)
        if element is None:
            return False
        found, at = found or element[1] == etag, element.end()
    return found
