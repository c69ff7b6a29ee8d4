"""New memory for slots whose own is abandoned, or worn."""

from __future__ import annotations

import asyncio
import logging

from kdmesh.handles.slab.ledger import Ledger
from kdmesh.handles.slab.memory import Segment, SegmentWriter, create_segment_in_thread

log = logging.getLogger(__name__)


class Renewal:
    """Replaces memory one slot at a time; belongs to the store's event loop.

    Attributes:
        is_due: to be set whenever a slot may want new memory.
    """

    def __init__(self, ledger: Ledger, slots: list[Segment], writer: SegmentWriter | None) -> None:
        """`slots` are the segments by slot, which this replaces in place; all of one size."""
        self.is_due = asyncio.Event()
        self._ledger = ledger
        self._slots = slots
        self._writer = writer
        self._turn = asyncio.Lock()
        self._num_wears = 0

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            await self.is_due.wait()
            self.is_due.clear()
            await self._renew()

    async def replace_all(self) -> None:
        """The writer has changed, and cannot map what was made before: see SlabStore.replace_memory."""
        self._num_wears += 1
        self._ledger.wear_out()
        await self._renew()

    def slot_returned(self) -> None:
        """A slot that was lent may be back; if its memory is worn, it wants another."""
        if self._num_wears:
            self.is_due.set()

    async def _renew(self) -> None:
        async with self._turn:
            while (slot := self._ledger.to_renew()) is not None:
                wears = self._num_wears
                try:
                    segment = await create_segment_in_thread(self._slots[slot].size_bytes, self._writer)
                except OSError as error:
                    log.warning("slot stays abandoned", extra={"slot": slot, "error": str(error)})
                    return  # until the next sweep
                # Memory that was made for the writer before this one is of no use.
                if wears == self._num_wears and self._ledger.renew(slot):
                    segment, self._slots[slot] = self._slots[slot], segment
                if self._writer is not None:
                    self._writer.drop(segment)
                segment.close()
