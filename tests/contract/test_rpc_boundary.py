"""Whatever a handler raises, the caller gets one status and none of our internals."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio

from kdmesh import errors
from kdmesh.errors import ConfigError
from kdmesh.rpc import server, status
from kdmesh.rpc.calls import our_errors
from kdmesh.rpc.channel import open_channel


class Scripted:
    """A service with one method of each kind; each does what the test put there."""

    def __init__(self) -> None:
        self.error: Exception = errors.InvalidRequest("unset")
        self.address = ""

    async def unary(self, request: bytes, context: object) -> bytes:
        raise self.error

    async def stream(self, request: bytes, context: object) -> AsyncIterator[bytes]:
        yield b"one"
        raise self.error

    async def in_a_group(self, request: bytes, context: object) -> bytes:
        async with asyncio.TaskGroup() as group:
            group.create_task(self.unary(request, context))
        return b""

    def add_to(self, listening: grpc.aio.Server) -> None:
        methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Unary": grpc.unary_unary_rpc_method_handler(self.unary),
            "Stream": grpc.unary_stream_rpc_method_handler(self.stream),
            "Group": grpc.unary_unary_rpc_method_handler(self.in_a_group),
        }
        listening.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Scripted", methods),))

    async def call(self, method: str) -> None:
        """Raises what our client makes of the failure."""
        async with open_channel(self.address) as channel:
            with our_errors(self.address):
                if method == "Stream":
                    async for reply in channel.unary_stream(f"/test.Scripted/{method}")(b""):
                        assert reply == b"one"
                else:
                    await channel.unary_unary(f"/test.Scripted/{method}")(b"")


@pytest_asyncio.fixture
async def scripted() -> AsyncIterator[Scripted]:
    service = Scripted()
    async with server.serving("test.Scripted", service.add_to, host="127.0.0.1", port=0) as listening:
        service.address = f"127.0.0.1:{listening.port}"
        yield service


# The client makes Unavailable of a deadline that gRPC reports: another attempt may be in time.
EXACT = [kind for kind in errors.RpcError.__subclasses__() if kind is not errors.DeadlineExpired]


@pytest.mark.parametrize("method", ["Unary", "Stream", "Group"])
@pytest.mark.parametrize("kind", EXACT)
async def test_each_error_arrives_as_itself(scripted: Scripted, kind: type[errors.RpcError], method: str) -> None:
    scripted.error = status.make(kind, "the value and the rule", retry_after_s=3.5)
    with pytest.raises(kind, match="the value and the rule") as failure:
        await scripted.call(method)
    if isinstance(failure.value, errors.Unavailable):
        assert failure.value.retry_after_s == 3.5


@pytest.mark.parametrize("method", ["Unary", "Stream", "Group"])
async def test_unexpected_error_is_logged_here_and_hidden_there(
    scripted: Scripted, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    scripted.error = KeyError("secret")
    with caplog.at_level(logging.ERROR), pytest.raises(errors.EngineFailure) as failure:
        await scripted.call(method)
    assert "secret" not in str(failure.value)
    (record,) = [record for record in caplog.records if record.name == "kdmesh.rpc.boundary"]
    assert record.__dict__["rpc"] == f"/test.Scripted/{method}"
    assert record.exc_info is not None


async def test_method_that_does_not_exist_is_not_ours(scripted: Scripted) -> None:
    async with open_channel(scripted.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await channel.unary_unary("/test.Scripted/Nothing")(b"")
    assert failure.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_port_in_use_is_named(scripted: Scripted) -> None:
    port = int(scripted.address.split(":")[1])
    with pytest.raises(ConfigError, match=f"cannot listen on {scripted.address} for gRPC: .*`server.port`"):
        async with server.serving("test.Other", scripted.add_to, host="127.0.0.1", port=port):
            pass


async def test_server_that_is_gone_is_unavailable() -> None:
    with pytest.raises(errors.Unavailable) as failure:
        async with open_channel("127.0.0.1:1") as channel:
            with our_errors("127.0.0.1:1"):
                await channel.unary_unary("/test.Scripted/Unary")(b"", timeout=5)
    assert failure.value.retry_after_s == 0


async def test_call_that_is_cut_is_unavailable_and_not_a_cancellation(scripted: Scripted) -> None:
    async with open_channel(scripted.address) as channel:
        call = channel.unary_unary("/test.Scripted/Unary")(b"")
        call.cancel()
        with pytest.raises(errors.Unavailable), our_errors(scripted.address):
            await call


async def test_cancellation_of_the_task_passes_through(scripted: Scripted) -> None:
    async def wait() -> None:
        with our_errors("nowhere"):
            await asyncio.Event().wait()

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
