"""Lets SGLang give memory of its GPUs back, and take it again."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from kdmesh.sglang.config import SglangModel
from kdmesh.types import SleepTag


def sleep_refusal(config: SglangModel) -> str:
    """Why it cannot, as a sentence; empty: it can."""
    return "" if config.sleep else "this engine cannot sleep; start the server with engine.sleep: true"


async def release(engine: Any, tags: Set[SleepTag]) -> None:
    """Return when an idle `sglang.Engine` has given these back; with the cache go the prefixes in it."""
    from sglang.srt.managers.io_struct import ReleaseMemoryOccupationReqInput

    request = ReleaseMemoryOccupationReqInput(tags=sorted(tags))
    await engine.tokenizer_manager.release_memory_occupation(request)


async def resume(engine: Any, tags: Set[SleepTag]) -> None:
    """Return when it has taken these again, which it had given back."""
    from sglang.srt.managers.io_struct import ResumeMemoryOccupationReqInput

    request = ResumeMemoryOccupationReqInput(tags=sorted(tags))
    await engine.tokenizer_manager.resume_memory_occupation(request)
