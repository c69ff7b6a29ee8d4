"""Updates of weights that a server receives, which end at once when there is nobody to take them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from kdmesh.errors import Unavailable
from kdmesh.serving.outstanding import Outstanding


class Updating:
    """Belongs to the server's event loop."""

    def __init__(self) -> None:
        self._outstanding = Outstanding()
        self._received: set[asyncio.Timeout] = set()
        self._refusal: str | None = None

    @asynccontextmanager
    async def receiving(self) -> AsyncIterator[None]:
        """Around each update. Raises Unavailable when updates are held off, or are from now on."""
        self._require_accepted()
        until_held_off = asyncio.timeout(None)
        self._received.add(until_held_off)
        try:
            with self._outstanding:
                async with until_held_off:
                    yield
        except TimeoutError:
            self._require_accepted()
            raise
        finally:
            self._received.discard(until_held_off)

    async def hold_off(self, reason: str) -> None:
        """Let those under way fail, and others until `accept`. Returns when none is received any more."""
        self._refusal = reason
        for update in self._received:
            update.reschedule(asyncio.get_running_loop().time())
        await self.wait_none()

    def accept(self) -> None:
        """Updates may come again."""
        self._refusal = None

    async def wait_none(self) -> None:
        """Return when none is received."""
        await self._outstanding.wait_none()

    def _require_accepted(self) -> None:
        if self._refusal is not None:
            raise Unavailable(self._refusal, retry_after_s=1.0)
