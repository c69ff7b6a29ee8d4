"""Client channels: their limits, and how fast they notice and mend a broken connection."""

from __future__ import annotations

import grpc

MAX_MESSAGE_BYTES = 16 * 2**20
"""Of any message, both ways. Payloads travel as handles or in chunks, so this bounds only token ids."""


def open_channel(address: str) -> grpc.aio.Channel:
    """A plaintext channel to host:port with a connection of its own. The caller closes it."""
    return grpc.aio.insecure_channel(
        address,
        options=(
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            # Frames of 16 KiB, the default, cost a memory slice each.
            ("grpc.http2.max_frame_size", 2**20),
            ("grpc.use_local_subchannel_pool", 1),
            # Addresses are those of servers; a proxy from the environment never leads to one.
            ("grpc.enable_http_proxy", 0),
            # Retries have one owner: retry.py.
            ("grpc.enable_retries", 0),
            ("grpc.initial_reconnect_backoff_ms", 100),
            # No backoff, whatever its name: how long one attempt to connect may take, up to the server's first frame.
            ("grpc.min_reconnect_backoff_ms", 5_000),
            ("grpc.max_reconnect_backoff_ms", 2_000),
            ("grpc.keepalive_time_ms", 15_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.keepalive_permit_without_calls", 1),
        ),
    )
