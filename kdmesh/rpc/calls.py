"""Turns the ways a client's call can fail into our errors."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

import grpc

from kdmesh.errors import ConfigError, Unavailable
from kdmesh.rpc import status

UNARY_TIMEOUT_S = 10.0

_HUNG_UP = "Socket closed"  # gRPC's words of a server that ends the connection instead of greeting
_NOBODY = "Connection refused"  # and of a port at which nobody listens
_SPEAKS_HTTP = "Trying to connect an http1.x server"  # and of one that answers as a website does


@contextlib.contextmanager
def our_errors(address: str, *, wanted: str = "") -> Iterator[None]:
    """Raise what a call to `address` failed with as an RpcError.

    A call that timed out or was closed on this side is Unavailable: another attempt may
    succeed, here or elsewhere. The cancellation of the task itself passes through.

    Args:
        wanted: what should be at `address`, of a call that finds out whether it is; another kind of server, which does
            not know the call, is a ConfigError then.
    """
    try:
        yield
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and status.OURS not in error.trailing_metadata():
            raise Unavailable(f"{address} did not answer in time", retry_after_s=0.0) from None
        if wanted and error.code() is grpc.StatusCode.UNIMPLEMENTED:
            raise ConfigError(f"{address} is not a {wanted}: the server there is of another kind") from None
        failure = status.from_grpc(error)
        if wanted and _SPEAKS_HTTP in str(failure):
            said = f"{address} answers, but not gRPC: is it `server.rest_port` instead of `server.port`?"
            failure = Unavailable(said, retry_after_s=0.0)
        if wanted and _NOBODY in str(failure):
            failure = Unavailable(f"{address} refuses connections: nothing listens there", retry_after_s=0.0)
        if wanted and str(failure).endswith(_HUNG_UP):
            failure = Unavailable(f"{failure}, as by a server that asks for TLS: see `access.tls`", retry_after_s=0.0)
        failure.add_note(f"from {address}")
        raise failure from None
    except (grpc.aio.UsageError, asyncio.InvalidStateError):
        raise Unavailable(f"the connection to {address} is closed", retry_after_s=0.0) from None
    except asyncio.CancelledError:
        # grpc raises this too when only the call was cancelled, as when its channel closes.
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise Unavailable(f"the connection to {address} was closed", retry_after_s=0.0) from None
