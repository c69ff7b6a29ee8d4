"""Draws episodes: the student's turns, one after the other, with what its environment answers between them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from functools import partial
from itertools import zip_longest
from typing import Any, Protocol, TypeVar

import numpy as np

from kdmesh.chats.chat_rows import Message
from kdmesh.errors import EnvironmentFailed
from kdmesh.rpc.background_loop import BackgroundLoop
from kdmesh.rpc.rollouts.pending_samples import PendingSamples
from kdmesh.sampling.seeds import seed_of
from kdmesh.types import FinishReason, Float32Array, Int32Array, PlacedImage, Sample, Sampling
from kdmesh_trainer.data.encoding.sides import Question
from kdmesh_trainer.sources.environment import Environment
from kdmesh_trainer.sources.order import StepPrompt
from kdmesh_trainer.sources.rollouts import Episode, EpisodeEnd, Turns

T = TypeVar("T")


class ArrivingTurn(Protocol):
    """A turn that was asked for. Dropping this aborts it."""

    def arrive(self) -> Coroutine[Any, Any, list[Sample]]:
        """The only sample. Raises as PendingSamples.wait."""
        ...


class TurnService(Protocol):
    """Where turns come from; a kdmesh.rpc.rollouts.pool.RolloutPool is one."""

    def submit(
        self,
        prompt_ids: Int32Array,
        sampling: Sampling,
        *,
        num_samples: int,
        seed: int,
        min_weight_version: int,
        images: tuple[PlacedImage, ...] = (),
    ) -> ArrivingTurn:
        """See RolloutService."""
        ...


class Episodes:
    """Has all episodes that are asked for under way at once.

    Which episodes there are depends on weights, seeds and what the environment says. The first turns are the samples
    that there would be without an environment. What fails on its way is drawn again by the rollout servers turn by
    turn; where they refuse a turn because their weights are too old, the episodes of its prompt are drawn again whole.
    """

    def __init__(
        self, service: TurnService, environment: Environment, *, max_tokens: int, deadline_s: float, max_calls: int
    ) -> None:
        """
        Args:
            max_tokens: of an episode with its prompt.
            deadline_s: longest time of one of the environment's answers.
            max_calls: answers that are worked out at once, each in a thread.
        """
        self._service = service
        self._environment = environment
        self._max_tokens = max_tokens
        self._deadline_s = deadline_s
        self._calls = asyncio.Semaphore(max_calls)
        self._loop = BackgroundLoop()

    def submit(
        self,
        prompt: StepPrompt,
        sampling: Sampling,
        *,
        num_samples: int,
        min_weight_version: int,
        on_sample: Callable[[Sample], None],
    ) -> PendingSamples:
        """Ask for episodes of one prompt, episode i drawn from its seed + i. Does not block.

        Args:
            sampling: of each turn.
            min_weight_version: oldest weights of any turn.
            on_sample: called in the background thread with each episode as it ends; must not block, nor raise.
        """
        draw = partial(self._service.submit, sampling=sampling, num_samples=1, min_weight_version=min_weight_version)

        async def episode(number: int) -> Sample:
            ended = await self._episode(_Growing(prompt), prompt.seed + number, draw, sampling)
            on_sample(ended)
            return ended

        return PendingSamples(self._loop.start(_all_of, [partial(episode, number) for number in range(num_samples)]))

    def close(self) -> None:
        """Abort what is under way. Calls of the environment end by themselves, and nobody waits for them."""
        self._loop.close()

    async def _episode(
        self, episode: _Growing, seed: int, draw: Callable[..., ArrivingTurn], sampling: Sampling
    ) -> Episode:
        conversation = await self._away(partial(self._environment.begin, episode.question), episode)
        while True:
            turn = draw(episode.token_ids(), seed=seed_of("turn", seed, episode.turns) if episode.turns else seed)
            [sample] = await turn.arrive()
            episode.drawn.append(sample)
            answer = partial(self._environment.answer, episode.question, conversation, sample, turns=episode.turns)
            answered = await self._away(partial(answer, ends=sampling.stop_token_ids), episode)
            if answered.end is not None:
                return episode.ended(answered.end, answered.messages)
            following = len(answered.token_ids) + sampling.max_new_tokens
            if len(episode.token_ids()) + following > self._max_tokens:
                return episode.ended(EpisodeEnd.LENGTH, answered.messages)
            conversation = answered.conversation
            episode.between.append(answered.token_ids)

    async def _away(self, call: Callable[[], T], episode: _Growing) -> T:
        """What `call` returns, in a thread, so that nobody else waits for it."""
        async with self._calls:
            try:
                async with asyncio.timeout(self._deadline_s):
                    return await asyncio.wrap_future(_in_thread(call))
            except TimeoutError:
                raise EnvironmentFailed(
                    f"{episode.question.chat.origin}: source.environment {self._environment.target}, turn "
                    f"{episode.turns}: no answer within source.environment.deadline_s, {self._deadline_s:g} s"
                ) from None


class _Growing:
    """An episode on its way."""

    def __init__(self, prompt: StepPrompt) -> None:
        assert prompt.question is not None  # prompts were read for an environment
        self.question: Question = prompt.question
        self._prompt_ids = prompt.token_ids
        self.drawn: list[Sample] = []
        self.between: list[Int32Array] = []  # what stands behind each turn that another follows

    @property
    def turns(self) -> int:
        """That the student has had."""
        return len(self.drawn)

    def token_ids(self) -> Int32Array:
        """[T] all so far, with the prompt."""
        return np.concatenate([self._prompt_ids, *(part for part, _ in self._parts())])

    def ended(self, end: EpisodeEnd, messages: tuple[Message, ...]) -> Episode:
        """With the turn that was drawn last."""
        parts = self._parts()
        edges = np.cumsum([0, *(len(part) for part, _ in parts)]).tolist()
        return Episode(
            token_ids=np.concatenate([part for part, _ in parts]),
            logprobs=np.concatenate([logprobs for _, logprobs in parts]),
            finish_reason=FinishReason.STOP if end is EpisodeEnd.ENVIRONMENT else FinishReason.LENGTH,
            min_weight_version=min(sample.min_weight_version for sample in self.drawn),
            max_weight_version=max(sample.max_weight_version for sample in self.drawn),
            turns=Turns(spans=tuple(zip(edges[:-1:2], edges[1::2], strict=True)), end=end),
            messages=messages,
        )

    def _parts(self) -> list[tuple[Int32Array, Float32Array]]:
        """Turns and what stands between them, in turn: ids, and log-probabilities where they were drawn, else 0."""
        turns = [(sample.token_ids, sample.logprobs) for sample in self.drawn]
        others = [(token_ids, np.zeros(len(token_ids), np.float32)) for token_ids in self.between]
        return [part for pair in zip_longest(turns, others) for part in pair if part is not None]


async def _all_of(works: Sequence[Callable[[], Coroutine[Any, Any, T]]]) -> list[T]:
    """What all of them return, in order, done at once; the first error ends the others."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work()) for work in works]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


def _in_thread(call: Callable[[], T]) -> Future[T]:
    """What `call` returns in a thread of its own, which keeps no process alive."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()  # so that whoever gives up waiting leaves it to the thread to end it

    def work() -> None:
        try:
            future.set_result(call())
        except Exception as error:  # noqa: BLE001 - whoever waits is told
            future.set_exception(error)

    threading.Thread(target=work, name="environment", daemon=True).start()
    return future
