"""Says which servers are waited for, so that a job that cannot begin is not silent."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

log = logging.getLogger(__name__)

_FIRST_S = 3.0  # a server that is about to be there is not worth a line
_AGAIN_S = 10.0


@asynccontextmanager
async def told_waiting(kind: str, awaited: Callable[[], Mapping[str, Exception | None]]) -> AsyncIterator[None]:
    """Inside, a warning now and then for each server that is awaited.

    Args:
        kind: what they are called.
        awaited: addresses of those that are not connected, and why, where that is known.
    """
    telling = asyncio.create_task(_tell(kind, awaited))
    try:
        yield
    finally:
        telling.cancel()


async def _tell(kind: str, awaited: Callable[[], Mapping[str, Exception | None]]) -> None:
    await asyncio.sleep(_FIRST_S)
    while True:
        for address, reason in awaited().items():
            said = "it has not answered" if reason is None else str(reason)
            log.warning("waiting for a server", extra={"kind": kind, "address": address, "reason": said})
        await asyncio.sleep(_AGAIN_S)
