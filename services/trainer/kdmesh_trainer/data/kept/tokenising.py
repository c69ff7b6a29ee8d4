"""Turns pieces of a dataset's files into arrays of token ids, in this process or in several."""

from __future__ import annotations

import logging
import os
import signal
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection

import numpy as np
import numpy.typing as npt

from kdmesh import log
from kdmesh.errors import DataError, KdmeshError
from kdmesh.types import Int32Array
from kdmesh_trainer.data.encoding.recipe import Encoder, EncoderRecipe
from kdmesh_trainer.data.files.held_out_rows import trained_rows
from kdmesh_trainer.data.files.piece import Piece
from kdmesh_trainer.data.files.readers import ChatFiles
from kdmesh_trainer.data.kept.forms import PromptForm, SequenceForm, sequence_form
from kdmesh_trainer.data.prompts import PromptPolicy, PromptReport, encode_prompts
from kdmesh_trainer.data.sequences import DataReport, encode_chats

# Pieces that each process has beside the one that it works on, so that it need not wait for the next.
_AHEAD = 1
_END_S = 5.0  # longest wait for the exit code of a process whose pipe is broken


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What is made of which files; plain values, which another process may be given."""

    recipe: EncoderRecipe
    chats: ChatFiles
    prompts: PromptPolicy | None = None  # None: sequences, under the policies of the recipe's data

    @property
    def sequence_form(self) -> SequenceForm:
        """Of the sequences."""
        return sequence_form(
            self.recipe.data,
            takes_chunks=self.recipe.takes_chunks,
            teacher_names=self._names,
            has_weights=self.chats.columns.weight is not None,
        )

    @property
    def prompt_form(self) -> PromptForm:
        """Of the prompts."""
        return PromptForm(has_context=self.recipe.data.teacher_context is not None, teacher_names=self._names)

    @property
    def _names(self) -> tuple[str, ...]:
        teacher = self.chats.columns.teacher
        return () if teacher.name is None else teacher.known_names


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Taken:
    """What one piece gave."""

    lengths: npt.NDArray[np.int64]  # of the arrays of all records, record by record
    numbers: Int32Array  # all arrays, one after the other
    report: DataReport | PromptReport


def take(work: Work, encoder: Encoder, piece: Piece) -> Taken:
    """Read and encode one piece. Raises DataError as load_sequences and load_prompts."""
    chats = trained_rows(work.chats.read(piece), work.recipe.data.held_out_share)
    if work.prompts is None:
        dataset = encode_chats(chats, encoder, work.recipe.data)
        form = work.sequence_form
        return _taken([array for s in dataset.sequences for array in form.arrays(s)], dataset.report)
    found = encode_prompts(chats, encoder, work.prompts)
    return _taken([array for p in found.prompts for array in work.prompt_form.arrays(p)], found.report)


def tokenised(work: Work, encoder: Encoder, *, workers: int) -> Generator[tuple[Piece, Taken], None, None]:
    """Every piece of the files with what it gave, in order, whoever took it.

    Args:
        encoder: of the work's recipe; what this process uses where there are no workers.
        workers: processes; they end with the iteration, so close it when it is not run to its end.

    Raises:
        DataError: a row is refused, the first of them in the order of the files, or a process died.
    """
    if workers == 0:
        for piece in work.chats.pieces():
            yield piece, take(work, encoder, piece)
        return
    with _started(work, workers) as processes:
        given: deque[tuple[Piece, _Worker]] = deque()
        for number, piece in enumerate(work.chats.pieces()):
            if len(given) == workers * (1 + _AHEAD):
                first, worker = given.popleft()
                yield first, worker.taken(first)
            processes[number % workers].give(piece)
            given.append((piece, processes[number % workers]))
        for piece, worker in given:
            yield piece, worker.taken(piece)


class _Worker:
    """A process that tokenises pieces, one after the other."""

    def __init__(self, work: Work, number: int) -> None:
        # Spawned: a fork of a process with threads, as this one is, may hang. The child gets one end of the pipe
        # and nothing else, so however this process ends, that end is closed for the child, which then ends too.
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, work, number), name=f"tokeniser-{number}", daemon=True
        )
        self._process.start()
        theirs.close()

    def give(self, piece: Piece) -> None:
        """Have it take a piece after those that it was given before."""
        with suppress(BrokenPipeError, ConnectionResetError):  # `taken` says so
            self._pipe.send(piece)

    def taken(self, piece: Piece) -> Taken:
        """What the first piece gave that has not been asked for; blocks."""
        try:
            found = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            raise DataError(f"{piece.path}: a process that tokenised it {self._end()}") from None
        if isinstance(found, KdmeshError):
            raise found
        assert isinstance(found, Taken)
        return found

    def close(self) -> None:
        """End it."""
        self._pipe.close()
        self._process.terminate()
        self._process.join()

    def _end(self) -> str:
        self._process.join(_END_S)
        code = self._process.exitcode
        if code is None or code >= 0:
            return f"ended with exit code {code}; what it wrote before says why"
        cause = ", perhaps because there was no memory left" if -code == signal.SIGKILL else ""
        return f"was ended by {signal.Signals(-code).name}{cause}"


@contextmanager
def _started(work: Work, workers: int) -> Iterator[Sequence[_Worker]]:
    processes: list[_Worker] = []
    try:
        processes.extend(_Worker(work, number) for number in range(workers))
        yield processes
    finally:
        for process in processes:
            process.close()


def _serve(pipe: Connection, work: Work, number: int) -> None:
    """What a worker does until its pipe is closed."""
    # A terminal's Ctrl-C reaches it too, but how this ends is for the process that has the other end to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there are as many processes as there shall be
    if number == 0:
        log.configure("trainer", rank=int(os.environ.get("RANK", "0")))
    else:
        logging.disable()  # one warning of a template is enough
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            encoder = work.recipe.encoder(work.recipe.tokenizer())
            while True:
                pipe.send(take(work, encoder, pipe.recv()))
        except KdmeshError as error:
            pipe.send(error)


def _taken(arrays: Sequence[Int32Array], report: DataReport | PromptReport) -> Taken:
    return Taken(
        lengths=np.array([len(array) for array in arrays], np.int64),
        numbers=np.concatenate([np.empty(0, np.int32), *arrays]).astype(np.int32),
        report=report,
    )
