"""What the ranks sampled apart is put together as one rank alone would have sampled it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdmesh.errors import EngineFailure, ModelMismatch
from kdmesh.tokens import digest
from kdmesh.types import FinishReason, Int32Array, PlacedImage, Sample, Sampling
from kdmesh_trainer.data.encoding.sides import Prompt
from kdmesh_trainer.sources.order import PromptOrder
from kdmesh_trainer.sources.rollouts import Rollout, figures_of
from kdmesh_trainer.sources.sampler import Sampler

PROMPTS = [
    Prompt(token_ids=np.arange(100 * number, 100 * number + 1 + number % 5, dtype=np.int32)) for number in range(11)
]
LONGEST = 9


class Answers:
    """Samples that follow from prompt and seed."""

    def __init__(self, *, version: int = 3, refuses: int = 0, returns: int = 0) -> None:
        self.version = version
        self.returns = returns  # servers
        self.refuses = refuses  # that many requests
        self.asked = 0

    is_done = True

    def wait(self, pending: Iterable[Answer]) -> bool:
        """False once for each server that came back."""
        self.returns -= 1
        return self.returns < 0

    def note_weights(self, version: int, *, behind: Collection[str]) -> None:
        """Nothing depends on it."""

    def outdated(self) -> frozenset[str]:
        return frozenset({"b", "a"})

    def submit(
        self,
        prompt_ids: Int32Array,
        sampling: Sampling,
        *,
        num_samples: int,
        seed: int,
        min_weight_version: int,
        images: tuple[PlacedImage, ...] = (),
        on_sample: Callable[[Sample], None],
    ) -> Answer:
        self.asked += 1
        self.refuses -= 1
        if self.refuses >= 0:
            return Answer([], refusal=f"{min_weight_version} is wanted")
        samples = [self._sample(prompt_ids, seed + i) for i in range(num_samples)]
        for sample in samples:
            on_sample(sample)
        return Answer(samples)

    def _sample(self, prompt_ids: Int32Array, seed: int) -> Sample:
        random = np.random.default_rng([seed, *prompt_ids.tolist()])
        length = int(random.integers(1, LONGEST + 1))
        return Sample(
            token_ids=random.integers(0, 2**31 - 1, length).astype(np.int32),
            logprobs=-random.random(length).astype(np.float32),
            finish_reason=FinishReason.LENGTH if length == LONGEST else FinishReason.STOP,
            min_weight_version=self.version,
            max_weight_version=self.version,
        )


class Answer:
    is_done = True

    def __init__(self, samples: list[Sample], *, refusal: str = "") -> None:
        self._samples = samples
        self._refusal = refusal

    def wait(self) -> list[Sample]:
        if self._refusal:
            raise ModelMismatch(self._refusal)
        return self._samples


def sampler(service: Answers, *, rank: int = 0, ranks: int = 1, per_step: int = 5, each: int = 2) -> Sampler:
    order = PromptOrder(PROMPTS, per_step=per_step, seed=1)
    sampling = Sampling(max_new_tokens=LONGEST)
    return Sampler(order, service, sampling=sampling, samples_per_prompt=each, rank=rank, ranks=ranks)


def facts(rollouts: list[Rollout]) -> list[Any]:
    return [
        (digest([r.sequence]), r.sequence.positions.tolist(), r.logprobs.tolist(), r.is_cut_off, r.weight_version)
        for r in rollouts
    ]


@settings(max_examples=60)
@given(ranks=st.integers(1, 6), per_step=st.integers(1, 7), each=st.integers(1, 4), step=st.integers(0, 5))
def test_all_ranks_assemble_what_one_alone_would_sample(ranks: int, per_step: int, each: int, step: int) -> None:
    members = [sampler(Answers(), rank=rank, ranks=ranks, per_step=per_step, each=each) for rank in range(ranks)]
    for member in members:
        member.ask(step, min_weight_version=3)
        assert member.is_here(step)
    shares = [member.collect(step) for member in members]
    assembled = [facts(member.assemble(step, shares)) for member in members]
    alone = sampler(Answers(), per_step=per_step, each=each)
    alone.ask(step, min_weight_version=3)
    expected = facts(alone.assemble(step, [alone.collect(step)]))
    assert len(expected) == per_step * each
    assert all(one == expected for one in assembled)


def test_every_drawn_token_is_a_label_and_nothing_else_is() -> None:
    alone = sampler(Answers())
    alone.ask(0, min_weight_version=3)
    order = PromptOrder(PROMPTS, per_step=5, seed=1)
    rollouts = alone.assemble(0, [alone.collect(0)])
    prompts = [prompt.token_ids for prompt in order.of_step(0) for _ in range(2)]
    for rollout, prompt in zip(rollouts, prompts, strict=True):
        ids = rollout.sequence.token_ids.tolist()
        assert ids == prompt.tolist() + rollout.sequence.labels.tolist()
        assert len(rollout.logprobs) == rollout.sequence.num_rows


def test_only_what_was_refused_is_asked_again() -> None:
    service = Answers(refuses=2)
    alone = sampler(service)
    alone.ask(0, min_weight_version=3)
    share = alone.collect(0)
    assert share.refusal == "3 is wanted"
    assert share.lengths == ()
    alone.ask_again(0)
    assert service.asked == 5 + 2
    undisturbed = sampler(Answers())
    undisturbed.ask(0, min_weight_version=3)
    assert facts(alone.assemble(0, [alone.collect(0)])) == facts(undisturbed.assemble(0, [undisturbed.collect(0)]))


def test_a_server_that_came_back_is_told_of_and_nothing_is_asked_twice() -> None:
    service = Answers(returns=1)
    alone = sampler(service)
    alone.ask(0, min_weight_version=3)
    share = alone.collect(0)
    assert (share.is_whole, share.refusal, share.lengths, share.outdated) == (False, "", (), ("a", "b"))
    alone.ask_again(0)
    assert service.asked == 5
    assert alone.collect(0).is_whole  # another rank may have had nothing
    assert len(alone.assemble(0, [alone.collect(0)])) == 10


def test_a_token_that_changed_on_its_way_is_noticed() -> None:
    alone = sampler(Answers())
    alone.ask(0, min_weight_version=3)
    share = alone.collect(0)
    changed = bytes([share.token_ids[0] ^ 1]) + share.token_ids[1:]
    with pytest.raises(EngineFailure, match="the tokens that rank 0 sampled are not those"):
        alone.assemble(0, [replace(share, token_ids=changed)])


def test_drawing_takes_until_the_last_sample_whenever_it_is_collected(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))
    alone = sampler(Answers())
    alone.ask(0, min_weight_version=3)  # five prompts at 0 to 4, their ten samples at 5 to 14
    for _ in range(100):
        time.perf_counter()
    assert alone.collect(0).drawing_s == 14
    alone.ask(1, min_weight_version=3)  # at 117 to 121, samples at 122 to 131
    alone._complete_s = 124  # as if the last sample of the first step had come meanwhile
    assert alone.collect(1).drawing_s == 7


def test_figures_are_over_all_samples() -> None:
    alone = sampler(Answers(), per_step=7, each=4)
    alone.ask(0, min_weight_version=3)
    rollouts = alone.assemble(0, [alone.collect(0)])
    lengths = [rollout.sequence.num_rows for rollout in rollouts]
    figures = figures_of(rollouts, [0, 1] * 14, waits_s=[1.0, 3.0], drawing_s=4.0)
    assert figures.sampling_s == 4.0
    assert figures.response_tokens_mean == sum(lengths) / 28
    assert figures.response_tokens_max == max(lengths)
    assert figures.cut_off_fraction == lengths.count(LONGEST) / 28 > 0
    assert (figures.staleness_steps_mean, figures.staleness_steps_max, figures.sampling_wait_s) == (0.5, 1, 2.0)
