"""How routes get the job service: FastAPI dependencies that look the request's key up."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from fastapi import Depends, Query, Request

from latentline.keys import Credential, Scope

from .auth import Principal, bearer, credential_of
from .service import JobService
from .tokens import key_of_token, prefix_of_token


def opened(
    scope: Scope, scheme: Any = bearer, credential_of: Callable[[Request], Credential | None] = credential_of
) -> Callable[..., Awaitable[JobService]]:
    """A dependency that gives the service to whoever may do this.

    Args:
        scheme: names the way to present a key in the OpenAPI document.
        credential_of: reads the key of a request.
    """

    async def service(request: Request, _: Any = scheme) -> JobService:
        state = request.app.state
        credential = credential_of(request) if state.access.keys else None
        return JobService(state, await state.access.principal(credential, scope))

    return service


async def _listening(request: Request, _: Annotated[Any, bearer], token: Annotated[str | None, Query(max_length=200)] = None) -> JobService:
    """The service for a stream, whose URL may hold a token instead of a key in a header."""
    state = request.app.state
    if token is None or not state.access.keys:
        return await opened("read")(request)
    prefix = prefix_of_token(token)
    key = (await state.client.keys([prefix])).get(prefix)
    return JobService(state, Principal(key_of_token(token, key)))


# What a route declares to get the service. The key is looked at before the parameters and the body are.
Reading = Annotated[JobService, Depends(opened("read"))]
Submitting = Annotated[JobService, Depends(opened("submit"))]
Administering = Annotated[JobService, Depends(opened("admin"))]
Listening = Annotated[JobService, Depends(_listening)]
