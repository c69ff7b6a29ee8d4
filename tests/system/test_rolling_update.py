"""Servers behind services are replaced one after the other, at other addresses, while jobs train: no job notices."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.cluster_services import announce, own_cluster, withdraw
from tests.support.fake_cluster import FakeCluster
from tests.support.trace_collector import Collector, collecting
from tests.system.conftest import Materials
from tests.system.processes import Process, Processes
from tests.system.rollouts import Rollouts
from tests.system.teachers import Teacher
from tests.system.training import Job, Recipe

pytestmark = pytest.mark.slow

# Of a job on the data's answers, and of one on its student's own, on two ranks, which begins long after it.
STEPS = {"given": 900, "sampled": 24}


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """Two jobs whose servers were replaced while they ran, and the same two undisturbed."""

    undisturbed: dict[str, Job]
    disturbed: dict[str, Job]
    trainers: dict[str, Process]  # of those that were disturbed
    replaced: list[Teacher | Rollouts]  # each ended by SIGTERM
    exit_codes: list[int]  # theirs
    successors: list[Teacher | Rollouts]
    collector: Collector


class Service:
    """Two servers of a kind behind a service, each of which can be replaced as a pod is: at another address."""

    def __init__(self, cluster: FakeCluster, name: str, *servers: Teacher | Rollouts) -> None:
        """Start all. The first two serve; the others, whose model is loaded already, take their places."""
        self.address = f"k8s:///{name}.ml:grpc"
        self.running, self._others = list(servers[:2]), list(servers[2:])
        self._cluster = cluster
        self._name = name
        for server in servers:
            server.start()
        for server in servers:
            server.wait_ready()
        for server in self.running:
            announce(cluster, name, server.address)

    def replace(self, index: int) -> int:
        """End one, and only then let its successor in; what the old one ended with."""
        old, new = self.running[index], self._others.pop(0)
        withdraw(self._cluster, self._name, old.address)
        old.process.signal(signal.SIGTERM)
        code = old.process.exit_code()
        announce(self._cluster, self._name, new.address)
        self.running[index] = new
        return code


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeCluster]:
    with own_cluster(tmp_path_factory.mktemp("cluster")) as running:
        yield running


def jobs(
    processes: Processes, root: Path, materials: Materials, teachers: list[str], rollouts: list[str], **sections: Any
) -> dict[str, Job]:
    """One of each kind; `sections` are the second one's."""
    source = {
        "kind": "on_policy",
        "rollouts": {"addresses": rollouts, "deadline_s": 100},
        "samples_per_prompt": 2,
        "sampling": {"max_new_tokens": 24},
    }
    judged = replace(materials.plain, is_judged=True)
    own: dict[str, tuple[Recipe, dict[str, Any]]] = {
        "given": (materials.plain, {}),
        "sampled": (judged, {"source": source, **sections}),
    }
    return {
        name: Job(processes, root / name, recipe, *teachers, steps=STEPS[name], checkpoint={}, **more)
        for name, (recipe, more) in own.items()
    }


def start(made: dict[str, Job]) -> dict[str, Process]:
    return {"given": made["given"].start(), "sampled": made["sampled"].start_ranks(2)}


@pytest.fixture(scope="module")
def story(
    cluster: FakeCluster, materials: Materials, processes: Processes, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Story]:
    root = tmp_path_factory.mktemp("rolling")
    with collecting() as collector:
        traced: dict[str, Any] = {"tracing": {"endpoint": collector.config.endpoint}}
        teachers = Service(
            cluster,
            "teachers",
            *(Teacher(processes, root / f"teacher-{n}", materials.teacher, **traced) for n in range(4)),
        )
        student = materials.plain.student
        rollouts = Service(
            cluster, "rollouts", *(Rollouts(processes, root / f"rollout-{n}", student, **traced) for n in range(4))
        )
        fixed = [[server.address for server in service.running] for service in (teachers, rollouts)]
        undisturbed = jobs(processes, root / "undisturbed", materials, fixed[0], fixed[1][:1])
        for process in start(undisturbed).values():
            process.succeed()
        named = jobs(processes, root / "named", materials, [teachers.address], [rollouts.address], **traced)
        trainers = start(named)
        replaced, codes = [*teachers.running, *rollouts.running], []
        for service, whose in ((teachers, ("given", "sampled")), (rollouts, ("sampled",))):
            for index in range(2):
                for name in whose:  # in the middle of all that it answers
                    _wait_a_step(named[name], trainers[name])
                codes.append(service.replace(index))
        for process in trainers.values():
            process.succeed()
        yield Story(
            undisturbed=undisturbed,
            disturbed=named,
            trainers=trainers,
            replaced=replaced,
            exit_codes=codes,
            successors=[*teachers.running, *rollouts.running],
            collector=collector,
        )


def _wait_a_step(job: Job, trainer: Process) -> None:
    done = len(job.steps())
    trainer.until(lambda: len(job.steps()) > done)


def test_servers_that_are_replaced_end_well(story: Story) -> None:
    assert story.exit_codes == [0, 0, 0, 0]
    for server in story.replaced:
        assert not server.process.events("drain time is over")


@pytest.mark.parametrize("name", STEPS)
def test_jobs_learn_exactly_what_they_would_have_learnt(story: Story, name: str) -> None:
    assert len(story.disturbed[name].steps()) == STEPS[name]
    assert story.disturbed[name].record() == story.undisturbed[name].record()


def test_what_comes_in_the_place_of_another_is_used(story: Story) -> None:
    for server in story.successors:
        if isinstance(server, Rollouts):
            assert server.process.events("weights replaced")
        else:
            assert server.num_answered("given") + server.num_answered("sampled") > 0


def test_the_last_weights_are_on_all_servers_that_are_left(story: Story) -> None:
    published = story.trainers["sampled"].events("weights published")
    versions = [event["weight_version"] for event in published]
    assert versions == list(range(versions[0], versions[0] + STEPS["sampled"] + 1))
    rollouts = [server for server in story.successors if isinstance(server, Rollouts)]
    assert [server.weight_version() for server in rollouts] == [versions[-1]] * 2


def test_the_steps_of_the_jobs_are_followed_into_all_servers(story: Story) -> None:
    for server in story.successors:
        server.process.signal(signal.SIGTERM)
        server.process.succeed()
    every = story.collector.every
    pairs = (
        ("kdmesh-teacher", "prefill request", ("rows",)),
        ("kdmesh-rollout", "generate request", ("samples",)),
        ("kdmesh-rollout", "weight update", ("publish", "batch")),  # the second for one that came in the middle of it
    )
    for service, child, parents in pairs:
        inner = every(service, child)
        outer = {one.span_id: one.trace_id for parent in parents for one in every("kdmesh-trainer", parent)}
        assert len(inner) >= STEPS["sampled"]
        assert all(outer[one.parent_span_id] == one.trace_id for one in inner)
