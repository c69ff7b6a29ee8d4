"""A calendar's clock that jumps, for the processes of a test alone; the clock that only ticks is left as it is."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path


class Clock:
    """Read by every process that is started with `environment`."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.jump(0)

    def environment(self) -> Mapping[str, str]:
        """What a process needs to go by it."""
        files = metadata.files("libfaketime") or []
        (library,) = [file for file in files if file.name == "libfaketime.so.1"]
        return {
            "LD_PRELOAD": str(library.locate()),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "FAKETIME_CACHE_DURATION": "1",  # s between looks at the file
        }

    def jump(self, hours: int) -> None:
        """So many hours before or after the real time."""
        unfinished = self._file.with_suffix(".new")
        unfinished.write_text(f"{hours * 3600:+d}\n")
        unfinished.replace(self._file)
