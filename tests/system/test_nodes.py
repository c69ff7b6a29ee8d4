"""A job on two nodes, as pods of a cluster run it: one is preempted, all stop in good order and continue."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.free_port import free_port
from tests.system.conftest import Materials, Undisturbed
from tests.system.processes import Process, Processes
from tests.system.training import Job

pytestmark = pytest.mark.slow


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """What was seen."""

    whole: Job  # on two ranks of one node, undisturbed
    job: Job
    exit_codes: list[int]  # of both nodes, after one of them got SIGTERM
    sessions_while_stopped: int  # that its teacher knew
    checkpoints_while_stopped: list[str]
    continued: list[Process]
    sessions_at_the_end: int


def _nodes(job: Job) -> list[Process]:
    port = free_port()
    return [job.start_node(node, nodes=2, ranks=1, port=port) for node in (0, 1)]


def _num_sessions(undisturbed: Undisturbed, job: str) -> int:
    return len([one for one in undisturbed.teacher.get("/v1/sessions")["sessions"] if one["job"] == job])


@pytest.fixture(scope="module")
def story(
    materials: Materials, undisturbed: Undisturbed, processes: Processes, tmp_path_factory: pytest.TempPathFactory
) -> Story:
    root, address = tmp_path_factory.mktemp("nodes"), undisturbed.teacher.address
    whole = Job(processes, root / "whole", materials.plain, address)
    whole.start_ranks(2).succeed()
    job = Job(processes, root / "job", materials.plain, address, checkpoint={})
    gate = job.gate(8)
    nodes = _nodes(job)
    nodes[0].until(gate.is_reached)
    nodes[1].signal(signal.SIGTERM)
    gate.let_go()
    exit_codes = [node.exit_code() for node in nodes]
    sessions, checkpoints = _num_sessions(undisturbed, "job"), _checkpoints(job.output)
    continued = _nodes(job)
    for node in continued:
        node.succeed()
    return Story(
        whole=whole,
        job=job,
        exit_codes=exit_codes,
        sessions_while_stopped=sessions,
        checkpoints_while_stopped=checkpoints,
        continued=continued,
        sessions_at_the_end=_num_sessions(undisturbed, "job"),
    )


def _checkpoints(output: Path) -> list[str]:
    return sorted(path.name for path in (output / "checkpoints").glob("step-*"))


def test_a_signal_to_one_node_stops_all_of_them_with_a_checkpoint_and_no_success(story: Story) -> None:
    assert story.exit_codes == [75, 75]
    assert len(story.checkpoints_while_stopped) == 1


def test_nodes_that_stopped_continue_with_the_figures_of_an_undisturbed_run(story: Story) -> None:
    assert story.job.record() == story.whole.record()


def test_a_stopped_and_a_finished_job_leave_no_session(story: Story) -> None:
    assert (story.sessions_while_stopped, story.sessions_at_the_end) == (0, 0)


def test_the_model_and_the_last_checkpoint_lie_where_the_configuration_says(story: Story) -> None:
    assert _checkpoints(story.job.output)[-1].endswith("16")
    assert (story.job.output / "final" / "model.safetensors").is_file()
