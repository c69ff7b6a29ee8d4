"""What each job may take, and what is remembered of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kdmesh.config import load
from kdmesh.errors import ConfigError
from kdmesh.serving.jobs.config import JobTerms
from kdmesh.serving.jobs.table import FORGET_S, JobTable, Shortage
from kdmesh.serving.jobs.waiting_line import WaitingLine
from kdmesh.serving.rate import DecayingRate, TokenBucket
from kdmesh_rollout.config import RolloutConfig
from kdmesh_teacher.config import TeacherConfig


class Clock:
    """Stands until it is moved."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_override_says_what_it_names_and_the_defaults_the_rest() -> None:
    defaults = JobTerms(weight=3, max_tokens_in_flight=100)
    table = JobTable(defaults, {"job": JobTerms(max_tokens_in_flight=None)})
    assert table.terms("job") == JobTerms(weight=3, max_tokens_in_flight=None)
    assert table.terms("other") == defaults
    table.override("job", JobTerms(priority="low"))
    assert table.terms("job") == JobTerms(weight=3, priority="low", max_tokens_in_flight=100)
    assert table.standing("job").rank > table.standing("other").rank
    table.override("other", JobTerms(weight=5))
    for job in ("job", "other"):
        table.reset(job)
    assert table.overrides == {"job": JobTerms(max_tokens_in_flight=None)}
    assert (table.terms("job").max_tokens_in_flight, table.terms("other")) == (None, defaults)


def test_what_an_operator_said_holds_until_the_file_says_something_new_of_that_job() -> None:
    files = [{"a": JobTerms(weight=2), "b": JobTerms(weight=2)}]
    table = JobTable(JobTerms(), {"b": JobTerms(weight=9)}, look=lambda: files[-1])
    table.override("a", JobTerms(weight=5))
    files.append({"a": JobTerms(weight=2), "b": JobTerms(weight=3)})
    table.look_again()
    assert [table.terms(job).weight for job in "ab"] == [5, 3]
    table.reset("a")
    assert table.terms("a").weight == 2
    table.override("b", JobTerms(weight=7))
    files.append({"a": JobTerms(weight=4)})
    table.look_again()
    assert [table.terms(job).weight for job in "ab"] == [4, 9]
    files.append({})
    table.look_again()
    assert [table.terms(job).weight for job in "ab"] == [1, 9]


def test_a_line_takes_new_terms_before_it_asks_for_the_next_batch() -> None:
    files: list[dict[str, JobTerms]] = [{}]
    line = WaitingLine[Any](JobTable(JobTerms(), look=lambda: files[-1]), max_tokens=10)
    files.append({"a": JobTerms(weight=2)})
    assert line.take(10, lambda work: True, lambda work: work) == []
    assert line.jobs.terms("a").weight == 2


def test_who_waits_is_told_of_new_terms() -> None:
    table, told = JobTable(JobTerms()), list[str]()
    table.on_change = lambda: told.append("changed")
    table.override("job", JobTerms(weight=2))
    table.reset("job")
    assert told == ["changed", "changed"]


def test_tokens_in_flight_are_bounded_but_for_one_request_alone() -> None:
    table = JobTable(JobTerms(max_tokens_in_flight=10))
    assert table.shortage("job", 99) is None
    table.started("job", 6, waited_s=0)
    assert table.shortage("job", 4) is None
    assert table.shortage("job", 5) is Shortage.TOKENS_IN_FLIGHT
    table.ended("job", 6)
    assert table.shortage("job", 99) is None


def test_rate_lets_a_burst_through_and_then_one_at_a_time() -> None:
    clock = Clock()
    table = JobTable(JobTerms(max_requests_per_s=2), clock=clock)
    for _ in range(2):
        assert table.shortage("job", 1) is None
        table.started("job", 1, waited_s=0)
    assert table.shortage("job", 1) is Shortage.REQUESTS_PER_S
    assert table.seconds_until_allowed("job", 3) == pytest.approx(1.5)
    clock.now_s = 0.5
    assert table.shortage("job", 1) is None


def test_bucket_that_gets_a_lower_rate_keeps_no_larger_burst() -> None:
    bucket = TokenBucket(0.0)
    bucket.take(rate=100, now_s=0.0)
    assert bucket.seconds_until(2, rate=1, now_s=0.0) == pytest.approx(1.0)


def test_rate_of_tokens_is_that_of_the_last_seconds() -> None:
    rate = DecayingRate(0.0)
    for second in range(1, 200):
        rate.add(100 if second < 100 else 10, second)
    assert rate.per_s(199) == pytest.approx(10, rel=0.1)
    assert rate.per_s(400) < 0.1


def test_rate_of_a_job_that_has_just_come_is_not_too_low() -> None:
    rate = DecayingRate(0.0)
    for second in range(1, 4):
        rate.add(100, second)
    assert rate.per_s(3) == pytest.approx(100, rel=0.25)


def test_job_that_left_is_forgotten_and_one_that_is_there_is_not() -> None:
    clock = Clock()
    table = JobTable(JobTerms(), clock=clock)
    for job in ("left", "present", "computing"):
        table.started(job, 5, waited_s=0)
    for job in ("left", "present"):
        table.ended(job, 5)
    clock.now_s = FORGET_S - 1
    table.forget_silent({"present"})
    assert set(table.books()) == {"left", "present", "computing"}
    clock.now_s = FORGET_S
    table.forget_silent({"present"})
    assert set(table.books()) == {"present", "computing"}


def test_any_number_of_names_takes_bounded_memory() -> None:
    table = JobTable(JobTerms())
    for index in range(3000):
        table.refused(f"job-{index}", Shortage.ENGINE)
    assert len(table.books()) <= 1024


def test_the_jobs_that_were_silent_for_longest_make_room_for_new_names() -> None:
    now_s = 0.0
    table = JobTable(JobTerms(), clock=lambda: now_s)
    for index in range(2000):
        now_s += 1
        table.refused(f"job-{index}", Shortage.ENGINE)
        table.computed("steady", 5)
    assert table.books()["steady"].tokens == 10_000
    assert "job-1999" in table.books() and "job-0" not in table.books()
    assert len(table.books()) <= 1024


@pytest.mark.parametrize(
    ("model", "key", "sentence"),
    [
        (TeacherConfig, "jobs.defaults.weight=-1", "jobs.defaults.weight: .* greater than or equal to 0.001"),
        (TeacherConfig, "jobs.overrides.a.priority=urgent", r"jobs.overrides.a.priority: .*\(got 'urgent'\)"),
        (TeacherConfig, "jobs.overrides.a.max_byte_in_flight=1", "max_byte_in_flight: there is no such key"),
        (RolloutConfig, "jobs.defaults.max_bytes_in_flight=1", "max_bytes_in_flight: there is no such key"),
        (RolloutConfig, "jobs.defaults.max_requests_per_s=0", "max_requests_per_s: .*0.001"),
    ],
)
def test_bad_terms_are_refused_by_name(
    tmp_path: Path, model: type[TeacherConfig | RolloutConfig], key: str, sentence: str
) -> None:
    path = tmp_path / "server.yaml"
    path.write_text("engine: {kind: fake}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=sentence):
        load(model, path, [key])
