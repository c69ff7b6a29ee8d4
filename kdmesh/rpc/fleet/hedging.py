"""The same asked of a second server when the first takes long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def hedged(ask: Callable[[], Coroutine[Any, Any, T]], *, after_s: float) -> T:
    """What the first of at most two calls of `ask` returns; the other one is cancelled.

    The second is made `after_s` later, if the first has not ended by then. One that fails leaves it to the other.
    """
    attempts = [asyncio.create_task(ask())]
    try:
        await asyncio.wait(attempts, timeout=after_s)
        if not attempts[0].done():
            attempts.append(asyncio.create_task(ask()))
        while True:
            done, _ = await asyncio.wait(attempts, return_when=asyncio.FIRST_COMPLETED)
            for attempt in done:
                if attempt.exception() is None or len(attempts) == 1:
                    return attempt.result()
                attempts.remove(attempt)
    finally:
        for attempt in attempts:
            attempt.cancel()
        await asyncio.gather(*attempts, return_exceptions=True)
