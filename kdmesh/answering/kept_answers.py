"""Keeps the answers of a dataset that is being written, so that the same command goes on behind them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

from kdmesh.answering.answer_report import Counts
from kdmesh.errors import ConfigError, DataError
from kdmesh.file_lock import lock
from kdmesh.weights import digests

_DIGEST = "digest"


class KeptAnswers:
    """A file beside the dataset: what was asked, then a line for each prompt that is done, in the order they were.

    Each such line has a digest of its own.
    """

    def __init__(self, path: Path, file: FileIO) -> None:
        self.path = path
        self.written = 0  # answers
        self.damaged = 0  # lines that are not what was written: their prompts are not done
        self.counts = Counts()
        self.is_needed = file.tell() > 0
        """Whether it holds an answer that is nowhere else."""
        self._file = file
        self._places: dict[int, int] = {}  # of the line of each prompt that is done

    @property
    def prompts(self) -> int:
        """How many are done."""
        return len(self._places)

    def __contains__(self, number: object) -> bool:
        """Whether prompt `number` is done."""
        return number in self._places

    def resume(self, asked: Mapping[str, Any]) -> None:
        """Count what is there, pass over what is damaged, and drop a last line that was never finished.

        Args:
            asked: all that the answers follow from, as JSON takes it.

        Raises:
            ConfigError: they are answers to something else, or it cannot be written.
        """
        own = _line(asked)
        end = 0
        with self.path.open("rb") as file:
            first = file.readline()
            if first.endswith(b"\n"):
                if first != own:
                    raise ConfigError(
                        f"{self.path} holds answers to something else ({_differences(first, own)}): let the command "
                        "that they belong to end, or remove the file"
                    )
                end = len(own)
                for entry, size_bytes in _entries(file):
                    if entry is None:
                        self.damaged += 1
                    else:
                        self._count(entry, end)
                    end += size_bytes
        self._file.truncate(end)
        if not end:
            self._append(own)
        self.is_needed = self.prompts > 0

    def add(self, number: int, rows: Sequence[Mapping[str, Any]], counts: Counts) -> None:
        """Those to prompt `number`. Raises ConfigError: they cannot be written."""
        entry = {"prompt": number, "rows": rows, "counts": asdict(counts)}
        place = self._file.seek(0, os.SEEK_END)
        self._append(_line({**entry, _DIGEST: _digest(entry)}))
        self._count(entry, place)
        self.is_needed = True

    def publish(self, output: Path) -> None:
        """Make the dataset of them, in the order of the prompts, whole or not at all.

        Raises:
            ConfigError: it cannot be written.
            DataError: answers are not what was written, although they were when they were counted.
        """
        whole = output.with_name(f"{output.name}.writing")
        try:
            with self.path.open("rb") as file, whole.open("wb") as rows:
                for number, place in sorted(self._places.items()):
                    file.seek(place)
                    if (entry := _entry(file.readline())) is None:
                        raise DataError(f"the answers to prompt {number} in {self.path} were damaged since the start")
                    rows.writelines(_line(row) for row in entry["rows"])
            os.replace(whole, output)
        except OSError as error:
            raise ConfigError(f"cannot write {output}: {error.strerror}") from None
        finally:
            whole.unlink(missing_ok=True)
        self.is_needed = False

    def _count(self, entry: Mapping[str, Any], place: int) -> None:
        self._places[entry["prompt"]] = place
        self.written += len(entry["rows"])
        self.counts += Counts(**entry["counts"])

    def _append(self, line: bytes) -> None:
        try:
            while line:  # a disk that fills up takes a part
                line = line[self._file.write(line) :]
        except OSError as error:
            raise ConfigError(f"cannot write {self.path}: {error.strerror}") from None


@contextmanager
def kept_answers(output: Path) -> Iterator[KeptAnswers]:
    """Those on the way to `output`, which no other process adds to meanwhile; the file goes when nobody needs it.

    Raises:
        ConfigError: nothing can be written or locked there, or another process is at it.
    """
    path = output.with_name(f"{output.name}.part")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        file = FileIO(str(path), "a")
    except OSError as error:
        raise ConfigError(f"cannot write {output}: {error.strerror}") from None
    with file:
        lock(file, refusal=f"another process is writing {path}")
        kept = KeptAnswers(path, file)
        try:
            yield kept
        finally:
            if not kept.is_needed:
                path.unlink(missing_ok=True)


def _entries(file: BinaryIO) -> Iterator[tuple[dict[str, Any] | None, int]]:
    """What the rest of the file holds, up to a line without an end, and the size of each in bytes; None: damaged."""
    for line in file:
        if line.endswith(b"\n"):
            yield _entry(line), len(line)


def _entry(line: bytes) -> dict[str, Any] | None:
    """What `add` wrote; None: it is something else by now."""
    try:
        entry = dict(json.loads(line))
        digest = entry.pop(_DIGEST)
        number, rows = entry["prompt"], entry["rows"]
        Counts() + Counts(**entry["counts"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    is_whole = isinstance(number, int) and isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
    return entry if digest == _digest(entry) and is_whole else None


def _digest(entry: Mapping[str, Any]) -> str:
    return digests.Running(_line(entry)).hexdigest()


def _line(value: Mapping[str, Any]) -> bytes:
    # Half a surrogate pair, in a key of a prompt that nobody reads, is the escape that it is in JSON.
    return json.dumps(value, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"


def _differences(first: bytes, own: bytes) -> str:
    """Names of what differs."""
    try:
        theirs, ours = json.loads(first), json.loads(own)
    except ValueError:
        theirs, ours = None, {}
    if not isinstance(theirs, dict):
        return "in no form that is known"
    return f"{', '.join(name for name in {**ours, **theirs} if theirs.get(name) != ours.get(name))} differ"
