"""Who makes a request: API keys, or nobody in particular on loopback."""

from __future__ import annotations

import ipaddress
import math
import socket
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from fastapi import Depends, Request
from fastapi.security import HTTPBearer
from limits import RateLimitItemPerMinute
from limits.aio.storage import RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from starlette.types import ASGIApp, Receive, Scope, Send

from latentline import records, routing
from latentline.async_client import AsyncClient
from latentline.errors import ConfigurationError, NotAllowed, NotAuthenticated, RateExceeded
from latentline.keys import ApiKey, Credential, Limits
from latentline.keys import Scope as KeyScope
from latentline.settings import Settings

from .cookies import credential_in_cookie

# Only so that the OpenAPI document names the scheme: the header is read below, where every way to get it wrong is one error.
bearer = Depends(HTTPBearer(auto_error=False, scheme_name="API key", description="ll_..., made by `latentline keys create`"))


@dataclass(frozen=True)
class Principal:
    """Who makes a request; without a key, whoever reaches this API on loopback."""

    key: ApiKey | None = None

    @property
    def limits(self) -> Limits:
        return self.key.limits if self.key else Limits()

    @property
    def sees(self) -> str | None:
        """The tenant whose jobs it may see; None for all tenants."""
        return None if self.key is None or self.key.may("admin") else self.key.tenant


class Access:
    """Decides what a credential opens, and how often. One object for each application."""

    def __init__(self, client: AsyncClient, *, keys: bool) -> None:
        self._client, self.keys = client, keys
        pool: Any = client.connection_pool  # the library's annotation leaves it out
        storage = RedisStorage("async+redis://", implementation="redispy", key_prefix=routing.RATES, connection_pool=pool)
        self._window = SlidingWindowCounterRateLimiter(storage)

    async def principal(self, credential: Credential | None, scope: KeyScope) -> Principal:
        """Who may do this, looked up now: a key that was revoked opens nothing from the next request on.

        Raises:
            NotAuthenticated: no key, or one that is wrong or revoked.
            NotAllowed: the key lacks the scope.
        """
        if not self.keys:
            return Principal()
        if credential is None:
            raise NotAuthenticated("this needs an API key: Authorization: Bearer ll_...")
        return self.check(credential, (await self._client.keys([credential.prefix])).get(credential.prefix), scope)

    def check(self, credential: Credential, key: ApiKey | None, scope: KeyScope) -> Principal:
        """The same for a key that was looked up already."""
        if key is None or not key.opens_for(credential):
            raise NotAuthenticated("the API key is wrong or was revoked")
        if not key.may(scope):
            raise NotAllowed(f"the API key lacks the scope {scope!r}; it has: {', '.join(key.scopes)}")
        return Principal(key)

    async def count(self, principal: Principal, num_jobs: int = 1) -> None:
        """Count submissions, all or none; raises RateExceeded. All processes of the API count together, in the broker."""
        if principal.key is None or not principal.limits.rate:
            return
        item = RateLimitItemPerMinute(principal.limits.rate)
        with records.domain_errors():
            if await self._window.hit(item, principal.key.prefix, cost=num_jobs):
                return
            again_at = (await self._window.get_window_stats(item, principal.key.prefix)).reset_time
        message = f"more than {principal.limits.rate} submissions a minute with this API key"
        raise RateExceeded(message, max(1, math.ceil(again_at - time.time())))


def credential_of(request: Request) -> Credential | None:
    """The key that a request presents, in its header or else in its session's cookie; None where there is none.

    Raises:
        NotAuthenticated: what is presented cannot be a key.
        NotAllowed: a cookie that another site's page makes use of.
    """
    given = request.headers.getlist("authorization")
    if not given:
        return credential_in_cookie(request)
    scheme, _, text = given[0].partition(" ")
    credential = Credential.parse(text.strip()) if len(given) == 1 and scheme.lower() == "bearer" else None
    if credential is None:
        raise NotAuthenticated("the Authorization header does not hold one API key; allowed: Bearer ll_...")
    return credential


class LoopbackHosts:
    """Middleware of an API without keys. It refuses requests for a name that is not loopback's.

    A page on any site can have its own name resolve to 127.0.0.1, and the visitor's browser then takes this API for that site.
    """

    def __init__(self, app: ASGIApp, refusal: ASGIApp) -> None:
        self._app, self._refusal = app, refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
            if len(hosts) != 1 or not is_loopback(_name(hosts[0])):
                await self._refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _name(host: str) -> str:
    """The name in a Host header, without its port; empty for what is no host."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def is_loopback(host: str) -> bool:
    """Whether a host name or address always means this machine."""
    name = host.lower().rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_exposure(settings: Settings, host: str, listener: socket.socket | None) -> None:
    """Refuse to serve without keys anywhere but on loopback.

    Args:
        listener: an inherited socket, which counts instead of ``host``.

    Raises:
        ConfigurationError: says what to set.
    """
    if settings.auth == "keys":
        return
    if listener is not None:
        host = str(listener.getsockname()[0]) if listener.family in (socket.AF_INET, socket.AF_INET6) else "a socket that is not TCP"
    if not is_loopback(host):
        raise ConfigurationError(
            f"LATENTLINE_AUTH=none serves on loopback only, and this is {host or 'every address'}: "
            "set LATENTLINE_AUTH=keys and make a key with latentline keys create"
        )
