"""JSON web tokens: their signature, issuer, audience and time, and the name and role they claim."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable

import jwt

from kdmesh.auth.config import JwtConfig
from kdmesh.auth.identity import Identity, Role, is_name
from kdmesh.auth.web_keys import WebKeys
from kdmesh.errors import PermissionDenied, Unauthenticated

_MAX_KNOWN = 4096  # tokens whose signature need not be checked again


class WebTokens:
    """Checks tokens; belongs to one event loop. Raises ConfigError when made with keys that cannot be used."""

    def __init__(self, cfg: JwtConfig, on_failure: Callable[[], None]) -> None:
        self._cfg = cfg
        self._keys = WebKeys(cfg, on_failure)
        self._known: dict[bytes, tuple[Identity, float]] = {}  # by digest: whose, and until when
        self._known_by: object = None  # the keys that they were checked with

    async def identify(self, token: str) -> Identity:
        """Whose token it is.

        Raises:
            Unauthenticated: it is not valid, or not valid now.
            PermissionDenied: it is valid, and its name has no role here.
            Unavailable: there are no keys yet.
        """
        try:
            key_id = jwt.get_unverified_header(token).get("kid")
            keys = await self._keys.current(key_id)
            if keys is not self._known_by:
                self._known, self._known_by = {}, keys
            digest = hashlib.sha256(token.encode()).digest()
            if (known := self._known.get(digest)) is not None and time.time() < known[1]:
                return known[0]
            claims = jwt.decode(
                token,
                keys.find(key_id),
                algorithms=list(self._cfg.algorithms),
                issuer=self._cfg.issuer,
                audience=self._cfg.audience,
                leeway=self._cfg.leeway_s,
                options={"require": ["exp", "iss", "aud"]},
            )
        except (jwt.PyJWTError, TypeError) as error:  # the second where the key is of another kind than the signature
            raise Unauthenticated(f"the bearer token is not valid: {self._why(error)}") from None
        identity = self._identity(claims)
        if len(self._known) >= _MAX_KNOWN:
            self._known.clear()
        self._known[digest] = identity, int(claims["exp"]) + self._cfg.leeway_s
        return identity

    def _identity(self, claims: dict[str, object]) -> Identity:
        name = claims.get(self._cfg.name_claim)
        if not isinstance(name, str) or not is_name(name):
            raise Unauthenticated(f"the bearer token's claim {self._cfg.name_claim} holds no usable name")
        claimed = claims.get(self._cfg.role_claim) if self._cfg.role_claim is not None else None
        if claimed is not None and claimed not in list(Role):
            raise PermissionDenied(f"the role that the token of {name} claims is none of {', '.join(Role)}")
        role = Role(str(claimed)) if claimed is not None else self._cfg.role_of(name)
        if role is None:
            raise PermissionDenied(f"the token of {name} is valid, but it has no role on this server")
        return Identity(name, role)

    def _why(self, error: Exception) -> str:
        """For the caller: our own words, since the library's may quote the token."""
        match error:
            case jwt.ExpiredSignatureError():
                return "it has expired"
            case jwt.InvalidAudienceError():
                return f"it is not for {self._cfg.audience}"
            case jwt.InvalidIssuerError():
                return f"its issuer is not {self._cfg.issuer}"
            case jwt.InvalidAlgorithmError():
                return f"its algorithm is none of {', '.join(self._cfg.algorithms)}"
            case jwt.MissingRequiredClaimError():
                return f"it lacks the claim {error.claim}"
            case jwt.ImmatureSignatureError():
                return "its time has not come yet"
            case _:
                return "it is no JSON web token that a key of the issuer has signed"
