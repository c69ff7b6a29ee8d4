"""What the environment of a node says of its place in a job."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdmesh.errors import ConfigError
from kdmesh.launch import jobs, local
from kdmesh.launch.place import exit_when_stopped, place, ranks_per_node

SECOND = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "first", "PET_NPROC_PER_NODE": "4"}


def test_a_lone_machine_has_no_place() -> None:
    assert place({}) is None
    assert place({"PET_NNODES": "1", "PET_NPROC_PER_NODE": "2"}) is None


def test_the_ranks_of_the_second_node_follow_those_of_the_first() -> None:
    commands = local.rank_commands(["train"], ranks=4, threads=1, place=place(SECOND))
    assert [command.env["RANK"] for command in commands] == ["4", "5", "6", "7"]
    assert [command.env["LOCAL_RANK"] for command in commands] == ["0", "1", "2", "3"]
    first = commands[0].env
    assert (first["WORLD_SIZE"], first["LOCAL_WORLD_SIZE"]) == ("8", "4")
    assert (first["MASTER_ADDR"], first["MASTER_PORT"]) == ("first", "29500")
    assert "GLOO_SOCKET_IFNAME" not in first


@pytest.mark.parametrize("text", ["", "auto", "gpu", "cpu"])
def test_as_many_ranks_as_there_are_devices_is_for_the_configuration_to_say(text: str) -> None:
    assert ranks_per_node({"PET_NPROC_PER_NODE": text}) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"PET_NNODES": "two"}, "PET_NNODES is 'two'; it must be a number"),
        ({"PET_NODE_RANK": "2"}, "PET_NODE_RANK is 2; with PET_NNODES 2 it must be from 0 to less"),
        ({"PET_MASTER_ADDR": ""}, "PET_MASTER_ADDR does not say where the first of them is"),
        ({"PET_NPROC_PER_NODE": "0"}, "PET_NPROC_PER_NODE is 0; there must be 1 at least"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        place({**SECOND, **changes})


def test_a_stop_is_a_failure_only_where_somebody_wants_it_to_be() -> None:
    assert exit_when_stopped({}) is None
    assert exit_when_stopped({"KDMESH_EXIT_WHEN_STOPPED": "75"}) == 75


def test_servers_are_not_started_on_each_of_several_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECOND.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="--serve starts a server on each machine"):
        jobs.train(Path("train.yaml"), (), {jobs.TEACHER: Path("teacher.yaml")})
