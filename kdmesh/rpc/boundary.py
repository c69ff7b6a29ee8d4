"""The one place where a caller is let in, and where an exception in a handler becomes a gRPC status."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from inspect import isasyncgen
from typing import Any, Never, TypeAlias

import grpc
from google.protobuf.message import DecodeError

from kdmesh.auth.authority import Authority, Caller
from kdmesh.errors import InvalidRequest, RpcError, Unauthenticated, Unavailable
from kdmesh.rpc import caller, status
from kdmesh.rpc.roles import needed

log = logging.getLogger(__name__)

# The messages of a handler are of whatever type its method has; grpc's own stubs need `Any` here.
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class ErrorBoundary(grpc.aio.ServerInterceptor):
    """Ends every failed call with exactly one status, and never shows a caller our internals.

    Nothing of a call is looked at before `authority` has let its caller in. Requests are decoded inside the boundary,
    so that garbage is the caller's fault and not ours. A handler may answer a message that is encoded already, as
    bytes.
    """

    def __init__(self, authority: Authority) -> None:
        self._authority = authority

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """The handler of one call, guarded; None when there is no such method."""
        handler = await continuation(details)
        return None if handler is None else _Guard(handler, details.method, self._authority).handler()


class _Guard:
    """One method's handler, and the boundary around it."""

    def __init__(self, handler: Handler, method: str, authority: Authority) -> None:
        self._handler = handler
        self._authority = authority
        self._inner: Any = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        self._method = method

    def handler(self) -> Handler:
        """A handler that grpc calls with undecoded bytes."""
        is_streaming = self._handler.response_streaming
        make: Any = _MAKE[self._handler.request_streaming, is_streaming]
        behaviour = self._answers if is_streaming else self._answer
        guarded: Handler = make(behaviour, request_deserializer=None, response_serializer=self._encode)
        return guarded

    async def _answer(self, data: Any, context: Context) -> Any:
        try:
            admitted = await self._admit(context)
            return await self._inner(self._request(data, admitted), context)
        except Exception as error:  # noqa: BLE001 - the boundary itself
            await _abort(error, self._method, context)

    async def _answers(self, data: Any, context: Context) -> None:
        try:
            admitted = await self._admit(context)
            call = self._inner(self._request(data, admitted), context)
            if not isasyncgen(call):
                await call
                return
            async with aclosing(call):
                async for reply in call:
                    await context.write(reply)
        except Exception as error:  # noqa: BLE001 - the boundary itself
            await _abort(error, self._method, context)

    async def _admit(self, context: Context) -> Caller | None:
        """Who calls; None where nobody asks."""
        role = needed(self._method)
        if role is None:
            return None
        admitted = await self._authority.admit(
            _authorization(context), lambda: _peer_names(context), role, self._method.rpartition("/")[2]
        )
        caller.enter(admitted.identity)
        return admitted

    def _request(self, data: Any, admitted: Caller | None) -> Any:
        return self._each(data, admitted) if self._handler.request_streaming else self._decode(data)

    async def _each(self, messages: AsyncIterator[bytes], admitted: Caller | None) -> AsyncIterator[Any]:
        async for data in messages:
            if admitted is not None and not admitted.is_still_good():
                raise Unauthenticated(f"the token of {admitted.identity.name} was revoked while the stream was open")
            yield self._decode(data)

    def _decode(self, data: bytes) -> Any:
        decode = self._handler.request_deserializer
        try:
            return data if decode is None else decode(data)
        except DecodeError:
            raise InvalidRequest(f"{len(data)} bytes that are not a request of {self._method}") from None

    def _encode(self, reply: Any) -> bytes:
        encode = self._handler.response_serializer
        return reply if encode is None or isinstance(reply, bytes) else encode(reply)


_MAKE = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


def _authorization(context: Context) -> str | None:
    for key, value in context.invocation_metadata() or ():
        if key == "authorization" and isinstance(value, str):
            return value
    return None


def _peer_names(context: Context) -> Sequence[str]:
    """Of a client's certificate that was checked: subject alternative names in order, then the common name."""
    found = context.auth_context()
    keys = ("x509_subject_alternative_name", "x509_common_name")
    return [name.decode(errors="replace") for key in keys for name in found.get(key, ())]


async def _abort(error: Exception, method: str, context: Context) -> Never:
    error = _first(error)
    if isinstance(error, grpc.aio.BaseError):
        raise error  # the handler has ended the call itself
    trailer = [(status.OURS, type(error).__name__)]
    if not isinstance(error, RpcError):
        log.error("rpc failed", extra={"rpc": method}, exc_info=error)
        details = "internal error; the server's log has the details"
        await context.abort(grpc.StatusCode.INTERNAL, details, trailing_metadata=tuple(trailer))
    if isinstance(error, Unavailable):
        trailer.append((status.RETRY_AFTER, str(round(error.retry_after_s * 1000))))
    await context.abort(status.STATUS[type(error)], str(error), trailing_metadata=tuple(trailer))


def _first(error: Exception) -> Exception:
    """What a task group of the handler failed with."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error
