"""What SGLang finds in the process that starts it, and what it changes there and must not keep."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping


@contextlib.contextmanager
def surroundings(*, directory: str, variables: Mapping[str, str]) -> Iterator[None]:
    """For the time of SGLang's start.

    Args:
        directory: where its sockets and files go.
        variables: of the environment, for its processes alone.
    """
    root = logging.getLogger()
    handlers, level, temporary = root.handlers[:], root.level, tempfile.tempdir
    logging.getLogger("sglang").setLevel(logging.WARNING)
    os.environ.update(variables)
    tempfile.tempdir = directory  # its sockets then go when ours do
    try:
        yield
    finally:
        for name in variables:
            del os.environ[name]
        tempfile.tempdir = temporary
        root.handlers[:] = handlers  # it takes them all away
        root.setLevel(level)


def ignore_its_signal() -> None:
    """Let SGLang's way of telling that a process of its own failed do nothing; we see that ourselves, and say more."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGQUIT, lambda number, frame: None)
