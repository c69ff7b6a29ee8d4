"""How many files a process may have open."""

from __future__ import annotations

import resource

from kdmesh.errors import ConfigError

LEAST = 128
"""What a service needs at least: a rank of a small job has 40 open, its teacher 60, and C libraries die without a word
where they get none."""

_MOST = 65_536  # more does nobody any good, and programs that go through all of them take long


def most_open_files() -> int:
    """What `raise_open_files` raises the limit to."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limits = [limit for limit in (hard, max(_MOST, soft)) if limit != resource.RLIM_INFINITY]
    return min(limits, default=_MOST)


def raise_open_files() -> None:
    """Let this process, and those that it starts, have as many as it may.

    Raises:
        ConfigError: that is fewer than a service needs.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = most_open_files()
    if most < LEAST:
        raise ConfigError(
            f"this process may have {most} files open at most, and needs {LEAST}: raise the limit, with ulimit -n in "
            "the shell, LimitNOFILE in systemd, or --ulimit nofile of a container"
        )
    if soft != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
