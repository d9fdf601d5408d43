"""The HTTP application: what stands at which address, and who may ask."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from medmoe_jax.serving import asked
from medmoe_jax.serving.endpoint import Endpoint, Limits, find
from medmoe_jax.serving.metrics import Metrics
from medmoe_jax.serving.models import Served
from medmoe_jax.serving.refusals import Refused, broken
from medmoe_jax.serving.told import ChatForm, TextForm

_OPEN = "/health"  # what needs no key


def application(
    models: Sequence[Served],
    limits: Limits = Limits(),
    key: str = "",
    hosts: Sequence[str] = (),
) -> ASGIApp:
    """What a server runs.

    Args:
      models: what can be asked.
      limits: of each request.
      key: that clients must know; "" = none is asked for.
      hosts: names by which alone the server may be asked, in either case of letters; none = any.
        So no page in a browser reaches a server without a key through a name of its own that
        points here.
    """
    by_name, metrics = {one.name: one for one in models}, Metrics(models)

    async def health(request: Request) -> Response:
        lost = [one.name for one in models if one.worker.failure is not None]
        content = {"status": "failed", "models": lost} if lost else {"status": "ok"}
        return JSONResponse(content, 503 if lost else 200)

    async def figures(request: Request) -> Response:
        page, kind = metrics.page()
        return Response(page, headers={"content-type": kind})

    async def every(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [one.content() for one in models]})

    async def one(request: Request) -> Response:
        return JSONResponse(find(by_name, request.path_params["name"]).content())

    chat = Endpoint(asked.chat, ChatForm(), by_name, limits, metrics)
    text = Endpoint(asked.text, TextForm(), by_name, limits, metrics)
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", _post(chat), methods=["POST"]),
            Route("/v1/completions", _post(text), methods=["POST"]),
            Route("/v1/models", every, methods=["GET"]),
            Route("/v1/models/{name:path}", one, methods=["GET"]),
            Route("/metrics", figures, methods=["GET"]),
            Route(_OPEN, health, methods=["GET"]),
        ],
        exception_handlers={Refused: _refused, HTTPException: _http_error, Exception: _fault},
    )
    return Guard(app, key, hosts)


def _post(endpoint: Endpoint):
    """An endpoint as a function, which alone Starlette takes for a handler."""

    async def handle(request: Request) -> Response:
        return await endpoint(request)

    return handle


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return JSONResponse(error.content, error.status, error.headers)


def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return _refused(request, Refused(message, error.status_code, headers=error.headers))


def _fault(request: Request, error: Exception) -> Response:
    """The fault itself is raised again after this answer, and logged by the server."""
    return _refused(request, broken())


class Guard:
    """Lets nobody in without the key, or by a name that is not the server's."""

    def __init__(self, app: ASGIApp, key: str, hosts: Sequence[str]) -> None:
        self._app, self._key = app, key.encode()
        self._hosts = frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        error = self._refusal(scope) if scope["type"] == "http" else None
        if error is not None:
            response = JSONResponse(error.content, error.status, error.headers)
            await response(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> Refused | None:
        headers = Headers(scope=scope)
        if self._hosts and _name(headers.get("host", "")) not in self._hosts:
            return Refused(f"host: this server is asked by {', '.join(sorted(self._hosts))}", 403)
        if not self._key or scope["path"] == _OPEN:
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(given.encode("latin-1"), self._key):
            return None
        return Refused(
            "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'",
            401,
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def _name(host: str) -> str:
    """The name in a Host header, without its port and in small letters."""
    name, _, port = host.rpartition(":")
    return (name if port.isdigit() else host).lower()
