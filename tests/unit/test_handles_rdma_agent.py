"""What an agent makes of what NIXL says, with bindings that say what a test wants."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kdmesh.errors import ConfigError, Unavailable
from kdmesh.handles.rdma import agent as rdma_agent
from kdmesh.handles.rdma.agent import Agent, OwnMemory, RemoteMemory, Transfer

OWN = OwnMemory(address=4096, size_bytes=100, registration="registration")
REMOTE = RemoteMemory(agent="server", metadata=b"metadata", address=8192, size_bytes=100)


class nixlRemoteDisconnectError(Exception):  # noqa: N801  # as NIXL names it
    """One of NIXL's, which have no base of their own."""


class Bindings:
    """Every call is noted; what `answers` has for it is returned, or raised."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[object, ...]]] = []
        self.answers: dict[str, object] = {"createXferReq": 7, "postXferReq": "IN_PROG", "loadRemoteMD": b"server"}
        self.config = SimpleNamespace()

    def __getattr__(self, name: str) -> Any:
        def call(*args: object) -> object:
            self.calls.append((name, args))
            answer = self.answers.get(name)
            if isinstance(answer, Exception):
                raise answer
            return answer

        return call

    def module(self) -> SimpleNamespace:
        return SimpleNamespace(
            nixlAgentConfig=lambda: self.config,
            nixlAgent=lambda name, config: self,
            nixlRegDList=lambda kind, regions: regions,
            nixlXferDList=lambda kind, regions: regions,
            nixlRemoteDisconnectError=nixlRemoteDisconnectError,
            NIXL_THREAD_SYNC_STRICT="STRICT",
            NIXL_READ="READ",
            NIXL_SUCCESS="SUCCESS",
            NIXL_IN_PROG="IN_PROG",
            DRAM_SEG="DRAM",
        )


@pytest.fixture
def bindings(monkeypatch: pytest.MonkeyPatch) -> Bindings:
    made = Bindings()
    monkeypatch.setattr(rdma_agent, "_load", made.module)
    return made


@pytest.mark.parametrize("is_read", [True, False])
def test_only_who_is_read_has_a_thread_and_nobody_listens(bindings: Bindings, is_read: bool) -> None:
    Agent(is_read=is_read)
    told = vars(bindings.config)
    assert (told["useProgThread"], told["useListenThread"], told["syncMode"]) == (is_read, False, "STRICT")
    assert told["pthrDelay"] >= 100  # microseconds; with 0 it never rests


def test_every_agent_has_a_name_of_its_own(bindings: Bindings) -> None:
    assert Agent(is_read=True).name != Agent(is_read=True).name


def test_read_names_both_places(bindings: Bindings) -> None:
    transfer = Agent(is_read=False).begin_read(REMOTE, OWN, offset_bytes=64, size_bytes=10)
    assert transfer == Transfer(number=7, is_done=False)
    assert ("createXferReq", ("READ", [(4096, 10, 0)], [(8256, 10, 0)], "server", b"", [])) in bindings.calls


@pytest.mark.parametrize("answer", ["ERR", None, nixlRemoteDisconnectError("gone")])
def test_everything_but_done_and_under_way_is_a_failure(bindings: Bindings, answer: object) -> None:
    agent = Agent(is_read=False)
    bindings.answers["getXferStatus"] = answer
    with pytest.raises(Unavailable, match="RDMA: a read"):
        agent.poll(Transfer(number=7, is_done=False))
    bindings.answers["postXferReq"] = answer
    with pytest.raises(Unavailable, match="RDMA: a read"):
        agent.begin_read(REMOTE, OWN, offset_bytes=0, size_bytes=10)


def test_done_is_done(bindings: Bindings) -> None:
    agent = Agent(is_read=False)
    bindings.answers["getXferStatus"] = "SUCCESS"
    assert agent.poll(Transfer(number=7, is_done=False)).is_done


def test_metadata_of_another_agent_is_refused(bindings: Bindings) -> None:
    bindings.answers["loadRemoteMD"] = b"somebody"
    with pytest.raises(Unavailable, match="is of agent b'somebody'; it was said to be of server"):
        Agent(is_read=False).add_peer(REMOTE)


def test_backend_that_does_not_start_is_a_matter_of_configuration(bindings: Bindings) -> None:
    bindings.answers["createBackend"] = nixlRemoteDisconnectError("NIXL_ERR_BACKEND")
    with pytest.raises(ConfigError, match="UCX backend does not start"):
        Agent(is_read=True)
