"""What a service of a run says, kept in a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from kdmesh.errors import ConfigError
from kdmesh.log import is_urgent


@contextmanager
def kept_in(path: Path, *, show: Callable[[str], object]) -> Iterator[Callable[[str], None]]:
    """What takes a service's output: every line is added to the file, and those that need a person are shown too.

    A disk that is full costs lines, which is shown once. The service, whose output must be read on, goes on.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = FileIO(str(path), "a")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None
    is_whole = True

    def on_line(line: str) -> None:
        nonlocal is_whole
        try:
            file.write(f"{line}\n".encode())
        except OSError as error:
            if is_whole:
                show(f"{path} cannot be written, and lacks what comes now: {error.strerror}")
            is_whole = False
        if is_urgent(line):
            show(line)

    with file:
        yield on_line
