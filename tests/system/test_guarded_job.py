"""A job whose teacher asks for a token over TLS; in the middle of a step both its token and the certificate change."""

from __future__ import annotations

from dataclasses import dataclass

import httpx
import pytest

from tests.system.conftest import Materials, Undisturbed
from tests.system.guard import Guard
from tests.system.processes import Process, Processes
from tests.system.teachers import Teacher
from tests.system.training import Job


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """One job that was let in, and one that has no token."""

    teacher: Teacher
    job: Job
    ended_before: int  # sessions of the job that had ended before the exchange
    ended_after: int  # a few steps later
    stranger: Process


@pytest.fixture(scope="module")
def story(materials: Materials, processes: Processes, tmp_path_factory: pytest.TempPathFactory) -> Story:
    root = tmp_path_factory.mktemp("guarded")
    guard = Guard(root / "secrets", "job")
    teacher = Teacher(processes, root / "teacher", materials.teacher, reading=guard.reading(), server=guard.server())
    job = Job(processes, root / "job", materials.plain, teacher.address, teacher={"access": guard.access("job")})
    first, second = job.gate(20), job.gate(30)
    teacher.start()
    trainer = job.start()
    trainer.until(first.is_reached)
    before = _num_ended(teacher)
    guard.exchange()
    first.let_go()
    trainer.until(second.is_reached)
    after = _num_ended(teacher)
    second.let_go()
    open_access = {"tls": guard.access("job")["tls"]}
    stranger = Job(processes, root / "other", materials.plain, teacher.address, teacher={"access": open_access}).start()
    trainer.succeed()
    stranger.exit_code()
    return Story(teacher=teacher, job=job, ended_before=before, ended_after=after, stranger=stranger)


def _num_ended(teacher: Teacher) -> int:
    return sum(event["job"] == "job" for event in teacher.process.events("session ended"))


def test_job_learns_the_same_through_tls_with_a_token_that_changes(story: Story, undisturbed: Undisturbed) -> None:
    assert story.job.record() == undisturbed.plain.record()


def test_streams_of_the_old_token_end_and_begin_again_with_the_new(story: Story) -> None:
    assert story.ended_before == 0
    assert story.ended_after >= 1


def test_job_without_a_token_is_refused_at_once(story: Story) -> None:
    assert story.stranger.exit_code() == 2
    (sentence,) = story.stranger.words()
    assert "token" in sentence


def test_rest_answers_nobody_who_shows_no_token(story: Story) -> None:
    answer = httpx.get(f"{story.teacher.rest}/v1/sessions", verify=False)
    assert answer.status_code == 401
