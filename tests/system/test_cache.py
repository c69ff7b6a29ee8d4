"""A teacher that keeps rows: what was computed once is not computed again, and no figure tells."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from tests.system.conftest import Materials, Undisturbed
from tests.system.processes import Processes
from tests.system.teachers import Teacher
from tests.system.training import Job

pytestmark = pytest.mark.slow


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """Jobs that had a teacher with a cache; each runs for more than three epochs."""

    teacher: Teacher
    unprepared: Job
    prepared: Job
    prefilled_before: int  # tokens for the latter before it trained
    told: list[str]  # what precompute said, the first time and the second


@pytest.fixture(scope="module")
def finished(materials: Materials, processes: Processes, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    root = tmp_path_factory.mktemp("cache")
    cache = {"directory": str(root / "rows"), "directory_mib": 8}
    teacher = Teacher(processes, root / "teacher", materials.teacher, cache=cache)
    # One request at a time: two for the same sequence, at the end of an epoch, would both be computed.
    unprepared = Job(processes, root / "unprepared", materials.plain, teacher.address, teacher={"prefetch": 0})
    prepared = Job(processes, root / "prepared", materials.plain, teacher.address)
    teacher.start()
    training, precomputing = unprepared.start(), prepared.precompute()
    precomputing.succeed()
    told = precomputing.words()
    again = prepared.precompute()
    again.succeed()
    prefilled_before = teacher.num_prefilled("prepared")
    prepared.start().succeed()
    training.succeed()
    return Finished(
        teacher=teacher,
        unprepared=unprepared,
        prepared=prepared,
        prefilled_before=prefilled_before,
        told=told + again.words(),
    )


def test_later_epochs_need_no_prefill(finished: Finished) -> None:
    # Both jobs asked for the same sequences, and the one that was prepared for each of them once.
    assert finished.teacher.num_prefilled("unprepared") == finished.prefilled_before > 0
    assert finished.teacher.num_kept("unprepared") > 2 * finished.prefilled_before


def test_a_precomputed_run_needs_no_prefill(finished: Finished) -> None:
    assert finished.teacher.num_prefilled("prepared") == finished.prefilled_before
    assert finished.teacher.num_kept("prepared") > 3 * finished.prefilled_before


def test_figures_are_those_of_a_run_without_a_cache(finished: Finished, undisturbed: Undisturbed) -> None:
    assert finished.unprepared.record() == undisturbed.plain.record()
    assert finished.prepared.record() == undisturbed.plain.record()


def test_precompute_says_what_it_will_do_and_what_is_done(finished: Finished) -> None:
    estimate, done, second_estimate, _ = finished.told
    assert estimate.startswith("30 sequences with ")
    assert f"of the 8.0 MiB that {finished.teacher.address} keeps; 0 of them are kept already" in estimate
    assert f"{finished.prefilled_before:,} tokens" in estimate
    assert done == "30 of 30 sequences are kept"
    assert second_estimate.endswith("all of them are kept already")
