"""A slot's memory, registered with CUDA, is copied by the device itself."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu.handles import register
from kdmesh.handles.slab.memory import create_segment

pytestmark = pytest.mark.gpu


def test_a_slot_that_is_registered_gives_its_bytes_without_a_wait(gpu: torch.device) -> None:
    segment = create_segment(2**20)
    slot = torch.frombuffer(segment.writable, dtype=torch.uint8)
    slot.copy_(torch.arange(len(slot), dtype=torch.int64) % 251)
    assert register(slot, 0) == ""
    try:
        assert slot.is_pinned()
        torch.cuda.set_sync_debug_mode("error")
        there = slot.to(gpu, non_blocking=True)
        torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(there.cpu(), slot)
        there.add_(1)
        slot.copy_(there, non_blocking=True)
        torch.cuda.synchronize()
        assert torch.equal(slot, there.cpu())
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.cudart().cudaHostUnregister(slot.data_ptr())  # type: ignore[no-untyped-call]
        del slot
        segment.close()
