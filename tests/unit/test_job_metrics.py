"""Labels of jobs: bounded, and gone when the job is."""

from __future__ import annotations

from prometheus_client import generate_latest

from kdmesh.serving.jobs.config import JobTerms
from kdmesh.serving.jobs.fair_queue import FairQueue
from kdmesh.serving.jobs.families import job_families
from kdmesh.serving.jobs.metrics import MAX_JOBS, JobMetrics
from kdmesh.serving.jobs.state import Holdings, job_states
from kdmesh.serving.jobs.table import FORGET_S, JobTable, Shortage


class Clock:
    """Stands until it is moved."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_numbers_of_jobs_that_left_long_ago_are_gone_and_the_others_stay() -> None:
    clock = Clock()
    metrics = JobMetrics("kdmesh_test", clock=clock)
    requests = metrics.counter("requests", "Requests.", "kdmesh_job", "outcome")
    waits = metrics.histogram("wait_seconds", "Waits.", "kdmesh_job")
    for job in ("left", "present", ""):
        requests.labels(metrics.job_label(job), "ok").inc()
        waits.labels(metrics.job_label(job)).observe(1)
    clock.now_s = FORGET_S
    requests.labels(metrics.job_label(""), "ok").inc()
    metrics.forget_silent({"present"})
    text = generate_latest(metrics.registry).decode()
    assert 'kdmesh_job="left"' not in text
    assert 'kdmesh_test_requests_total{kdmesh_job="present",outcome="ok"} 1.0' in text
    assert 'kdmesh_test_wait_seconds_count{kdmesh_job="(unnamed)"} 1.0' in text


def test_any_number_of_jobs_makes_a_bounded_number_of_labels_and_room_comes_back() -> None:
    clock = Clock()
    metrics = JobMetrics("kdmesh_test", clock=clock)
    labels = {metrics.job_label(f"job-{index}") for index in range(3 * MAX_JOBS)}
    assert len(labels) == MAX_JOBS + 1
    assert metrics.job_label("late") == "(others)"
    clock.now_s = FORGET_S
    metrics.forget_silent(frozenset())
    assert metrics.job_label("late") == "late"


def test_jobs_that_are_too_many_are_added_up() -> None:
    table = JobTable(JobTerms())
    names = [f"job-{index:04}" for index in range(MAX_JOBS + 10)]
    for name in names:
        table.refused(name, Shortage.ENGINE)
    held = {name: Holdings(sessions=1, slots=1, slab_bytes=7) for name in names}
    families = job_families("kdmesh_test", job_states(table, FairQueue(), held), has_slab=True)
    by_name = {family.name: family.samples for family in families}
    slab = {sample.labels["kdmesh_job"]: sample.value for sample in by_name["kdmesh_test_job_slab_bytes"]}
    assert len(slab) == MAX_JOBS + 1
    assert (slab["job-0000"], slab["(others)"]) == (7, 70)
    assert {sample.value for sample in by_name["kdmesh_test_job_refusals"]} == {1, 10}
