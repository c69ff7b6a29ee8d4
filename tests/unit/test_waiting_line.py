"""What a caller is told to wait, against what it would have waited on a clock of our own."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from dataclasses import dataclass

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kdmesh.errors import Unavailable
from kdmesh.serving.jobs.config import JobTerms
from kdmesh.serving.jobs.fair_queue import FairQueue
from kdmesh.serving.jobs.table import JobTable, Shortage
from kdmesh.serving.jobs.waiting_line import WaitingLine

BATCH, TOKENS_PER_S, REQUEST = 400, 1000.0, 40


@dataclass(frozen=True, slots=True, eq=False)
class Ask:
    """A request that waits."""

    job: str
    num_tokens: int
    arrived_s: float = 0.0
    session: bytes = b"only"


class Server:
    """A line and an engine of a constant speed, on a clock of their own."""

    def __init__(self, terms: Mapping[str, JobTerms], *, max_tokens: int = 10**6) -> None:
        self.now_s = 0.0
        self.jobs = JobTable(JobTerms(), terms, clock=lambda: self.now_s)
        self.line = WaitingLine[Ask](self.jobs, max_tokens=max_tokens, batch_tokens=BATCH, clock=lambda: self.now_s)
        self.line.computed(BATCH, BATCH / TOKENS_PER_S)  # its speed is known

    def join(self, job: str, num_tokens: int = REQUEST) -> Ask:
        ask = Ask(job, num_tokens, self.now_s)
        self.line.join([ask])
        return ask

    def fill(self, job: str, tokens: int) -> None:
        while self.line.queue.tokens_of(job) < tokens:
            self.join(job)

    def step(self) -> list[Ask]:
        """The next batch; when none can start, time passes until one can."""
        batch = [ask for ask, _ in self.line.take(BATCH, lambda ask: True, lambda ask: True)]
        tokens = sum(ask.num_tokens for ask in batch)
        self.now_s += tokens / TOKENS_PER_S if batch else 0.05
        for ask in batch:
            self.jobs.ended(ask.job, ask.num_tokens)
        return batch

    def seconds_until_started(self, ask: Ask, *, others: Mapping[str, int]) -> float:
        """While the others refill their queues."""
        began_s = self.now_s
        while True:
            for job, tokens in others.items():
                self.fill(job, tokens)
            started_s = self.now_s
            if ask in self.step():
                return started_s - began_s


def close(told_s: float, true_s: float, *, others: int = 0) -> bool:
    """Within a factor of two, but for the batch that is under way, and for the turns of `others`.

    What is told divides the engine as if it were a fluid, and jobs take turns by whole requests.
    """
    around_s = (BATCH + others * REQUEST) / TOKENS_PER_S + 1e-9  # floats are not exact
    return true_s / 2 - around_s <= told_s <= true_s * 2 + around_s


WEIGHTS = st.sampled_from([0.5, 1.0, 2.0, 4.0])


@example([(0.5, 1), (1.0, 81), (1.0, 81)], 2.0, 121)  # told a batch to the last bit
@example([(0.5, 1), (0.5, 41), (0.5, 41), (0.5, 41)], 2.0, 161)  # told half a request more: others have half of theirs
@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(WEIGHTS, st.integers(0, 8000)), max_size=4), WEIGHTS, st.integers(0, 3000))
def test_told_wait_is_that_of_the_jobs_share_of_the_engine(
    others: list[tuple[float, int]], weight: float, own_tokens: int
) -> None:
    terms = {str(index): JobTerms(weight=other) for index, (other, _) in enumerate(others)}
    server = Server(terms | {"mine": JobTerms(weight=weight)})
    waiting = {str(index): tokens for index, (_, tokens) in enumerate(others)}
    for job, tokens in (waiting | {"mine": own_tokens}).items():
        server.fill(job, tokens)
    told_s = server.line.seconds_until_start("mine", REQUEST)
    true_s = server.seconds_until_started(server.join("mine"), others={})
    assert close(told_s, true_s, others=len(others))


def test_a_flood_of_another_job_does_not_lengthen_what_a_job_is_told() -> None:
    server = Server({})
    server.fill("flood", 100_000)
    told_s = server.line.seconds_until_start("mine", REQUEST)
    assert told_s == pytest.approx(REQUEST / TOKENS_PER_S)
    assert close(told_s, server.seconds_until_started(server.join("mine"), others={"flood": 100_000}))


@pytest.mark.parametrize("num_others", [0, 1, 9])
def test_refused_job_is_told_when_it_would_be_let_in(num_others: int) -> None:
    server = Server({}, max_tokens=8000)
    others = {str(index): 8000 // (num_others + 1) for index in range(num_others)}
    for job, tokens in others.items():
        server.fill(job, tokens)
    with pytest.raises(Unavailable) as refused:
        while True:
            server.join("mine")
    assert server.jobs.book("mine").refusals == {Shortage.QUEUE_FULL: 1}
    began_s = server.now_s
    with pytest.raises(StopIteration):
        while True:
            server.step()
            for job, tokens in others.items():
                server.fill(job, tokens)
            try:
                server.join("mine")
            except Unavailable:
                continue
            raise StopIteration
    assert close(refused.value.retry_after_s, server.now_s - began_s)


def test_a_full_queue_lets_a_job_in_up_to_its_share_and_no_token_beyond() -> None:
    server = Server({}, max_tokens=400)
    for _ in range(10):
        server.join("flood")  # all of it, while nobody else waits
    with pytest.raises(Unavailable, match="400 tokens wait, this request has 1, and at most 400 may wait, 400 of them"):
        server.join("flood", 1)
    for _ in range(5):
        server.join("mine")
    for job in ("mine", "flood"):
        with pytest.raises(Unavailable, match=r"600 tokens wait, .* 200 of them"):
            server.join(job, 1)
    assert (server.line.queue.tokens_of("flood"), server.line.queue.tokens_of("mine")) == (400, 200)


def test_a_queue_with_room_lets_a_job_in_beyond_its_share() -> None:
    server = Server({}, max_tokens=400)
    for job in ("flood", "mine", *["flood"] * 8):
        server.join(job)
    assert (server.line.queue.tokens_of("flood"), server.line.queue.num_tokens) == (360, 400)


def test_a_full_queue_lets_one_call_in_of_a_job_with_nothing_in_it() -> None:
    server = Server({}, max_tokens=400)
    for job in ("flood", "mine"):
        server.line.join([Ask(job, 300), Ask(job, 300)])
        assert server.line.queue.requests_of(job) == 2
        with pytest.raises(Unavailable):
            server.join(job, 1)


def test_new_terms_count_for_the_next_request_that_is_to_be_let_in() -> None:
    files: list[dict[str, JobTerms]] = [{}]
    line = WaitingLine[Ask](JobTable(JobTerms(), look=lambda: files[-1]), max_tokens=400)
    line.join([Ask("flood", 400)])
    line.join([Ask("mine", 200)])
    with pytest.raises(Unavailable):
        line.join([Ask("mine", 100)])
    files.append({"mine": JobTerms(weight=3)})
    line.join([Ask("mine", 100)])


def test_what_started_counts_and_what_start_refused_does_not() -> None:
    server = Server({"mine": JobTerms(max_tokens_in_flight=REQUEST)})
    server.now_s = 10.0
    ask = server.join("mine")
    server.now_s = 13.0
    assert server.line.take(BATCH, lambda ask: True, lambda ask: None) == []
    assert (server.jobs.book("mine").tokens_in_flight, list(server.jobs.book("mine").waits_s)) == (0, [])
    assert server.line.take(BATCH, lambda ask: True, lambda ask: True) == [(ask, True)]
    assert (server.jobs.book("mine").tokens_in_flight, list(server.jobs.book("mine").waits_s)) == (REQUEST, [3.0])


def test_higher_classes_are_ahead_of_a_job_in_full() -> None:
    server = Server({"urgent": JobTerms(priority="high")})
    server.fill("urgent", 4000)
    told_s = server.line.seconds_until_start("mine", REQUEST)
    assert told_s == pytest.approx(4.0)
    assert close(told_s, server.seconds_until_started(server.join("mine"), others={}))


def test_batch_under_way_is_waited_for() -> None:
    server = Server({})
    server.line.batch_began(4000)
    server.now_s += 1.0
    assert server.line.seconds_until_start("mine", REQUEST) == pytest.approx(3.0)


def test_load_is_what_waits_and_is_computed_and_what_was_begun_lately() -> None:
    server = Server({})
    assert server.line.load.recent_tokens == 0
    server.line.batch_began(4000)
    server.fill("mine", 2000)
    assert (server.line.load.waiting_tokens, server.line.load.recent_tokens) == (6000, pytest.approx(4000))
    server.line.computed(4000, 2.0)
    server.now_s += 60
    assert server.line.load.waiting_tokens == 2000
    assert server.line.load.recent_tokens == pytest.approx(4000 / math.e)


@pytest.mark.parametrize("terms", [JobTerms(max_requests_per_s=2), JobTerms(max_tokens_in_flight=REQUEST)])
def test_a_quota_lengthens_what_a_job_is_told(terms: JobTerms) -> None:
    server = Server({"mine": terms})
    server.fill("mine", 40 * REQUEST)
    server.fill("other", 100_000)
    told_s = server.line.seconds_until_start("mine", REQUEST)
    true_s = server.seconds_until_started(server.join("mine"), others={"other": 100_000})
    assert true_s > 10
    assert close(told_s, true_s)


def test_what_a_job_is_told_does_not_take_a_look_at_every_request(monkeypatch: pytest.MonkeyPatch) -> None:
    def look(queue: object, job: str) -> None:
        raise AssertionError("thousands that are late together would be as many looks at thousands")

    server = Server({"mine": JobTerms(max_requests_per_s=2)})
    server.fill("mine", 40 * REQUEST)
    monkeypatch.setattr(FairQueue, "of_job", look)
    assert server.line.seconds_until_start("mine", REQUEST) > 10


def test_before_the_first_batch_a_caller_is_told_a_second() -> None:
    line = WaitingLine[Ask](JobTable(JobTerms()), max_tokens=100)
    assert line.seconds_until_start("mine", REQUEST) == 1.0


@pytest.mark.parametrize("late_s", [0.0, 0.02], ids=["in time", "late"])
async def test_a_rate_that_lets_a_job_start_wakes_whoever_found_that_it_did_not(late_s: float) -> None:
    server = Server({"mine": JobTerms(max_requests_per_s=100)})
    server.fill("mine", 101 * REQUEST)
    while server.step():
        server.now_s = 0.0
    server.now_s = 0.005
    assert not server.step()
    server.now_s = 0.005 + late_s  # since `take` has looked
    wake = asyncio.Event()
    async with asyncio.timeout(5):
        await server.line.until_woken(wake)
    assert wake.is_set()


async def test_nobody_is_woken_before_the_rate_lets_the_job_start() -> None:
    server = Server({"mine": JobTerms(max_requests_per_s=0.001)})
    server.join("mine")
    server.join("mine")
    assert server.line.take(BATCH, lambda ask: True, lambda ask: True)
    assert not server.line.take(BATCH, lambda ask: True, lambda ask: True)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await server.line.until_woken(asyncio.Event())
