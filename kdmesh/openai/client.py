"""A client of servers with OpenAI's chat completions: who is asked, and when it is asked again."""

from __future__ import annotations

import asyncio
import email.utils
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from kdmesh.auth.config import OPEN_ACCESS, AccessConfig, is_loopback
from kdmesh.auth.tls_context import client_context
from kdmesh.auth.tokens import read_token
from kdmesh.errors import ConfigError, InvalidRequest, KdmeshError, PermissionDenied, Unauthenticated, Unavailable
from kdmesh.openai.bodies import Reply, error_code, read_reply, shown
from kdmesh.rpc.retry import Deadline, RetryPolicy

try:
    import httpx
except ImportError:
    raise ConfigError("--openai needs httpx: pip install 'kdmesh[openai]'") from None

log = logging.getLogger(__name__)

KEY_VARIABLE = "OPENAI_API_KEY"
"""The environment variable of the key, where `access` names no file of one."""

_CONNECT_S = 30.0  # an address where nobody is, is best told at once
_RETRY_S = 1800.0  # in which a server may load its model anew
_TOLD_AGAIN_S = 10.0
_RETRIES = RetryPolicy(first_s=0.5, longest_s=30.0)
_TOO_EARLY = (408, 409, 425, 429)  # beside 5xx: may well be answered later
_SPENT = "insufficient_quota"  # a 429 of OpenAI that no waiting mends
_FILTERED = "content_filter"  # a 400 of Azure


class PromptFiltered(InvalidRequest):
    """A content filter of the server stopped the prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Servers of one model.

    Raises:
        ConfigError: a URL is none that can be asked, or a key would travel in the clear.
    """

    urls: Sequence[str]  # up to /chat/completions, https://host/v1 for example; at least one
    model: str  # as the servers call it
    access: AccessConfig = OPEN_ACCESS  # a token in it is the key
    key: str = field(default="", repr=False)  # where `access` names no file of one; empty: none is sent
    timeout_s: float = 600.0  # for one request

    def __post_init__(self) -> None:
        if not (self.key.isascii() and self.key.isprintable()) or " " in self.key:
            raise ConfigError(f"{KEY_VARIABLE} must hold one key and nothing else")
        for url in self.urls:
            self._check(url)

    def _check(self, url: str) -> None:
        try:
            parts = httpx.URL(url)
        except httpx.InvalidURL:
            parts = httpx.URL("")
        if parts.scheme not in ("http", "https") or not parts.host or parts.query or parts.fragment:
            raise ConfigError(f"--openai {url!r} is not of the form http://HOST:PORT/v1 or https://HOST/v1")
        if parts.userinfo:
            raise ConfigError(f"a key belongs in {KEY_VARIABLE}, or in the token_file of --access, not in a URL")
        if parts.path.rstrip("/").endswith("/chat/completions"):
            raise ConfigError(f"--openai {url!r}: give what comes before /chat/completions")
        if parts.scheme == "https":
            return
        if self.access.tls is not None:
            raise ConfigError(f"--openai {url!r}: --access has tls, so the URL must begin with https://")
        if self.has_key and not self.access.plaintext_token and not is_loopback(parts.host):
            raise ConfigError(
                f"--openai {url!r}: the key of {self.key_name} would travel in the clear to another machine: take "
                "https://, or plaintext_token in --access where something else encrypts, or give no key"
            )

    @property
    def key_name(self) -> str:
        """Where the key is from."""
        return str(self.access.token_file or KEY_VARIABLE)

    @property
    def has_key(self) -> bool:
        """Whether requests carry a key."""
        return self.access.token_file is not None or bool(self.key)


class EndpointClient:
    """Asks one server after the other. To be used on one event loop, and closed there."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._urls = [url.rstrip("/") for url in endpoint.urls]
        # What the environment says of proxies is for the web, never for this machine.
        here = dict.fromkeys(("all://localhost", "all://127.0.0.1", "all://[::1]"))
        tls = endpoint.access.tls
        self._client = httpx.AsyncClient(
            verify=True if tls is None else client_context(tls),
            mounts=here,
            limits=httpx.Limits(max_connections=None),
            timeout=httpx.Timeout(None, connect=_CONNECT_S),
        )
        self._turns = count()
        self._was_reached = False
        self._told_s = -_TOLD_AGAIN_S

    async def close(self) -> None:
        """End its connections."""
        await self._client.aclose()

    async def ask(self, body: Mapping[str, Any]) -> Reply:
        """What a server answers, asked until one does: again after what may pass, longer and longer after.

        Raises:
            ConfigError: there is no such model, or no such server at that URL.
            InvalidRequest: the request is refused.
            Unauthenticated: the key is not one that counts.
            PermissionDenied: the key is not enough.
            Unavailable: no server has answered for too long.
        """
        content = json.dumps(body, ensure_ascii=False).encode()
        turn = next(self._turns)
        failing: Deadline | None = None
        for attempt in count():
            url = self._urls[(turn + attempt) % len(self._urls)]
            try:
                return await self._post(url, content)
            except Unavailable as error:
                failing = failing or Deadline.after(_RETRY_S if self._was_reached else _CONNECT_S)
                wait_s = _RETRIES.wait_s(attempt, at_least_s=error.retry_after_s)
                if wait_s > failing.left_s:
                    raise Unavailable(f"{url}: {error}; it was tried again for {failing.total_s:.0f} s") from None
                self._tell(url, error, wait_s)
                await asyncio.sleep(wait_s)
        raise AssertionError("attempts do not end")

    async def _post(self, url: str, content: bytes) -> Reply:
        """Raises Unavailable where another attempt may help."""
        try:
            async with asyncio.timeout(self._endpoint.timeout_s):
                response = await self._client.post(
                    f"{url}/chat/completions",
                    content=content,
                    headers={"Content-Type": "application/json", **self._authorization()},
                )
        except TimeoutError:
            raise Unavailable(
                f"no answer within {self._endpoint.timeout_s:g} s (--timeout)", retry_after_s=0.0
            ) from None
        except httpx.RequestError as error:
            raise Unavailable(str(error) or type(error).__name__, retry_after_s=0.0) from None
        self._was_reached = True
        if response.status_code == httpx.codes.OK:
            return read_reply(response.content)
        raise self._failure(url, response)

    def _authorization(self) -> dict[str, str]:
        file = self._endpoint.access.token_file
        key = self._endpoint.key if file is None else read_token(file)
        return {"Authorization": f"Bearer {key}"} if key else {}

    def _failure(self, url: str, response: httpx.Response) -> KdmeshError:
        status, code = response.status_code, error_code(response.content)
        words = f"answers {status}: {self._without_key(shown(response.content))}"
        said = f"{url} {words}"
        if (status in _TOO_EARLY or status >= 500) and code != _SPENT:
            return Unavailable(words, retry_after_s=_retry_after_s(response.headers))
        match status:
            case 401:
                how = f"the key is that of {self._endpoint.key_name}" if self._endpoint.has_key else "there is no key"
                return Unauthenticated(f"{said}; {how}: set {KEY_VARIABLE}, or token_file in the file of --access")
            case 403 | 429:
                return PermissionDenied(said)
            case 404:
                return ConfigError(
                    f"{said}; --openai is what comes before /chat/completions, mostly with /v1 at its end, and "
                    f"--model-name a model that {url}/models lists"
                )
            case 400 if code == _FILTERED:
                return PromptFiltered(said)
            case _ if response.has_redirect_location:
                return ConfigError(f"{said}; it leads to {response.headers['location']}, which --openai may name")
            case _:
                return InvalidRequest(said)

    def _without_key(self, said: str) -> str:
        key = self._authorization().get("Authorization", "").removeprefix("Bearer ")
        return said.replace(key, "***") if key else said

    def _tell(self, url: str, error: Unavailable, wait_s: float) -> None:
        if time.monotonic() >= self._told_s + _TOLD_AGAIN_S:
            self._told_s = time.monotonic()
            log.warning("asking a server again", extra={"url": url, "reason": str(error), "wait_s": round(wait_s, 1)})


def _retry_after_s(headers: httpx.Headers) -> float:
    """What Retry-After asks for, in either of its forms (RFC 9110, section 10.2.3); 0 where it says nothing."""
    said = headers.get("retry-after", "").strip()
    try:
        return max(0.0, float(said))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(said).timestamp() - time.time())
    except ValueError:
        return 0.0
