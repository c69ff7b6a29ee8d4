"""The public keys that JSON web tokens are checked with: from a file, or from the issuer."""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
import time
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import URLError

import jwt
from jwt import PyJWK

from kdmesh.auth.config import JwtConfig
from kdmesh.auth.watched import Watched, read_bytes
from kdmesh.errors import ConfigError, Unavailable

log = logging.getLogger(__name__)

_FETCH_S = 5.0
_GOOD_FOR_S = 300.0  # how long fetched keys are used before somebody looks for others
_AGAIN_S = 10.0  # between two looks, whatever key a caller names
_MAX_BYTES = 2**20


class KeySet:
    """Public keys by their ids."""

    def __init__(self, keys: dict[str | None, PyJWK | str]) -> None:
        self._keys = keys

    def find(self, key_id: str | None) -> PyJWK | str:
        """The key of this id; for a token or a key without one, the only key. Raises InvalidKeyError."""
        if key_id in self._keys:
            return self._keys[key_id]
        if len(self._keys) == 1 and (key_id is None or None in self._keys):
            return next(iter(self._keys.values()))
        raise jwt.InvalidKeyError("no such key")

    def has(self, key_id: str | None) -> bool:
        """Whether `find` finds one."""
        try:
            return bool(self.find(key_id))
        except jwt.InvalidKeyError:
            return False


class WebKeys:
    """The keys as they are now; belongs to one event loop. Raises ConfigError when made with a file of no use."""

    def __init__(self, cfg: JwtConfig, on_failure: Callable[[], None]) -> None:
        self._url, self._ca, self._on_failure = cfg.jwks_url, cfg.jwks_ca, on_failure
        self._file: Watched[KeySet] | None = None
        self._fetched: KeySet | None = None
        self._looked_s = -float("inf")
        self._fetching: asyncio.Task[None] | None = None
        if cfg.key is not None:
            key = cfg.key
            self._file = Watched((key,), lambda: _read_key(key), on_failure=on_failure)
        elif cfg.jwks is not None:
            jwks = cfg.jwks
            self._file = Watched((jwks,), lambda: _parse(read_bytes(jwks), str(jwks)), on_failure=on_failure)

    async def current(self, key_id: str | None) -> KeySet:
        """All keys; fetched again when they are old, or when this one is not among them.

        Raises:
            Unavailable: none could be fetched so far.
        """
        if self._file is not None:
            return self._file.current()
        age_s = time.monotonic() - self._looked_s
        is_missing = self._fetched is None or not self._fetched.has(key_id)
        if age_s > _GOOD_FOR_S or (is_missing and age_s > _AGAIN_S):
            self._looked_s = time.monotonic()
            self._fetching = asyncio.create_task(self._fetch(), name="fetch keys")
        if is_missing and self._fetching is not None:
            await asyncio.shield(self._fetching)
        if self._fetched is None:
            raise Unavailable(
                "the issuer's keys could not be fetched, so no token can be checked", retry_after_s=_AGAIN_S
            )
        return self._fetched

    async def _fetch(self) -> None:
        assert self._url is not None
        try:
            self._fetched = _parse(await asyncio.to_thread(_get, self._url, self._ca), self._url)
        except ConfigError as error:
            log.error("keys not fetched, those from before hold", extra={"reason": str(error)})
            self._on_failure()


def _get(url: str, ca: Path | None) -> bytes:
    """Blocks. Raises ConfigError."""
    try:
        context = ssl.create_default_context(cafile=ca)
        with urllib.request.urlopen(url, timeout=_FETCH_S, context=context) as answer:
            data: bytes = answer.read(_MAX_BYTES)
    except (URLError, OSError, ValueError, HTTPException) as error:
        raise ConfigError(f"cannot fetch {url}: {error}") from None
    return data


def _parse(data: bytes, source: str) -> KeySet:
    try:
        entries = json.loads(data)["keys"]
        keys = {entry.get("kid"): key for entry in entries if (key := _public_key(entry)) is not None}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        keys = {}
    if not keys:
        raise ConfigError(f"{source} is no JSON web key set with a public key in it")
    return KeySet(keys)


def _public_key(entry: dict[str, Any]) -> PyJWK | Any | None:
    """None: it is not one that signatures are checked with; a set may hold such keys (RFC 7517, section 5)."""
    if entry.get("kty") == "oct":  # a symmetric key would let whoever can read it make tokens
        return None
    if not isinstance(entry.get("kid"), str | None):
        return None
    try:
        key = PyJWK.from_dict(entry)
    except (jwt.PyJWTError, NotImplementedError, TypeError, ValueError):  # the second for the algorithm "none"
        return None
    # A key that names no algorithm goes with any for its kind; the library would take it for one of RS256 alone.
    return key if entry.get("alg") else key.key


def _read_key(path: Path) -> KeySet:
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    data = read_bytes(path)
    try:
        load_pem_public_key(data)
    except (ValueError, TypeError):
        raise ConfigError(f"{path} is no public key in PEM") from None
    return KeySet({None: data.decode("latin-1")})  # what stands around the key is of any encoding
