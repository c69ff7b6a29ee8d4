"""Errors cross the wire and come back as what they were."""

from __future__ import annotations

import inspect

import grpc
import pytest

from kdmesh import errors
from kdmesh.rpc import status

ALL = errors.RpcError.__subclasses__()


def test_every_rpc_error_has_its_own_status() -> None:
    assert set(status.STATUS) == set(ALL)
    assert len(status.ERROR) == len(status.STATUS)


def test_every_deliberate_error_is_in_the_drawn_tree() -> None:
    assert errors.__doc__ is not None
    for name, value in vars(errors).items():
        if inspect.isclass(value) and issubclass(value, errors.KdmeshError):
            assert name in errors.__doc__


@pytest.mark.parametrize("kind", ALL)
def test_number_and_back_is_the_same_error(kind: type[errors.RpcError]) -> None:
    error = status.from_number(status.number(kind("why")), "why", retry_after_s=2.5)
    assert type(error) is kind
    assert str(error) == "why"
    if isinstance(error, errors.Unavailable):
        assert error.retry_after_s == 2.5


@pytest.mark.parametrize("number", [0, 2, 12, 15, 99])
def test_number_that_is_never_sent_is_a_fault_of_the_server(number: int) -> None:
    with pytest.raises(errors.EngineFailure, match=f"status {number}, which is not part of the protocol: why"):
        raise status.from_number(number, "why", retry_after_s=0)


def call_error(code: grpc.StatusCode, **trailing: str) -> grpc.aio.AioRpcError:
    metadata = grpc.aio.Metadata(*((name.replace("_", "-"), value) for name, value in trailing.items()))
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), metadata, details="why")


@pytest.mark.parametrize("code", list(grpc.StatusCode))
def test_every_failed_call_is_one_of_our_errors(code: grpc.StatusCode) -> None:
    error = status.from_grpc(call_error(code, kdmesh_error="Anything"))
    assert "why" in str(error)
    if code in status.ERROR:
        assert type(error) is status.ERROR[code]
    elif code is grpc.StatusCode.CANCELLED:
        assert isinstance(error, errors.Unavailable)
    else:
        assert isinstance(error, errors.EngineFailure)


def test_internal_error_of_the_connection_is_not_the_servers_fault() -> None:
    with pytest.raises(errors.Unavailable, match="the connection broke: why"):
        raise status.from_grpc(call_error(grpc.StatusCode.INTERNAL))


def test_wait_comes_with_the_call() -> None:
    busy = status.from_grpc(call_error(grpc.StatusCode.UNAVAILABLE, kdmesh_retry_after_ms="1500"))
    assert isinstance(busy, errors.Unavailable)
    assert busy.retry_after_s == 1.5


@pytest.mark.parametrize("text", ["", "soon", "-1", "1e3"])
def test_wait_that_is_no_number_is_none(text: str) -> None:
    busy = status.from_grpc(call_error(grpc.StatusCode.UNAVAILABLE, kdmesh_retry_after_ms=text))
    assert isinstance(busy, errors.Unavailable)
    assert busy.retry_after_s == 0
