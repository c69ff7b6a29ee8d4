"""The off-policy source keeps the teacher busy without changing what is trained on."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdmesh.errors import Unavailable
from kdmesh.tokens import digest
from kdmesh.types import TokenSequence
from kdmesh_trainer.sections.batch_config import BatchConfig
from kdmesh_trainer.sources.batches import StepBatch
from kdmesh_trainer.sources.off_policy import OffPolicySource
from kdmesh_trainer.sources.plan import StepPlanner
from kdmesh_trainer.sources.sft import SftSource

STEPS = 6


@dataclass(frozen=True)
class Rows:
    rows_RD: torch.Tensor
    weight_version: int = 1


class Pending:
    def __init__(self, teacher: FakeTeacher, sequences: tuple[TokenSequence, ...]) -> None:
        self.teacher, self.sequences, self.version = teacher, sequences, teacher.version

    def wait(self) -> Rows:
        self.teacher.waited.append(digest(self.sequences))
        if self.teacher.is_broken:
            raise Unavailable("the teacher is gone")
        labels = np.concatenate([s.labels for s in self.sequences])
        return Rows(torch.from_numpy(labels).unsqueeze(1).float(), weight_version=self.version)


@dataclass
class FakeTeacher:
    """Answers every position with the token it predicts; remembers what it was asked."""

    is_broken: bool = False
    version: int = 1
    asked: list[bytes] = field(default_factory=list)
    waited: list[bytes] = field(default_factory=list)
    pending: list[weakref.ref[Pending]] = field(default_factory=list)

    def submit(self, sequences: Sequence[TokenSequence]) -> Pending:
        self.asked.append(digest(sequences))
        pending = Pending(self, tuple(sequences))
        self.pending.append(weakref.ref(pending))
        return pending

    @property
    def num_outstanding(self) -> int:
        return len(self.asked) - len(self.waited)

    @property
    def num_alive(self) -> int:
        return sum(ref() is not None for ref in self.pending)


def data(number: int = 23) -> list[TokenSequence]:
    lengths = np.random.default_rng(0).integers(4, 40, number).tolist()
    return [
        TokenSequence(
            token_ids=np.arange(100 * index, 100 * index + length, dtype=np.int32),
            positions=np.arange(length // 2, length - 1, dtype=np.int32),
        )
        for index, length in enumerate(lengths)
    ]


def planner(*, rank: int = 0, ranks: int = 1, per_step: int = 5) -> StepPlanner:
    return StepPlanner(data(), BatchConfig(sequences=per_step, max_tokens=48), seed=3, rank=rank, ranks=ranks)


def source(
    teacher: FakeTeacher, *, prefetch: int, steps: int = STEPS, rank: int = 0, ranks: int = 1
) -> OffPolicySource:
    return OffPolicySource(planner(rank=rank, ranks=ranks), teacher, prefetch=prefetch, steps=steps)


Trained = list[tuple[int, int, int, list[bytes], list[float]]]


def train(batches: OffPolicySource, steps: range) -> Trained:
    """Everything that a trainer sees, step by step."""
    batches.start_at(steps.start)
    seen: Trained = []
    for _ in steps:
        batch = batches.next_batch()
        rows: list[float] = []
        for micro_batch in batch.micro_batches:
            if micro_batch.teacher is not None:
                rows += micro_batch.teacher.wait().rows_RD.flatten().tolist()
        groups = [digest(m.sequences) for m in batch.micro_batches]
        seen.append((batch.step, batch.num_tokens, batch.num_loss_tokens, groups, rows))
    return seen


@pytest.mark.parametrize("prefetch", [1, 2, 4, 100])
def test_what_is_trained_on_does_not_depend_on_prefetch(prefetch: int) -> None:
    serial, ahead = FakeTeacher(), FakeTeacher()
    assert train(source(ahead, prefetch=prefetch), range(STEPS)) == train(source(serial, prefetch=0), range(STEPS))
    assert ahead.asked == serial.asked == ahead.waited


@pytest.mark.parametrize("prefetch", [0, 1, 3, 7])
def test_prefetch_is_kept_full_and_never_exceeded(prefetch: int) -> None:
    teacher = FakeTeacher()
    batches = source(teacher, prefetch=prefetch, steps=100)
    batches.start_at(0)
    for _ in range(STEPS):
        for micro_batch in batches.next_batch().micro_batches:
            before = teacher.num_outstanding
            assert micro_batch.teacher is not None
            micro_batch.teacher.wait()
            # While this one is trained on, exactly `prefetch` are under way, also across the end of a step.
            assert teacher.num_outstanding == prefetch
            assert before in (0, prefetch)


@pytest.mark.parametrize("prefetch", [0, 3, 100])
@pytest.mark.parametrize("every", [1, 2, 4])
def test_rows_are_asked_of_the_weights_that_their_step_is_trained_with(every: int, prefetch: int) -> None:
    teacher, serial = FakeTeacher(), FakeTeacher()
    batches = OffPolicySource(planner(), teacher, prefetch=prefetch, steps=STEPS, teacher_update_every=every)
    batches.start_at(1)
    for step in range(1, STEPS):
        teacher.version += step % every == 0
        for micro_batch in batches.next_batch().micro_batches:
            assert micro_batch.teacher is not None
            assert micro_batch.teacher.wait().weight_version == teacher.version
    train(source(serial, prefetch=0), range(1, STEPS))
    assert teacher.asked == serial.asked


def test_between_two_updates_of_the_teacher_rows_are_asked_ahead_across_steps() -> None:
    teacher, serial = FakeTeacher(), FakeTeacher()
    batches = OffPolicySource(planner(), teacher, prefetch=100, steps=STEPS, teacher_update_every=3)
    batches.start_at(0)
    first = batches.next_batch().micro_batches[0].teacher
    assert first is not None
    first.wait()
    train(source(serial, prefetch=0), range(3))
    assert teacher.asked == serial.asked


def test_without_prefetch_nothing_is_asked_before_it_is_needed() -> None:
    teacher = FakeTeacher()
    batches = source(teacher, prefetch=0)
    batches.start_at(0)
    first, *rest = batches.next_batch().micro_batches
    assert (len(teacher.asked), len(rest) > 0) == (0, True)
    assert first.teacher is not None
    first.teacher.wait()
    assert teacher.asked == [digest(first.sequences)]


def test_nothing_is_asked_beyond_the_last_step() -> None:
    teacher, serial = FakeTeacher(), FakeTeacher()
    train(source(teacher, prefetch=50), range(STEPS))
    train(source(serial, prefetch=0), range(STEPS))
    assert teacher.asked == serial.asked


@pytest.mark.parametrize("restart", [1, 3, 5])
def test_a_restart_at_a_step_continues_exactly(restart: int) -> None:
    whole = train(source(FakeTeacher(), prefetch=3), range(STEPS))
    rest = train(source(FakeTeacher(), prefetch=3), range(restart, STEPS))
    assert rest == whole[restart:]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.integers(0, 5))
def test_ranks_train_on_the_same_global_steps(ranks: int, prefetch: int) -> None:
    alone = train(source(FakeTeacher(), prefetch=0), range(STEPS))
    shares = [train(source(FakeTeacher(), prefetch=prefetch, rank=r, ranks=ranks), range(STEPS)) for r in range(ranks)]
    for one, *parts in zip(alone, *shares, strict=True):
        assert {part[:3] for part in parts} == {one[:3]}
        assert sorted(row for part in parts for row in part[4]) == sorted(one[4])
        assert len({len(part[3]) for part in parts}) == 1


def test_a_rank_without_sequences_asks_for_nothing_and_still_steps() -> None:
    teacher = FakeTeacher()
    idle = OffPolicySource(planner(rank=1, ranks=2, per_step=1), teacher, prefetch=3, steps=STEPS)
    busy = OffPolicySource(planner(rank=0, ranks=2, per_step=1), FakeTeacher(), prefetch=3, steps=STEPS)
    for nothing, something in zip(train(idle, range(STEPS)), train(busy, range(STEPS)), strict=True):
        assert nothing[:3] == something[:3]
        assert nothing[3] == [digest([])]
    assert teacher.asked == []


def test_a_failed_answer_is_raised_where_it_is_waited_for() -> None:
    teacher = FakeTeacher()
    batches = source(teacher, prefetch=2)
    batches.start_at(0)
    first, second, *_ = batches.next_batch().micro_batches
    assert first.teacher is not None
    assert second.teacher is not None
    first.teacher.wait()
    teacher.is_broken = True
    with pytest.raises(Unavailable, match="the teacher is gone"):
        second.teacher.wait()


def test_close_drops_what_is_outstanding() -> None:
    teacher = FakeTeacher()
    batches = source(teacher, prefetch=4)
    batches.start_at(0)
    batch = batches.next_batch()
    assert batch.micro_batches[0].teacher is not None
    batch.micro_batches[0].teacher.wait()
    assert teacher.num_alive == 4
    batches.close()
    assert teacher.num_alive == 0


def test_rows_that_were_waited_for_belong_to_the_caller_alone() -> None:
    teacher = FakeTeacher()
    batches = source(teacher, prefetch=0)
    batches.start_at(0)
    batch: StepBatch = batches.next_batch()
    assert batch.micro_batches[0].teacher is not None
    rows = weakref.ref(batch.micro_batches[0].teacher.wait())
    assert rows() is None
    assert teacher.num_alive == 0


def test_sft_trains_on_the_same_steps_without_a_teacher() -> None:
    sft = SftSource(planner())
    sft.start_at(2)
    for seen in train(source(FakeTeacher(), prefetch=0), range(2, STEPS)):
        batch = sft.next_batch()
        assert (batch.step, batch.num_tokens, batch.num_loss_tokens) == seen[:3]
        assert [digest(m.sequences) for m in batch.micro_batches] == seen[3]
        assert all(m.teacher is None for m in batch.micro_batches)
