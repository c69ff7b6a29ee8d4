"""A teacher's rows where several ranks hold a row of tokens together: asked for once, and handed to who needs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdmesh.errors import ModelMismatch
from kdmesh.models.context import ContextGroup
from kdmesh.models.packing import moved, slice_bounds
from kdmesh.types import TokenSequence
from kdmesh_trainer.data.encoding.sides import some_rows
from kdmesh_trainer.mesh import Mesh
from kdmesh_trainer.sources.batches import CopiedRows, MicroBatch, PanelPart, PanelRows, PendingRows, copied

Int64Array = npt.NDArray[np.int64]

Ask = Callable[[tuple[TokenSequence, ...]], PendingRows]
"""Asks for the rows of some sequences, at least one."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NO_ANSWER = -1  # instead of a weight version


def asking(
    sequences: tuple[TokenSequence, ...],
    ask: Ask,
    context: ContextRows | None,
    *,
    homes: Sequence[int | None] | None = None,
) -> MicroBatch:
    """A micro-batch of these sequences, whose rows are asked for.

    Args:
        context: None: each rank has micro-batches of its own.
        homes: see ContextRows.asking.
    """
    if context is not None and sequences:
        return context.asking(sequences, ask, homes=homes)
    return MicroBatch(sequences=sequences, teacher=ask(sequences) if sequences else None)


class ContextRows:
    """Asks for the rows of micro-batches that a group of ranks holds together.

    Each sequence is asked for whole, by one rank: so a teacher reads every token once, however many ranks hold the
    sequence, and what it may have kept of the sequence fits. Rows that another rank needs are handed to it when they
    are here.
    """

    def __init__(self, context: ContextGroup, device: torch.device, *, names: Sequence[str]) -> None:
        """
        Args:
            device: where rows are handed over, and then lie.
            names: of the teachers, in an order that is the same on every rank; that of the only one is empty.
        """
        self._context = context
        self._device = device
        self._names = tuple(names)

    @classmethod
    def of(cls, mesh: Mesh, names: Sequence[str]) -> ContextRows | None:
        """This rank's; None where it holds whole rows of tokens."""
        return None if mesh.context is None else cls(mesh.context, mesh.device, names=names)

    def asking(
        self, sequences: tuple[TokenSequence, ...], ask: Ask, *, homes: Sequence[int | None] | None = None
    ) -> MicroBatch:
        """A micro-batch of which this rank asks for its part, at least one sequence in all.

        Args:
            homes: the rank of the group that is to ask for each sequence; None: the one with its middle loss token,
                so that few rows must be handed over.
        """
        held_P = self._held_P(sequences)
        askers = _askers(sequences, held_P, homes or [None] * len(sequences))
        members = [n for n, asker in enumerate(askers) if asker == self._context.place]
        asked = tuple(sequences[n] for n in members)
        handed = _HandedRows(
            ask(asked) if asked else None,
            asked_rows=_rows_of(members, sequences),
            held_P=held_P,
            context=self._context,
            device=self._device,
            names=self._names,
        )
        return MicroBatch(
            sequences=sequences, teacher=handed, asked=asked, held=tuple(_cut(sequences, self._bounds(held_P)))
        )

    def held(self, sequences: Sequence[TokenSequence]) -> slice:
        """Which of all their rows are of tokens that this rank holds."""
        return self._bounds(self._held_P(sequences))

    def _bounds(self, held_P: Int64Array) -> slice:
        first, stop = held_P[self._context.place : self._context.place + 2]
        return slice(int(first), int(stop))

    def _held_P(self, sequences: Sequence[TokenSequence]) -> Int64Array:
        """[ranks + 1] rank p holds the tokens of the rows from [p] up to [p + 1]."""
        ends = np.cumsum([sequence.num_tokens for sequence in sequences])
        starts = ends - [sequence.num_tokens for sequence in sequences]
        tokens_R = np.concatenate([s.positions + start for s, start in zip(sequences, starts, strict=True)])
        return np.searchsorted(tokens_R, np.asarray(slice_bounds(int(ends[-1]), self._context.size)))


def _cut(sequences: Sequence[TokenSequence], rows: slice) -> Iterator[TokenSequence]:
    """Those that have some of these rows, with them alone."""
    begin = 0
    for sequence in sequences:
        first, stop = max(0, rows.start - begin), min(sequence.num_rows, rows.stop - begin)
        if first < stop:
            yield some_rows(sequence, slice(first, stop))
        begin += sequence.num_rows


def _askers(sequences: Sequence[TokenSequence], held_P: Int64Array, homes: Sequence[int | None]) -> list[int]:
    """The rank of the group that asks for each sequence."""
    rows = np.cumsum([0, *(sequence.num_rows for sequence in sequences)])
    middle = _holders(rows[:-1] + np.diff(rows) // 2, held_P)
    return [int(own) if home is None else home for own, home in zip(middle, homes, strict=True)]


def _holders(rows: Int64Array, held_P: Int64Array) -> Int64Array:
    """The rank that holds the token of each row."""
    return np.searchsorted(held_P, rows, side="right") - 1


def _rows_of(members: Sequence[int], sequences: Sequence[TokenSequence]) -> Int64Array:
    """Where the rows of the sequences `members` are among those of all."""
    rows = np.cumsum([0, *(sequence.num_rows for sequence in sequences)])
    return np.concatenate([np.empty(0, np.int64), *(np.arange(rows[n], rows[n + 1]) for n in members)]).astype(np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """What a rank tells the others of a teacher's answer to it."""

    weight_version: int
    width: int
    dtype: int  # in _DTYPES
    counts: tuple[int, ...]  # rows that each rank needs of it

    @classmethod
    def read(cls, told: Sequence[int]) -> _Answer:
        version, width, dtype, *counts = told
        return cls(weight_version=version, width=width, dtype=dtype, counts=tuple(counts))

    def told(self) -> list[int]:
        return [self.weight_version, self.width, self.dtype, *self.counts]

    @property
    def is_one(self) -> bool:
        """Whether the teacher was asked at all."""
        return self.weight_version != _NO_ANSWER


class _HandedRows:
    """PendingRows that the ranks of a group hand to each other when those that they asked for are here."""

    def __init__(
        self,
        own: PendingRows | None,
        *,
        asked_rows: Int64Array,
        held_P: Int64Array,
        context: ContextGroup,
        device: torch.device,
        names: tuple[str, ...],
    ) -> None:
        """
        Args:
            own: what this rank asked for; None: nothing.
            asked_rows: which of the micro-batch's rows those are, ascending.
        """
        self._own = own
        self._asked_rows = asked_rows
        self._held_P = held_P
        self._context = context
        self._device = device
        self._names = names

    def wait(self) -> CopiedRows | PanelRows:
        """See PendingRows. Collective of the group: this rank waits until the others have what they asked for.

        Raises:
            ModelMismatch: the ranks' rows of one teacher are not all of one weight version.
        """
        own, self._own = self._own, None
        parts = {part.name: part for part in self._parts(own)}
        mine = [self._answer(parts.get(name)) for name in self._names]
        told = self._context.tell([number for answer in mine for number in answer.told()])
        size = len(mine[0].told())
        handed = []
        for n, name in enumerate(self._names):
            answers = [_Answer.read(of_rank[n * size : (n + 1) * size]) for of_rank in told]
            if any(answer.is_one for answer in answers):
                handed.append(self._hand_over(name, parts.pop(name, None), answers))
        if self._names == ("",):
            (only,) = handed
            return CopiedRows(rows_RD=only.rows.rows_RD, weight_version=only.rows.weight_version)
        return PanelRows(parts=tuple(handed))

    def _parts(self, own: PendingRows | None) -> Iterator[PanelPart]:
        """What the teachers answered to this rank, copied: others may still wait for memory that their rows need."""
        answer = None if own is None else own.wait()
        if isinstance(answer, PanelRows):
            yield from (replace(part, rows=copied(part.rows, self._device)) for part in answer.parts)
        elif answer is not None:
            # Whoever waits for a single teacher counts by itself.
            yield PanelPart(name="", rows=copied(answer, self._device), index_R=None, num_tokens=0, wait_s=0.0)

    def _answer(self, part: PanelPart | None) -> _Answer:
        ranks = self._context.size
        if part is None:
            return _Answer(weight_version=_NO_ANSWER, width=0, dtype=0, counts=(0,) * ranks)
        counts = np.bincount(_holders(self._rows_of(part), self._held_P), minlength=ranks)
        rows_RD = part.rows.rows_RD
        return _Answer(
            weight_version=part.rows.weight_version,
            width=rows_RD.shape[1],
            dtype=_DTYPES.index(rows_RD.dtype),
            counts=tuple(counts.tolist()),
        )

    def _rows_of(self, part: PanelPart) -> Int64Array:
        """Which of the micro-batch's rows a teacher answered to this rank."""
        return self._asked_rows if part.index_R is None else self._asked_rows[part.index_R.numpy()]

    def _hand_over(self, name: str, part: PanelPart | None, answers: Sequence[_Answer]) -> PanelPart:
        """What this rank needs of one teacher's rows; collective where any rank needs those of another."""
        first = next(answer for answer in answers if answer.is_one)
        versions = {answer.weight_version for answer in answers if answer.is_one}
        if len(versions) > 1:
            raise ModelMismatch(
                f"the teacher's rows of one micro-batch have weight versions {sorted(versions)}; a step mixes none"
            )
        if part is None:
            rows_RD = torch.empty(0, first.width, dtype=_DTYPES[first.dtype], device=self._device)
            numbers = np.empty(0, np.int64)
        else:
            rows_RD, numbers = part.rows.rows_RD, self._rows_of(part)
        if any(answer.counts[rank] for asker, answer in enumerate(answers) for rank in self._others(asker)):
            rows_RD, numbers = self._exchange(rows_RD, numbers, answers)
        begin, end = self._held_P[self._context.place : self._context.place + 2]
        has_all = len(numbers) == end - begin
        return PanelPart(
            name=name,
            rows=CopiedRows(rows_RD=rows_RD, weight_version=first.weight_version),
            index_R=None if has_all else torch.from_numpy(numbers - begin),
            num_tokens=0 if part is None else part.num_tokens,
            wait_s=0.0 if part is None else part.wait_s,
        )

    def _others(self, rank: int) -> list[int]:
        return [other for other in range(self._context.size) if other != rank]

    def _exchange(self, rows_RD: Tensor, numbers: Int64Array, answers: Sequence[_Answer]) -> tuple[Tensor, Int64Array]:
        """Of all rows that the ranks have, each with its number, those of this rank's tokens, in order."""
        place = self._context.place
        sent, received = answers[place].counts, [answer.counts[place] for answer in answers]
        # Ascending rows are of ascending tokens, so they lie in the order of the ranks that need them.
        rows_RD = self._context.move_rows(rows_RD, sent=sent, received=received)
        moved_R1 = self._context.move_rows(torch.from_numpy(numbers)[:, None], sent=sent, received=received)
        numbers = moved_R1[:, 0].numpy()
        if (np.diff(numbers) > 0).all():
            return rows_RD, numbers
        order = np.argsort(numbers)
        return rows_RD.index_select(0, moved(torch.from_numpy(order), self._device)), numbers[order]
