"""The one table between our errors and gRPC status codes, used by both sides."""

from __future__ import annotations

import grpc

from kdmesh import errors

STATUS: dict[type[errors.RpcError], grpc.StatusCode] = {
    errors.InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.ModelMismatch: grpc.StatusCode.FAILED_PRECONDITION,
    errors.HandleGone: grpc.StatusCode.NOT_FOUND,
    errors.MessageTooLarge: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.DeadlineExpired: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.EngineFailure: grpc.StatusCode.INTERNAL,
}

ERROR: dict[grpc.StatusCode, type[errors.RpcError]] = {code: error for error, code in STATUS.items()}


RETRY_AFTER = "kdmesh-retry-after-ms"
"""Trailing metadata of an rpc that ends with UNAVAILABLE: how long to wait before asking again."""

OURS = "kdmesh-error"
"""Trailing metadata of every rpc that a server of ours has failed: the name of the error."""


def number(error: errors.RpcError) -> int:
    """The numeric gRPC code of an error."""
    code: int = STATUS[type(error)].value[0]
    return code


def from_number(code: int, message: str, *, retry_after_s: float) -> errors.RpcError:
    """The error a numeric gRPC code stands for; EngineFailure for a code we never send."""
    for status, error in ERROR.items():
        if status.value[0] == code:
            return make(error, message, retry_after_s=retry_after_s)
    return errors.EngineFailure(f"the server sent status {code}, which is not part of the protocol: {message}")


def make(error: type[errors.RpcError], message: str, *, retry_after_s: float) -> errors.RpcError:
    """An instance of `error`; only Unavailable keeps the wait."""
    if error is errors.Unavailable:
        return errors.Unavailable(message, retry_after_s=retry_after_s)
    return error(message)


def from_grpc(error: grpc.aio.AioRpcError) -> errors.RpcError:
    """The error behind a call that failed on the client, whichever side raised it.

    INTERNAL that no server of ours has sent is gRPC's own: it writes that over the real status
    when a message could not be sent because the connection broke (github.com/grpc/grpc/issues/36066).
    """
    code = error.code()
    details = error.details() or str(code)
    if code is grpc.StatusCode.CANCELLED:
        return errors.Unavailable(f"the call was cancelled: {details}", retry_after_s=0.0)
    if code is grpc.StatusCode.INTERNAL and OURS not in error.trailing_metadata():
        return errors.Unavailable(f"the connection broke: {details}", retry_after_s=0.0)
    return make(ERROR.get(code, errors.EngineFailure), details, retry_after_s=_retry_after_s(error.trailing_metadata()))


def _retry_after_s(metadata: grpc.aio.Metadata) -> float:
    """What the server asks for; nothing when the error is gRPC's own, as for a refused connection."""
    text = metadata.get(RETRY_AFTER)
    return int(text) / 1000 if isinstance(text, str) and text.isdecimal() else 0.0
