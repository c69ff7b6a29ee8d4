"""The one table between our errors and gRPC status codes, used by both sides."""

from __future__ import annotations

import grpc

from kdmesh import errors

STATUS: dict[type[errors.RpcError], grpc.StatusCode] = {
    errors.InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    errors.ModelMismatch: grpc.StatusCode.FAILED_PRECONDITION,
    errors.HandleGone: grpc.StatusCode.NOT_FOUND,
    errors.MessageTooLarge: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.DeadlineExpired: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.EngineFailure: grpc.StatusCode.INTERNAL,
}

ERROR: dict[grpc.StatusCode, type[errors.RpcError]] = {code: error for error, code in STATUS.items()}


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


def from_grpc(error: grpc.RpcError) -> errors.RpcError:
    """The error behind a failed call, whichever side raised it."""
    code = error.code() if isinstance(error, grpc.Call | grpc.aio.AioRpcError) else grpc.StatusCode.INTERNAL
    details = (error.details() if isinstance(error, grpc.Call | grpc.aio.AioRpcError) else None) or str(error)
    if code is grpc.StatusCode.CANCELLED:
        return errors.Unavailable(f"the call was cancelled: {details}")
    return make(ERROR.get(code, errors.EngineFailure), details, retry_after_s=1.0)
