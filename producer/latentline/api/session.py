"""Sign-in and sign-out of the page: ``/session``."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel

from latentline.errors import InvalidRequest, NotAuthenticated
from latentline.keys import SCOPES, Credential

from .auth import Access, Principal, credential_of
from .body import json_object
from .cookies import forget, remember

router = APIRouter(include_in_schema=False)  # of the page alone: programs present their key with each request


class SessionAnswer(BaseModel):
    """Who is signed in. Without keys everybody is, with every scope and no tenant of their own."""

    keys: bool
    tenant: str | None
    scopes: list[str]


@router.get("/session", response_model=SessionAnswer)
async def session(request: Request) -> SessionAnswer:
    """Who is signed in; 401 for nobody."""
    access: Access = request.app.state.access
    return _answer(access, await access.principal(credential_of(request) if access.keys else None, "read"))


@router.post("/session", response_model=SessionAnswer)
async def sign_in(request: Request) -> JSONResponse:
    """Keep an API key in a cookie that scripts cannot read. Needs the scope ``read``."""
    access: Access = request.app.state.access
    data = await json_object(request)
    key = data.pop("key", None)
    if data:
        raise InvalidRequest(next(iter(data))[:80], next(iter(data.values())), "only the field key")
    if not access.keys:
        return JSONResponse(_answer(access, Principal()).model_dump())
    credential = Credential.parse(key.strip()) if isinstance(key, str) else None
    if credential is None:
        raise NotAuthenticated("this is no API key: it reads ll_... and was shown once by latentline keys create")
    answer = JSONResponse(_answer(access, await access.principal(credential, "read")).model_dump())
    remember(answer, str(key).strip(), secure=request.url.scheme == "https")
    return answer


@router.delete("/session", status_code=204, response_class=Response)
async def sign_out() -> Response:
    """End the session of this browser. The key itself stays as it is."""
    answer = Response(status_code=204)
    forget(answer)
    return answer


def _answer(access: Access, principal: Principal) -> SessionAnswer:
    key = principal.key
    return SessionAnswer(keys=access.keys, tenant=key.tenant if key else None, scopes=list(key.scopes if key else SCOPES))
