"""What guards a server, from its configuration."""

from __future__ import annotations

import logging
from collections.abc import Callable

from kdmesh.auth.authority import Authority
from kdmesh.auth.certificates import watch_certificate
from kdmesh.auth.config import AuthConfig, is_loopback
from kdmesh.auth.security import Security
from kdmesh.serving.config import ListenConfig
from kdmesh.serving.jobs.metrics import JobMetrics

log = logging.getLogger(__name__)


def open_security(config: ListenConfig, metrics: JobMetrics) -> Security:
    """Read what the configuration names, and say who can use the server. Raises ConfigError."""
    refusals = metrics.counter("refused_callers", "Calls of who is not known, or may not do this.", "reason")
    authority = Authority(
        config.auth,
        on_failure=_counted(config.auth, metrics),
        on_refusal=lambda reason: refusals.labels(reason).inc(),
    )
    certificate = None
    if config.tls is not None:
        certificate = watch_certificate(config.tls, metrics.unusable("tls"))
    _tell(config)
    return Security(authority, certificate)


def _counted(auth: AuthConfig | None, metrics: JobMetrics) -> Callable[[str], None]:
    """Counts changed files of identities by the key that names them."""
    named = {} if auth is None else {"tokens": auth.tokens, "jwt": auth.jwt}
    counts = {key: metrics.unusable(key) for key, named_there in named.items() if named_there is not None}
    return lambda key: counts[key]()


def _tell(config: ListenConfig) -> None:
    is_far = not is_loopback(config.host)
    if config.auth is None and is_far:
        log.warning("whoever reaches this server may use it", extra={"host": config.host})
    elif config.auth is None:
        log.info("any process of this machine may use this server, and no other", extra={"host": config.host})
    elif config.tls is None and is_far:
        log.warning("tokens travel in the clear, unless something else encrypts them", extra={"host": config.host})
