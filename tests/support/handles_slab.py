"""A small slab with a broker, and answers to fill it with."""

from __future__ import annotations

import contextlib
import random
from collections.abc import AsyncIterator
from pathlib import Path

from kdmesh.handles.slab.limits import SlabLimits
from kdmesh.handles.slab.memory import SegmentWriter
from kdmesh.handles.slab.store import SlabStore
from kdmesh.types import DType, Handle
from tests.support.handles_consumer import digest

SLOT_BYTES = 64 * 1024


@contextlib.asynccontextmanager
async def slab(
    tmp_path: Path,
    *,
    slots: int = 2,
    lease_s: float = 60,
    claim_s: float = 60,
    max_abandoned: int = 1,
    writer: SegmentWriter | None = None,
) -> AsyncIterator[SlabStore]:
    """A slab that any one session may have whole."""
    limits = SlabLimits(
        slots=slots,
        slot_bytes=SLOT_BYTES,
        slots_per_session=slots,
        lease_s=lease_s,
        claim_s=claim_s,
        max_abandoned=max_abandoned,
    )
    async with SlabStore(limits, socket_path=tmp_path / "broker.sock", writer=writer) as store:
        yield store


def answer(store: SlabStore, session: bytes, seed: int) -> tuple[Handle, str]:
    """A handle to a whole slot of random bytes, and their digest."""
    lease = store.try_acquire(session)
    assert lease is not None
    lease.buffer[:] = random.Random(seed).randbytes(len(lease.buffer))
    expected = digest(lease.buffer)
    return store.publish(lease, rows=64, cols=SLOT_BYTES // 128, dtype=DType.BFLOAT16), expected


def states(store: SlabStore) -> dict[str, int]:
    """Slots by state, states that no slot is in left out."""
    return {state.value: n for state, n in store.snapshot().slots.items() if n}
