"""Where what a command finds goes: whether it can be written, asked before it begins, and to who reads its streams."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from kdmesh.errors import ConfigError, KdmeshError

if TYPE_CHECKING:
    from rich.console import RenderableType

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def say(text: str) -> None:
    """Write to stdout. One who reads no further, as `head`, misses the rest, and the command goes on."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        lead_nowhere(sys.stdout)


def tell(line: str) -> None:
    """Write to stderr what a person may want to know. When nobody can read it any more, the command goes on."""
    try:
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
    except OSError:  # Ctrl-C has ended `tee`, too; or the terminal is gone
        lead_nowhere(sys.stderr)


def lead_nowhere(stream: TextIO) -> None:
    """Where the rest goes, what is still buffered included."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def show(*parts: RenderableType, width: int, wraps: bool = True) -> None:
    """Write tables and sentences to stdout; where that is no terminal, without the blanks that fill a terminal's lines.

    Args:
        width: letters in a line where stdout is no terminal.
        wraps: whether to wrap what is longer than a line.
    """
    from rich.console import Console

    is_terminal = sys.stdout.isatty()
    console = Console(
        file=sys.stdout,
        highlight=False,
        markup=False,  # many of the words are of others
        soft_wrap=not wraps,
        width=None if is_terminal else width,
    )
    with console.capture() as captured:
        for part in parts:
            console.print(part)
    text = captured.get()
    say(text if is_terminal else "".join(f"{line.rstrip()}\n" for line in text.splitlines()))


def say_error(error: KdmeshError) -> None:
    """Write to stderr what ends a command, as every command does."""
    tell(f"Error: {error}")


def say_full(error: OSError) -> None:
    """Write to stderr that a stream, as stdout, is led to a disk that is full. Raises `error` if it says otherwise."""
    if error.errno not in _FULL or error.filename is not None:
        raise error
    lead_nowhere(sys.stdout)  # with what is still buffered, which would fail again at exit
    tell(f"Error: nothing more can be written: {error.strerror}")


def make_writable(path: Path) -> None:
    """Make the directory that `path` lies in, and try a file there; one at `path` is untouched.

    Raises:
        ConfigError: nothing can be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            path.open("ab").close()
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None


def refused_directory(path: Path) -> str | None:
    """Why no files can be written in a directory, which may not be there yet; None: they can. Nothing of it is left.

    Raises:
        OSError: it cannot be looked at.
    """
    nearest = next(each for each in (path, *path.absolute().parents) if each.exists() or each.is_symlink())
    if not nearest.is_dir():
        return f"{nearest} is not a directory"
    try:
        with tempfile.TemporaryDirectory(dir=nearest, prefix=".kdmesh-") as trial:
            made = Path(trial, *path.absolute().parts[len(nearest.absolute().parts) :])
            made.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=made).close()
    except OSError as error:
        return f"{path} cannot be written: {error.strerror} in {nearest}"
    return None


def refuse_own_input(path: Path, inputs: Mapping[str, Path]) -> None:
    """Returns when writing `path` replaces none of the files that the command reads.

    Args:
        inputs: each of them, by the option or key that names it.

    Raises:
        ConfigError: it is one of them.
    """
    for key, read in inputs.items():
        if path.exists() and read.exists() and path.samefile(read):
            raise ConfigError(f"--output {path} is the file that {key} names, which would be lost; give another")


def refuse_to_replace(path: Path, *, is_wanted: bool) -> None:
    """Returns when writing `path` loses nothing, or that is wanted.

    Raises:
        ConfigError: there is a file, and something in it.
    """
    if not is_wanted and path.is_file() and path.stat().st_size:
        raise ConfigError(f"--output {path} is there already, and would be lost: give another, or --overwrite")
