"""Whose turn it is: shares, places, and leaving at any time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kdmesh.serving.jobs.fair_queue import FairQueue, Standing

QUANTUM = 16
BATCH = 100


@dataclass(frozen=True, slots=True, eq=False)
class Ask:
    """A request that waits."""

    job: str
    num_tokens: int
    session: bytes = b"only"


def queue_of(*shapes: tuple[str, int], standings: Mapping[str, Standing] | None = None) -> FairQueue[Ask]:
    known = standings or {}
    queue = FairQueue[Ask](lambda job: known.get(job, Standing()), quantum_tokens=QUANTUM)
    for job, num_tokens in shapes:
        queue.push(Ask(job, num_tokens))
    return queue


def take(
    queue: FairQueue[Ask], max_tokens: float = BATCH, can_start: Callable[[Ask], bool] = lambda ask: True
) -> list[Ask]:
    return [ask for ask, _ in queue.take(max_tokens, can_start, lambda ask: True)]


def taken(queue: FairQueue[Ask], max_tokens: float = BATCH, without: Sequence[str] = ()) -> list[tuple[str, int]]:
    return [(ask.job, ask.num_tokens) for ask in take(queue, max_tokens, lambda ask: ask.job not in without)]


def weights(**by_job: float) -> dict[str, Standing]:
    return {job: Standing(weight=weight) for job, weight in by_job.items()}


def test_jobs_take_turns_by_tokens_not_by_requests() -> None:
    queue = queue_of(*[("long", QUANTUM)] * 4, *[("short", QUANTUM // 4)] * 16)
    assert Counter(job for job, _ in taken(queue, QUANTUM * 4)) == {"long": 2, "short": 8}


def test_weight_multiplies_what_a_turn_gives() -> None:
    queue = queue_of(*[("a", 4), ("b", 4)] * 40, standings=weights(a=3, b=1))
    assert Counter(job for job, _ in taken(queue, QUANTUM * 4)) == {"a": 12, "b": 4}


def test_weight_that_changes_counts_from_the_next_turn() -> None:
    standings = weights(a=1, b=1)
    queue = queue_of(*[("a", 4), ("b", 4)] * 99, standings=standings)
    assert Counter(job for job, _ in taken(queue, QUANTUM * 4)) == {"a": 8, "b": 8}
    standings["a"] = Standing(weight=3)
    assert Counter(job for job, _ in taken(queue, QUANTUM * 4)) == {"a": 12, "b": 4}


def test_sessions_of_a_job_take_turns_and_each_is_first_in_first_out() -> None:
    queue = FairQueue[Ask]()
    asks = [Ask("job", 1 + index, session) for index, session in enumerate([b"a", b"a", b"a", b"b", b"b", b"c"])]
    for ask in asks:
        queue.push(ask)
    order = [asks[index] for index in (0, 3, 5, 1, 4, 2)]
    assert list(queue.of_job("job")) == order
    assert take(queue) == order
    assert (queue.num_tokens, queue.num_requests, queue.jobs()) == (0, 0, ())


def test_first_of_many_is_found_without_a_list_of_them() -> None:
    queue = FairQueue[Ask]()
    asks = [Ask("job", 1, session) for session in (b"a", b"a", b"b")]
    for ask in asks:
        queue.push(ask)
    assert next(queue.of_job("job")) is asks[0]
    assert list(queue.of_job("nobody")) == []


def test_turns_go_on_where_the_last_batch_ended() -> None:
    queue = queue_of(*[("a", QUANTUM), ("b", QUANTUM)] * 2, ("c", QUANTUM))
    assert [taken(queue, QUANTUM)[0][0] for _ in range(5)] == ["a", "b", "c", "a", "b"]


def test_a_turn_that_the_end_of_a_batch_cut_short_goes_on() -> None:
    queue = queue_of(*[("a", QUANTUM // 2)] * 4, *[("b", QUANTUM // 2)] * 4)
    jobs = [taken(queue, QUANTUM // 2)[0][0] for _ in range(8)]
    assert jobs == ["a", "a", "b", "b", "a", "a", "b", "b"]


def test_large_request_gets_its_turn_among_any_number_of_small_ones() -> None:
    queue = queue_of(("large", BATCH))
    batches = 0
    while ("large", BATCH) not in taken(queue):
        for _ in range(BATCH):
            queue.push(Ask("small", 1))
        batches += 1
    assert batches <= math.ceil(BATCH / QUANTUM) + 1


def test_one_small_request_waits_for_a_turn_of_each_job_and_not_for_their_queues() -> None:
    queue = queue_of(*[(f"flood-{index}", QUANTUM) for index in range(5) for _ in range(50)])
    queue.push(Ask("small", 1))
    assert "small" in [job for job, _ in taken(queue, QUANTUM * 6)]


def test_job_that_cannot_start_keeps_its_place_and_stops_nobody() -> None:
    queue = queue_of(("a", 9), ("b", 9), ("b", 9), ("b", 9))
    assert taken(queue, 18, without=["a"]) == [("b", 9), ("b", 9)]
    assert taken(queue, 18) == [("a", 9), ("b", 9)]


def test_session_that_cannot_start_stops_no_other_of_its_job() -> None:
    queue = FairQueue[Ask]()
    stuck, free = Ask("job", 9, b"stuck"), Ask("job", 9, b"free")
    queue.push(stuck)
    queue.push(free)
    assert take(queue, can_start=lambda ask: ask is not stuck) == [free]
    assert take(queue) == [stuck]


def test_job_that_could_not_start_for_long_saves_no_credit() -> None:
    queue = queue_of(*[("blocked", 4)] * 400, *[("other", 4)] * 400)
    for _ in range(20):
        assert set(taken(queue, 40, without=["blocked"])) == {("other", 4)}
    after = Counter(job for _ in range(4) for job, _ in taken(queue, 40))
    assert after["blocked"] <= after["other"] + 2 * QUANTUM // 4  # of its turn, and of where the count ends


def test_job_whose_requests_no_batch_had_room_for_saves_no_more_than_a_batch() -> None:
    queue = queue_of(*[("large", 60)] * 30, *[("small", 4)] * 600)
    for _ in range(20):
        assert set(taken(queue, 40)) == {("small", 4)}
    tokens: Counter[str] = Counter()
    for job, num_tokens in taken(queue, 1000):
        tokens[job] += num_tokens
    assert abs(tokens["large"] - tokens["small"]) <= 40 + QUANTUM + 60


def test_what_start_refuses_is_passed_over() -> None:
    queue = queue_of(("a", 9), ("b", 9))
    batch = queue.take(BATCH, lambda ask: True, lambda ask: None if ask.job == "a" else ask.job)
    assert [started for _, started in batch] == ["b"]
    assert queue.jobs() == ("a",)


def test_higher_class_goes_first_and_lower_ones_fill_the_room() -> None:
    standings = {"urgent": Standing(rank=0), "idle": Standing(weight=99, rank=1)}
    queue = queue_of(*[("idle", 9)] * 30, *[("urgent", 30)] * 4, standings=standings)
    assert taken(queue) == [("urgent", 30)] * 3 + [("idle", 9)]
    assert taken(queue) == [("urgent", 30)] + [("idle", 9)] * 7


def test_share_is_the_weight_among_those_that_wait() -> None:
    queue = queue_of(("a", 1), ("b", 1), standings=weights(a=2, b=1, c=1))
    assert queue.share("a") == pytest.approx(2 / 3)
    assert queue.share("c") == pytest.approx(1 / 4)


def test_what_is_ahead_of_a_job_is_its_share_and_not_the_whole_queue() -> None:
    standings = {"a": Standing(2), "urgent": Standing(rank=-1), "idle": Standing(rank=1)}
    queue = queue_of(("a", 100), ("flood", 10_000), ("few", 10), ("idle", 1000), standings=standings)
    assert queue.tokens_until("a", 100) == 100 + 50 + 10
    assert queue.tokens_until("new", 30) == 30 + 60 + 30 + 10
    queue.push(Ask("urgent", 70))
    assert queue.tokens_until("a", 100) == 100 + 50 + 10 + 70


SHAPES = st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from([b"x", b"y"]), st.integers(1, BATCH)), max_size=40)
WEIGHTS = st.fixed_dictionaries({job: st.sampled_from([0.25, 1.0, 1.5, 4.0]) for job in "abcd"})


@given(SHAPES, WEIGHTS)
def test_everything_is_taken_once_in_order_and_no_batch_is_too_large(
    shapes: list[tuple[str, bytes, int]], by_job: dict[str, float]
) -> None:
    queue = queue_of(standings=weights(**by_job))
    asks = [Ask(job, num_tokens, session) for job, session, num_tokens in shapes]
    for ask in asks:
        queue.push(ask)
    seen: list[Ask] = []
    while queue.num_requests:
        batch = take(queue)
        assert batch
        assert sum(ask.num_tokens for ask in batch) <= BATCH
        seen += batch
    assert len(seen) == len(asks)
    for job in "abcd":
        for session in (b"x", b"y"):
            mine = [ask for ask in asks if (ask.job, ask.session) == (job, session)]
            assert [ask for ask in seen if (ask.job, ask.session) == (job, session)] == mine


@given(SHAPES, st.integers(1, BATCH), st.sets(st.sampled_from("abcd")))
def test_no_room_is_left_that_something_could_use(
    shapes: list[tuple[str, bytes, int]], max_tokens: int, without: set[str]
) -> None:
    queue = queue_of()
    for job, session, num_tokens in shapes:
        queue.push(Ask(job, num_tokens, session))
    batch = take(queue, max_tokens, lambda ask: ask.job not in without)
    left = max_tokens - sum(ask.num_tokens for ask in batch)
    heads = [queue.of_session(job, s)[:1] for job in set("abcd") - without for s in (b"x", b"y")]
    assert all(head[0].num_tokens > left for head in heads if head)


def served_by_weight(
    standings: Mapping[str, Standing], size: Callable[[str, int], int], num_batches: int
) -> list[dict[str, float]]:
    """Tokens that jobs which always wait were given after each batch, divided by their weights."""
    queue = queue_of(standings=standings)
    number = 0
    given_tokens: Counter[str] = Counter()
    after = []
    for _ in range(num_batches):
        for job in standings:
            while queue.tokens_of(job) < 2 * BATCH:
                number += 1
                queue.push(Ask(job, size(job, number)))
        for ask in take(queue):
            given_tokens[ask.job] += ask.num_tokens
        after.append({job: given_tokens[job] / standing.weight for job, standing in standings.items()})
    return after


BACKLOGGED = st.lists(st.sampled_from([0.25, 1.0, 1.5, 4.0]), min_size=2, max_size=5).map(
    lambda by_index: weights(**{str(index): weight for index, weight in enumerate(by_index)})
)


@settings(max_examples=50)
@given(BACKLOGGED, st.sampled_from([1, 2, 5, 10, 25, 50, 100]), st.integers(1, 40))
def test_shares_are_within_one_quantum_and_a_request_of_the_weights(
    standings: dict[str, Standing], size: int, num_batches: int
) -> None:
    lightest = min(standing.weight for standing in standings.values())
    for served in served_by_weight(standings, lambda job, number: size, num_batches):
        assert max(served.values()) - min(served.values()) <= QUANTUM + size / lightest


@settings(max_examples=50)
@given(BACKLOGGED, st.lists(st.integers(1, BATCH), min_size=5, max_size=5), st.integers(1, 40))
def test_no_job_gets_less_than_its_share_of_what_its_requests_can_fill(
    standings: dict[str, Standing], largest: list[int], num_batches: int
) -> None:
    after = served_by_weight(standings, lambda job, number: 1 + number * 7919 % largest[int(job)], num_batches)
    total = sum(standing.weight for standing in standings.values())
    for job, standing in standings.items():
        usable = num_batches * (BATCH - largest[int(job)])
        assert after[-1][job] >= usable / total - QUANTUM - 2 * BATCH / standing.weight


@pytest.mark.parametrize(("large", "small", "weight"), [(40, 1, 1), (60, 4, 1), (30, 1, 2)])
def test_large_requests_get_their_share_beside_small_ones_that_fill_every_gap(
    large: int, small: int, weight: float
) -> None:
    sizes = {"large": large, "small": small}
    after = served_by_weight(weights(large=weight, small=1), lambda job, number: sizes[job], num_batches=60)
    assert after[-1]["large"] == pytest.approx(after[-1]["small"], rel=0.05)


class Leaving(RuleBasedStateMachine):
    """Requests come, start and leave in any order; the queue's books always agree with a plain list."""

    @initialize()
    def begin(self) -> None:
        self.queue = queue_of(standings={"b": Standing(2), "c": Standing(rank=1)})
        self.waiting: list[Ask] = []

    @rule(job=st.sampled_from("abc"), session=st.sampled_from([b"x", b"y"]), num_tokens=st.integers(1, BATCH))
    def join(self, job: str, session: bytes, num_tokens: int) -> None:
        ask = Ask(job, num_tokens, session)
        self.queue.push(ask)
        self.waiting.append(ask)

    @rule(index=st.integers(0, 99))
    def leave(self, index: int) -> None:
        assume(index < len(self.waiting))
        ask = self.waiting.pop(index)
        assert ask in self.queue
        self.queue.remove(ask)
        assert ask not in self.queue

    @rule(max_tokens=st.integers(1, BATCH), without=st.sampled_from("abc"))
    def start(self, max_tokens: int, without: str) -> None:
        for ask in take(self.queue, max_tokens, lambda ask: ask.job != without):
            assert ask.job != without
            self.waiting.remove(ask)

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "queue"):
            return
        assert self.queue.num_requests == len(self.waiting)
        assert self.queue.num_tokens == sum(ask.num_tokens for ask in self.waiting)
        assert set(self.queue.everything()) == set(self.waiting)
        assert set(self.queue.jobs()) == {ask.job for ask in self.waiting}
        for job in "abc":
            assert set(self.queue.of_job(job)) == {ask for ask in self.waiting if ask.job == job}


Leaving.TestCase.settings = settings(max_examples=30, stateful_step_count=30)
test_requests_may_leave_at_any_time = Leaving.TestCase
