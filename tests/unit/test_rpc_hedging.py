"""The same asked twice: what comes first counts, and nothing of the other is left."""

from __future__ import annotations

import asyncio

import pytest

from kdmesh.errors import EngineFailure
from kdmesh.rpc.fleet.hedging import hedged


class Asked:
    """Calls whose outcome the test decides."""

    def __init__(self, *prepared: str | Exception) -> None:
        self.calls: list[asyncio.Future[str]] = []
        self._prepared = list(prepared)

    async def __call__(self) -> str:
        call = asyncio.get_running_loop().create_future()
        self.calls.append(call)
        if self._prepared:
            one = self._prepared.pop(0)
            if isinstance(one, Exception):
                raise one
            return one
        return await call

    async def until(self, count: int) -> None:
        while len(self.calls) < count:  # noqa: ASYNC110 - nothing else tells of it
            await asyncio.sleep(0)


async def test_a_quick_answer_is_asked_for_once() -> None:
    ask = Asked("quick")
    assert await hedged(ask, after_s=10) == "quick"
    assert len(ask.calls) == 1


@pytest.mark.parametrize("winner", [0, 1])
async def test_the_first_answer_counts_and_the_other_call_is_cancelled(winner: int) -> None:
    ask = Asked()
    answer = asyncio.create_task(hedged(ask, after_s=0))
    await ask.until(2)
    ask.calls[winner].set_result(str(winner))
    assert await answer == str(winner)
    assert ask.calls[1 - winner].cancelled()


async def test_one_that_fails_leaves_it_to_the_other() -> None:
    ask = Asked()
    answer = asyncio.create_task(hedged(ask, after_s=0))
    await ask.until(2)
    ask.calls[0].set_exception(EngineFailure("first"))
    await asyncio.sleep(0)
    assert not answer.done()
    ask.calls[1].set_result("second")
    assert await answer == "second"


async def test_an_early_failure_is_not_asked_again() -> None:
    ask = Asked(EngineFailure("refused"))
    with pytest.raises(EngineFailure, match="refused"):
        await hedged(ask, after_s=10)
    assert len(ask.calls) == 1


async def test_whoever_gives_up_cancels_both() -> None:
    ask = Asked()
    answer = asyncio.create_task(hedged(ask, after_s=0))
    await ask.until(2)
    answer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await answer
    assert all(call.cancelled() for call in ask.calls)
