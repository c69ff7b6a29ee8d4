"""Records of int32 arrays in files that are mapped, so that they take no memory of their own.

tokens.bin   every array, one after the other: little-endian int32
index.bin    where each array ends, counted in numbers: little-endian int64, after a 0
meta.json    what is said of the records, with the sizes and digests of both files, and a digest of its own
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from kdmesh.types import Int32Array
from kdmesh.weights.digests import Running

Int64Array = npt.NDArray[np.int64]

_TOKENS, _INDEX, _META = "tokens.bin", "index.bin", "meta.json"
_READ_BYTES = 4 * 2**20


class Damaged(Exception):
    """Files that are not what was written, with the reason."""


class Records:
    """Records of `num_arrays` arrays each, in files that are mapped."""

    def __init__(self, directory: Path, num_arrays: int) -> None:
        """Nothing is compared with any digest; see `opened`."""
        # Plain arrays over the maps: a slice of a memmap takes as long as a record.
        self._index: Int64Array = np.asarray(np.memmap(directory / _INDEX, "<i8", "r"))
        self._numbers: Int32Array = np.asarray(np.memmap(directory / _TOKENS, "<i4", "r"))
        self._num_arrays = num_arrays

    def __len__(self) -> int:
        return (len(self._index) - 1) // self._num_arrays

    def arrays(self, number: int) -> list[Int32Array]:
        """Those of record `number`, which is at least 0 and below the length; copies."""
        first = number * self._num_arrays
        edges = self._index[first : first + self._num_arrays + 1].tolist()
        record: Int32Array = np.array(self._numbers[edges[0] : edges[-1]], np.int32)
        return [record[begin - edges[0] : end - edges[0]] for begin, end in itertools.pairwise(edges)]


class RecordWriter:
    """Writes records into a directory, for the length of a `with`. Blocks; raises OSError."""

    def __init__(self, directory: Path) -> None:
        """The directory is there, and empty."""
        self._directory = directory
        self._files = {name: (directory / name).open("wb") for name in (_TOKENS, _INDEX)}
        self._digests = {name: Running() for name in self._files}
        self._sizes = dict.fromkeys(self._files, 0)
        self._end = 0
        self._put(_INDEX, np.zeros(1, "<i8"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()

    def add(self, lengths: Int64Array, numbers: Int32Array) -> None:
        """Add whole records: the length of each of their arrays, and all arrays one after the other."""
        ends = self._end + np.cumsum(lengths)
        self._put(_INDEX, ends.astype("<i8"))
        self._put(_TOKENS, numbers.astype("<i4"))
        self._end += len(numbers)

    def flush(self) -> None:
        """Let `Records` see all of them."""
        for file in self._files.values():
            file.flush()

    def finish(self, said: Mapping[str, Any]) -> None:
        """Write what is said of the records, which are complete."""
        self.flush()
        digests = {name: digest.hexdigest() for name, digest in self._digests.items()}
        meta = {"said": said, "sizes": self._sizes, "digests": digests}
        (self._directory / _META).write_text(json.dumps({"meta": meta, "digest": _digest_of_meta(meta)}, indent=1))

    def _put(self, name: str, array: npt.NDArray[Any]) -> None:
        octets = array.tobytes()
        self._files[name].write(octets)
        self._digests[name].update(octets)
        self._sizes[name] += len(octets)


def opened(directory: Path, num_arrays: int) -> tuple[Records, dict[str, Any]]:
    """The records in a directory, and what is said of them. Reads all of it once.

    Raises:
        FileNotFoundError: there is no such directory.
        Damaged: a file is missing, or not what was written.
        OSError: one cannot be read now, which says nothing of what it holds.
    """
    if not directory.is_dir():
        raise FileNotFoundError(directory)
    try:
        meta = _read_meta(directory)
        for name, size_bytes in meta["sizes"].items():
            if (found := (directory / name).stat().st_size) != size_bytes:
                raise Damaged(f"{name} has {found} bytes, and {size_bytes} were written")
            if _digest_of_file(directory / name) != meta["digests"][name]:
                raise Damaged(f"{name} has another digest than what was written")
    except FileNotFoundError as error:
        raise Damaged(str(error)) from None
    return Records(directory, num_arrays), meta["said"]


def _read_meta(directory: Path) -> dict[str, Any]:
    try:
        tree = json.loads((directory / _META).read_text())
        meta: dict[str, Any] = tree["meta"]
        told = tree["digest"]
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{_META} cannot be read: {error}") from None
    if _digest_of_meta(meta) != told:
        raise Damaged(f"{_META} has another digest than what was written")
    return meta


def _digest_of_meta(meta: Mapping[str, Any]) -> str:
    digest = Running()
    digest.update(json.dumps(meta, sort_keys=True).encode())
    return digest.hexdigest()


def _digest_of_file(path: Path) -> str:
    digest = Running()
    with path.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
