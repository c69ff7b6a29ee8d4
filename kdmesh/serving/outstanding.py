"""Counts what was promised and is not done yet, so that a drain knows when to end."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self


class Outstanding:
    """A context manager around each promise; many may be open at once."""

    def __init__(self) -> None:
        self._count = 0
        self._none = asyncio.Event()
        self._none.set()

    def __enter__(self) -> Self:
        self._count += 1
        self._none.clear()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._count -= 1
        if not self._count:
            self._none.set()

    async def wait_none(self) -> None:
        """Return when none is open."""
        await self._none.wait()
