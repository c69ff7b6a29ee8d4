"""Limits of time that can be ended before they are reached."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Limits:
    """Belongs to one event loop."""

    def __init__(self) -> None:
        self._running: set[asyncio.Timeout] = set()

    @asynccontextmanager
    async def of(self, seconds: float) -> AsyncIterator[None]:
        """As asyncio.timeout; it raises TimeoutError also when it is ended from outside."""
        async with asyncio.timeout(seconds) as running:
            self._running.add(running)
            try:
                yield
            finally:
                self._running.discard(running)

    def end(self) -> None:
        """Have all that are running be reached now."""
        for running in self._running:
            running.reschedule(0)
        self._running.clear()  # each can be ended once
