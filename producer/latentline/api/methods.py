"""HEAD and OPTIONS for every path, and the ``Allow`` header of a path whose routes differ in their methods."""

from __future__ import annotations

from collections.abc import Iterable

from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

IS_HEAD = "latentline.head"  # in the scope of a HEAD request, which is routed as a GET


class Methods:
    """Middleware. A HEAD request is answered as a GET, whose body the server leaves out; OPTIONS names the methods of a path."""

    def __init__(self, app: ASGIApp, routes: Iterable[BaseRoute]) -> None:
        self._app = app
        self._routes = [route for route in routes if isinstance(route, Route)]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            # Of a mounted application: its routes are written without the prefix at which it stands.
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            scope["latentline.allow"] = lambda: self._allow(path)  # asked for when it is needed: it looks at every route
            if scope["method"] == "HEAD":
                scope = {**scope, "method": "GET", IS_HEAD: True}
            elif scope["method"] == "OPTIONS" and (allow := scope["latentline.allow"]()):
                await Response(status_code=204, headers={"Allow": allow})(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _allow(self, path: str) -> str:
        methods = {method for route in self._routes if route.path_regex.match(path) for method in route.methods or ()}
        if "GET" in methods:
            methods.add("HEAD")
        return ", ".join(sorted(methods | {"OPTIONS"})) if methods else ""
