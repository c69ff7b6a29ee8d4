"""Who may do what over HTTP."""

from __future__ import annotations

import base64
from collections.abc import Awaitable, Callable, Sequence

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from kdmesh.auth.authority import Authority
from kdmesh.auth.identity import Role
from kdmesh.errors import PermissionDenied, Unauthenticated, Unavailable

_OPEN = frozenset({"/healthz", "/readyz", "/reachz"})  # whoever looks after processes need not be known to them
_READING = frozenset({"GET", "HEAD"})
_ASK = 'Bearer, Basic realm="kdmesh: any user, the token as password"'


def guard(app: FastAPI, authority: Authority) -> None:
    """Let viewers read, and operators do the rest, whatever routes there will be.

    A browser may send the token as a password. It sends that by itself wherever a page leads it, so nothing is
    changed on the strength of one.
    """

    @app.middleware("http")
    async def admit(request: Request, handle: Callable[[Request], Awaitable[Response]]) -> Response:
        is_reading = request.method in _READING
        # Not that of request.url, into which Starlette 0.46 takes the client's Host header.
        path = request.scope["path"]
        if is_reading and path in _OPEN:
            return await handle(request)
        what = f"{request.method} {path}"
        try:
            await authority.admit(
                _authorization(request, is_reading=is_reading),
                lambda: _peer_names(request),
                Role.VIEWER if is_reading else Role.OPERATOR,
                what,
            )
        except Unauthenticated as error:
            return JSONResponse({"reason": str(error)}, status_code=401, headers={"WWW-Authenticate": _ASK})
        except PermissionDenied as error:
            return JSONResponse({"reason": str(error)}, status_code=403)
        except Unavailable as error:
            return JSONResponse({"reason": str(error)}, status_code=503, headers={"Retry-After": "10"})
        return await handle(request)


def _authorization(request: Request, *, is_reading: bool) -> str | None:
    said = request.headers.get("Authorization")
    scheme, _, rest = (said or "").partition(" ")
    if scheme.lower() != "basic" or not is_reading:
        return said
    try:
        _, _, password = base64.b64decode(rest, validate=True).decode().partition(":")
    except ValueError:  # it is not ASCII, base64 or UTF-8
        return None
    return f"Bearer {password}"


def _peer_names(request: Request) -> Sequence[str]:
    names: Sequence[str] = getattr(request.state, "peer_names", ())
    return names
