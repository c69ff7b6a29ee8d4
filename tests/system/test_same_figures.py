"""How rows travel, and how far ahead they are asked for, changes no figure; a model learns nothing from itself."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from tests.system.conftest import Materials, Undisturbed
from tests.system.processes import Processes
from tests.system.training import Job


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """Jobs that have ended well."""

    streamed: Job
    unhurried: Job  # asks for rows only when it needs them
    mirrored: Job  # its student is its teacher


@pytest.fixture(scope="module")
def finished(
    materials: Materials, undisturbed: Undisturbed, processes: Processes, tmp_path_factory: pytest.TempPathFactory
) -> Finished:
    root, address = tmp_path_factory.mktemp("same"), undisturbed.teacher.address
    mirror = replace(materials.plain, student=materials.teacher, is_judged=True)
    streamed = Job(processes, root / "streamed", materials.plain, address, teacher={"door": "stream"})
    unhurried = Job(processes, root / "unhurried", materials.plain, address, teacher={"door": "shm", "prefetch": 0})
    mirrored = Job(processes, root / "mirrored", mirror, address, steps=1)
    for running in (streamed.start(), unhurried.start(), mirrored.start_torchrun(2)):
        running.succeed()
    return Finished(streamed=streamed, unhurried=unhurried, mirrored=mirrored)


def test_stream_brings_the_same_rows_as_shared_memory(finished: Finished, undisturbed: Undisturbed) -> None:
    assert finished.streamed.record() == undisturbed.plain.record()
    assert {step["door"] for step in finished.streamed.steps()} == {"stream"}


def test_prefetching_changes_no_figure(finished: Finished, undisturbed: Undisturbed) -> None:
    assert finished.unhurried.record() == undisturbed.plain.record()
    assert {step["door"] for step in finished.unhurried.steps()} == {"shm"}


def test_shared_memory_is_taken_on_the_same_node(undisturbed: Undisturbed) -> None:
    assert {step["door"] for step in undisturbed.plain.steps()} == {"shm"}


def test_heads_of_other_sizes_are_no_obstacle(undisturbed: Undisturbed) -> None:
    # The students' heads have 320 and 352 rows.
    head = undisturbed.teacher.get("/v1/model")["head"]
    assert (head["vocabulary_size"], head["padded_vocabulary_size"]) == (320, 336)
    first, *_, last = undisturbed.plain.steps()
    assert last["loss_nats_per_token"] < 0.9 * first["loss_nats_per_token"]


def test_model_distilled_from_itself_starts_at_zero(finished: Finished) -> None:
    before, step, _ = finished.mirrored.lines()
    assert 0 <= before["kl_nats_per_token"] < 1e-6
    assert 0 <= step["loss_nats_per_token"] < 1e-6
    assert step["top1_agreement"] == before["top1_agreement"] == 1
