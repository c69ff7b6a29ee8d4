"""Bearer tokens that a file lists. A message never holds one."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from pathlib import Path

import yaml
from pydantic import Field, ValidationError, model_validator

from kdmesh.auth.identity import Identity, Name, Role
from kdmesh.auth.watched import Watched, read_bytes
from kdmesh.config import StrictModel
from kdmesh.errors import ConfigError
from kdmesh.plain_yaml import UniqueKeysLoader

_SHORTEST = 16
_VISIBLE = r"^[\x21-\x7e]+$"


class TokenEntry(StrictModel):
    """One token and whose it is. A name may have several, as while one replaces the other."""

    name: Name
    """Of the job or person."""

    role: Role
    """What it may do."""

    token: str | None = Field(None, min_length=_SHORTEST, max_length=4096, pattern=_VISIBLE)
    """The token itself."""

    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")
    """Or its SHA-256, in hexadecimal, so that who reads the file cannot use it."""

    @model_validator(mode="after")
    def _one_form(self) -> TokenEntry:
        if (self.token is None) == (self.sha256 is None):
            raise ValueError("exactly one of token and sha256 must be set")
        return self

    @property
    def digest(self) -> bytes:
        """SHA-256 of the token."""
        return bytes.fromhex(self.sha256) if self.sha256 is not None else _digest(self.token or "")


class TokenFile(StrictModel):
    """A file of tokens."""

    tokens: tuple[TokenEntry, ...]
    """All of them; none lets nobody in."""


class TokenSet:
    """Who has which token; tokens are kept as digests."""

    def __init__(self, entries: dict[bytes, Identity]) -> None:
        self._entries = entries

    def find(self, token: str) -> Identity | None:
        """Whose token it is, in a time that says nothing of how much of it is right."""
        wanted, found = _digest(token), None
        for digest, identity in self._entries.items():
            if hmac.compare_digest(digest, wanted):
                found = identity
        return found


def watch_tokens(path: Path, on_failure: Callable[[], None]) -> Watched[TokenSet]:
    """The tokens in a file, as it is now. Raises ConfigError when it cannot be used at first."""
    return Watched((path,), lambda: read_tokens(path), on_failure=on_failure)


def read_tokens(path: Path) -> TokenSet:
    """Raises ConfigError when the file cannot be read, or says anything but tokens."""
    try:
        tree = yaml.load(read_bytes(path), UniqueKeysLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark else ""
        raise ConfigError(f"{path} is not YAML, or has a key twice{line}") from None
    try:
        file = TokenFile.model_validate(tree)
    except ValidationError as error:
        # Without the values, which may be tokens.
        lines = [f"  {'.'.join(map(str, e['loc'])) or '(top level)'}: {e['msg']}" for e in error.errors()]
        raise ConfigError("\n".join([f"{path} is no file of tokens", *lines])) from None
    entries: dict[bytes, Identity] = {}
    for entry in file.tokens:
        if entry.digest in entries:
            raise ConfigError(f"{path}: {entry.name} and {entries[entry.digest].name} have the same token")
        entries[entry.digest] = Identity(entry.name, entry.role)
    return TokenSet(entries)


def read_token(path: Path) -> str:
    """The one token in a client's file. Raises ConfigError."""
    try:
        token = read_bytes(path).decode("ascii").strip()
    except UnicodeDecodeError:
        token = ""
    if not token or not token.isprintable() or " " in token:
        raise ConfigError(f"{path} must hold one token and nothing else")
    return token


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
