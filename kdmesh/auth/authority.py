"""Decides who calls, and whether they may."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kdmesh.auth.config import AuthConfig, RolesConfig
from kdmesh.auth.identity import ANYBODY, Identity, Role, is_name
from kdmesh.auth.tokens import TokenSet, watch_tokens
from kdmesh.auth.watched import Watched
from kdmesh.errors import ConfigError, PermissionDenied, Unauthenticated

if TYPE_CHECKING:
    from kdmesh.auth.web_tokens import WebTokens

log = logging.getLogger(__name__)

_BEARER = "bearer"


@dataclass(frozen=True, slots=True)
class Caller:
    """Somebody who was let in."""

    identity: Identity
    is_still_good: Callable[[], bool] = lambda: True  # whether their token has not been revoked since


class Authority:
    """One server's; belongs to its event loop.

    Args:
        cfg: where identities come from; None lets anybody do anything.
        on_failure: called with the name of the key whose changed file is of no use.
        on_refusal: called with the name of the error whenever somebody is turned away.

    Raises, when made:
        ConfigError: a file that `cfg` names cannot be used.
    """

    def __init__(
        self,
        cfg: AuthConfig | None,
        *,
        on_failure: Callable[[str], None] = lambda key: None,
        on_refusal: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self._on_refusal = on_refusal
        self._is_open = cfg is None
        self._tokens: Watched[TokenSet] | None = None
        self._web_tokens: WebTokens | None = None
        self._certificates: RolesConfig | None = None
        if cfg is None:
            return
        self._certificates = cfg.certificates
        if cfg.tokens is not None:
            self._tokens = watch_tokens(cfg.tokens, lambda: on_failure("tokens"))
        if cfg.jwt is not None:
            try:
                from kdmesh.auth.web_tokens import WebTokens
            except ImportError:
                raise ConfigError("auth.jwt needs PyJWT and cryptography (pip install 'kdmesh[jwt]')") from None
            self._web_tokens = WebTokens(cfg.jwt, lambda: on_failure("jwt"))

    async def admit(
        self, authorization: str | None, peer_names: Callable[[], Sequence[str]], role: Role, what: str
    ) -> Caller:
        """Who calls.

        Args:
            authorization: the header of this name.
            peer_names: those in the client's certificate, if it showed one.
            role: what the call needs.
            what: the call, for messages.

        Raises:
            Unauthenticated: nobody knows who it is.
            PermissionDenied: their role is not enough.
            Unavailable: there are no keys yet to check a token with.
        """
        try:
            caller = Caller(ANYBODY) if self._is_open else await self._identify(authorization, peer_names)
            caller.identity.require(role, what)
        except (Unauthenticated, PermissionDenied) as error:
            self._on_refusal(type(error).__name__)
            raise
        if role is Role.OPERATOR and not self._is_open:
            log.info("operator calls", extra={"call": what, "caller": caller.identity.name})
        return caller

    async def _identify(self, authorization: str | None, peer_names: Callable[[], Sequence[str]]) -> Caller:
        token = _bearer(authorization)
        if token is not None and (self._tokens is not None or self._web_tokens is not None):
            return await self._by_token(token)
        if self._certificates is not None:
            return Caller(_by_certificate(peer_names(), self._certificates))
        raise Unauthenticated(f"this server wants to know who calls: {self._wanted()}")

    async def _by_token(self, token: str) -> Caller:
        if self._tokens is not None and (known := _by_file(self._tokens, token)) is not None:
            return known
        if self._web_tokens is None:
            raise Unauthenticated("the bearer token is not one that this server knows")
        return Caller(await self._web_tokens.identify(token))

    def _wanted(self) -> str:
        sources = {"a bearer token": self._tokens or self._web_tokens, "a client certificate": self._certificates}
        return f"send {' or '.join(name for name, source in sources.items() if source is not None)}"


def _by_file(tokens: Watched[TokenSet], token: str) -> Caller | None:
    seen = tokens.current()
    identity = seen.find(token)
    if identity is None:
        return None

    def is_still_good() -> bool:
        now = tokens.current()
        return now is seen or now.find(token) == identity

    return Caller(identity, is_still_good)


def _by_certificate(names: Sequence[str], cfg: RolesConfig) -> Identity:
    usable = [name for name in names if is_name(name)]
    if not usable:
        raise Unauthenticated("this server wants to know who calls: show a client certificate with a usable name in it")
    named = [name for name in usable if name in cfg.roles] or usable
    role = cfg.role_of(named[0])
    if role is None:
        raise PermissionDenied(f"the certificate of {named[0]} is good, but it has no role on this server")
    return Identity(named[0], role)


def _bearer(authorization: str | None) -> str | None:
    scheme, _, token = (authorization or "").partition(" ")
    return token.strip() if scheme.lower() == _BEARER and token.strip() else None
