"""A channel whose calls say who makes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc

Method = Callable[..., Any]


class AuthorizedChannel(grpc.aio.Channel):
    """Sends a token with every call on another channel.

    grpc's own call credentials would refuse a channel without TLS also where something else encrypts it, and ask
    for the token in a thread of its own.

    Args:
        channel: what calls go through; closed with this one.
        token: what it is now.
    """

    def __init__(self, channel: grpc.aio.Channel, token: Callable[[], str]) -> None:
        self._channel = channel
        self._token = token

    async def __aenter__(self) -> AuthorizedChannel:
        """Itself."""
        return self

    async def __aexit__(self, *error: object) -> None:
        """Close it."""
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        """See grpc.aio.Channel."""
        await self._channel.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """See grpc.aio.Channel."""
        return self._channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """See grpc.aio.Channel."""
        await self._channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        """See grpc.aio.Channel."""
        await self._channel.channel_ready()

    def unary_unary(self, *args: Any, **kwargs: Any) -> Any:
        """See grpc.aio.Channel."""
        return self._authorized(self._channel.unary_unary(*args, **kwargs))

    def unary_stream(self, *args: Any, **kwargs: Any) -> Any:
        """See grpc.aio.Channel."""
        return self._authorized(self._channel.unary_stream(*args, **kwargs))

    def stream_unary(self, *args: Any, **kwargs: Any) -> Any:
        """See grpc.aio.Channel."""
        return self._authorized(self._channel.stream_unary(*args, **kwargs))

    def stream_stream(self, *args: Any, **kwargs: Any) -> Any:
        """See grpc.aio.Channel."""
        return self._authorized(self._channel.stream_stream(*args, **kwargs))

    def _authorized(self, method: Method) -> Method:
        def call(*args: Any, metadata: Any = (), **kwargs: Any) -> Any:
            said = (*(metadata or ()), ("authorization", f"Bearer {self._token()}"))
            return method(*args, metadata=said, **kwargs)

        return call
