"""Client channels: their limits, how they get in, and how fast they notice and mend a broken connection."""

from __future__ import annotations

import grpc

from kdmesh.auth.config import OPEN_ACCESS, AccessConfig, ClientTlsConfig
from kdmesh.auth.tokens import read_token
from kdmesh.auth.watched import Watched, read_bytes
from kdmesh.errors import ConfigError
from kdmesh.rpc.authorized_channel import AuthorizedChannel

MAX_MESSAGE_BYTES = 16 * 2**20
"""Of any message, both ways. Payloads travel as handles or in chunks, so this bounds only token ids."""

KEEPALIVE_OPTIONS = (
    ("grpc.keepalive_time_ms", 15_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # By default only two pings go out while no data does, and then one a minute.
    ("grpc.http2.max_pings_without_data", 0),
)
"""Of both ends: each asks after the other, and so notices within half a minute that a host is gone without a word."""

_OPTIONS: tuple[tuple[str, int | str], ...] = (
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
    *KEEPALIVE_OPTIONS,
)


class UnusableAccess(ConfigError):
    """A file that an AccessConfig names cannot be used as it is now."""


def open_channel(address: str, access: AccessConfig = OPEN_ACCESS) -> grpc.aio.Channel:
    """A channel to host:port with a connection of its own. The caller closes it.

    Raises:
        UnusableAccess: a file that `access` names cannot be used.
        ConfigError: its token would travel in the clear.
    """
    if (refusal := access.refusal(address)) is not None:
        raise ConfigError(refusal)
    token_file = access.token_file
    try:
        token = None if token_file is None else Watched((token_file,), lambda: read_token(token_file))
        channel = _plain_or_encrypted(address, access.tls)
    except ConfigError as error:
        raise UnusableAccess(str(error)) from None
    return channel if token is None else AuthorizedChannel(channel, token.current)


def _plain_or_encrypted(address: str, tls: ClientTlsConfig | None) -> grpc.aio.Channel:
    if tls is None:
        return grpc.aio.insecure_channel(address, options=_OPTIONS)
    ca, key, chain = (None if path is None else read_bytes(path) for path in (tls.ca, tls.key, tls.cert))
    name = () if tls.server_name is None else (("grpc.ssl_target_name_override", tls.server_name),)
    credentials = grpc.ssl_channel_credentials(ca, key, chain)
    return grpc.aio.secure_channel(address, credentials, options=(*_OPTIONS, *name))
