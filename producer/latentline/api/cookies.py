"""The session of a browser: an API key in a cookie that scripts cannot read.

The cookie holds the key itself. Only SHA-256 sums of keys are stored, so nothing that could be read at the broker opens a session, and
a revoked key ends its sessions with their next request. Three things keep pages of other sites from using the cookie:
``SameSite=Strict``, the browser's own word on where a request comes from (``Sec-Fetch-Site``), and a header on requests that change
something, which a page of another site can only send when CORS allows it.
"""

from __future__ import annotations

from fastapi import Request
from fastapi.responses import Response

from latentline.errors import NotAllowed, NotAuthenticated
from latentline.keys import Credential

COOKIE = "latentline_key"
PAGE_HEADER = "X-Latentline-Page"
KEPT_S = 12 * 3600  # of a session; a working day


def credential_in_cookie(request: Request) -> Credential | None:
    """The key of a browser's session; None where there is none.

    Raises:
        NotAllowed: the request comes from another site's page, or changes something without the page's header.
        NotAuthenticated: the cookie holds no key.
    """
    text = request.cookies.get(COOKIE)
    if text is None:
        return None
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise NotAllowed("a session's cookie opens nothing for pages of other sites")
    if request.method not in ("GET", "HEAD", "OPTIONS") and PAGE_HEADER.lower() not in request.headers:
        raise NotAllowed(f"with a session's cookie, a request that changes something needs the header {PAGE_HEADER}")
    credential = Credential.parse(text)
    if credential is None:
        raise NotAuthenticated("the session's cookie holds no API key: sign in again")
    return credential


def remember(answer: Response, key: str, *, secure: bool) -> None:
    """Begin a session. ``secure``: the cookie is sent over https only; a plain http page could not keep it then."""
    answer.set_cookie(COOKIE, key, max_age=KEPT_S, path="/", secure=secure, httponly=True, samesite="strict")


def forget(answer: Response) -> None:
    """End a session."""
    answer.delete_cookie(COOKIE, path="/", httponly=True, samesite="strict")
