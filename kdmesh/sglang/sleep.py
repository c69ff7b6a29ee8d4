"""Lets SGLang give memory of its GPUs back, and take it again."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from kdmesh.errors import EngineFailure
from kdmesh.sglang.config import SglangModel
from kdmesh.types import SleepTag

# It is told by the next turn of SGLang's loop, or when prefixes have been copied to the host.
_IDLE_S = 60.0


def sleep_refusal(config: SglangModel) -> str:
    """Why it cannot, as a sentence; empty: it can."""
    return "" if config.sleep else "this engine cannot sleep; start the server with engine.sleep: true"


async def release(engine: Any, tags: Set[SleepTag]) -> None:
    """Return when a `sglang.Engine` that has answered everything has given these back; all prefixes are forgotten.

    Raises:
        EngineFailure: it does not become idle.
    """
    from sglang.srt.managers.io_struct import ReleaseMemoryOccupationReqInput

    await until_idle(engine)
    request = ReleaseMemoryOccupationReqInput(tags=sorted(tags))
    await engine.tokenizer_manager.release_memory_occupation(request)


async def until_idle(engine: Any) -> None:
    """Return when a `sglang.Engine` that has answered everything knows it, and has forgotten all prefixes.

    SGLang 0.5.23 answers first and puts its last batch away in the next turn of its loop. A release that comes in
    between ends its processes, and new weights are refused.

    Raises:
        EngineFailure: it does not become idle.
    """
    flushed = await engine.tokenizer_manager.flush_cache(timeout_s=_IDLE_S)
    if not flushed.success:
        raise EngineFailure(f"SGLang is not idle although it has answered everything: {flushed.message}")


async def resume(engine: Any, tags: Set[SleepTag]) -> None:
    """Return when it has taken these again, which it had given back."""
    from sglang.srt.managers.io_struct import ResumeMemoryOccupationReqInput

    request = ResumeMemoryOccupationReqInput(tags=sorted(tags))
    await engine.tokenizer_manager.resume_memory_occupation(request)
