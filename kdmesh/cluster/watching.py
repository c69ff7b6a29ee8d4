"""Changes of a cluster's objects as they happen, until told to stop."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One object that was added, modified or deleted."""

    kind: str  # ADDED, MODIFIED, DELETED; ERROR: what was watched from is too old
    thing: dict[str, Any]


class Watch:
    """Iterates over changes; ends when the server ends it, or another thread closes it.

    Args:
        response: an open answer of the API server, which it writes lines to.
    """

    def __init__(self, response: Any) -> None:
        self._response = response

    def __iter__(self) -> Iterator[Change]:
        from urllib3.exceptions import HTTPError

        rest = b""
        try:
            for chunk in self._response.stream(2**16):
                *lines, rest = (rest + chunk).split(b"\n")
                for line in filter(None, lines):
                    said = json.loads(line)
                    yield Change(kind=said["type"], thing=said["object"])
        except (HTTPError, OSError, ValueError):  # closed, or the connection was lost
            return
        finally:
            self._response.close()

    def close(self) -> None:
        """End it. Any thread."""
        with suppress(OSError, ValueError, RuntimeError):  # the last: it has ended already
            self._response.shutdown()
