"""What each chunk of the stream door holds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from functools import partial
from typing import TypeVar

from kdmesh.rpc.teachers.raw_chunk import GOOD_BYTES
from kdmesh.types import Handle

T = TypeVar("T")


async def chunks(data: memoryview, handle: Handle, *, as_fp8: bool) -> AsyncGenerator[memoryview, None]:
    """The data of every chunk, in order; with `as_fp8` as kdmesh.handles.fp8 encodes rows."""
    if not as_fp8:
        for begin in range(0, len(data), GOOD_BYTES):
            yield data[begin : begin + GOOD_BYTES]
        return
    rows_of, encode = await _finished(_fp8)
    step = rows_of(GOOD_BYTES, handle.cols) * handle.cols * handle.dtype.size_bytes
    for begin in range(0, len(data), step):
        rows = data[begin : begin + step]
        yield memoryview(await _finished(partial(encode, rows, cols=handle.cols, dtype=handle.dtype)))


def _fp8() -> tuple[Callable[[int, int], int], Callable[..., bytes]]:
    """Loads torch, which a teacher server may have had no use for so far."""
    from kdmesh.handles import fp8

    return fp8.rows_of, fp8.encode


async def _finished(call: Callable[[], T]) -> T:
    """What `call` returns in a thread. When this is cancelled, it is waited for all the same: it reads the slot."""
    running = asyncio.ensure_future(asyncio.to_thread(call))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait((running,))
        raise
