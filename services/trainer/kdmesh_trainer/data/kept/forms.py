"""Sequences and prompts as arrays of numbers, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, Protocol, TypeVar, assert_never

import numpy as np

from kdmesh.types import Int32Array, TokenSequence
from kdmesh_trainer.data.encoding.sides import (
    Addressed,
    Aligned,
    Chunks,
    InChunks,
    InContext,
    Prompt,
    addressed,
    teacher_side,
)
from kdmesh_trainer.sections.data_config import DataConfig

T = TypeVar("T")

SequenceKind = Literal["plain", "in context", "aligned", "in chunks"]

_EDGES = ("student_begins", "student_ends", "teacher_begins", "teacher_ends")


class Form(Protocol[T]):
    """How a dataset's items are kept: each as equally many arrays. None has images."""

    @property
    def num_arrays(self) -> int:
        """Of one item."""
        ...

    def arrays(self, item: T) -> list[Int32Array]:
        """Of an item."""
        ...

    def item(self, arrays: Sequence[Int32Array]) -> T:
        """That has these arrays."""
        ...


class SequenceForm:
    """A Form of sequences, all of one kind."""

    def __init__(self, kind: SequenceKind, teacher_names: tuple[str, ...], *, has_weights: bool) -> None:
        """
        Args:
            teacher_names: those of the teachers that each sequence has one of; empty: none is named.
            has_weights: whether some weigh another than 1.
        """
        self._kind = kind
        self._names = teacher_names
        self._has_weights = has_weights

    @property
    def num_arrays(self) -> int:
        """See Form."""
        own = {"plain": 2, "in context": 4, "aligned": 5, "in chunks": 4 + len(_EDGES)}[self._kind]
        return own + self._has_weights + bool(self._names)

    def arrays(self, item: TokenSequence) -> list[Int32Array]:
        """See Form."""
        assert not item.images
        [theirs] = teacher_side([item])
        arrays = [item.token_ids, item.positions]
        if self._kind != "plain":
            arrays += [theirs.token_ids, theirs.positions]
        if isinstance(item, Aligned):
            arrays.append(item.rows_A)
        elif isinstance(item, InChunks):
            arrays += [getattr(item.chunks, edge) for edge in _EDGES]
        if self._has_weights:
            arrays.append(np.array([item.weight], np.float64).view(np.int32))
        return arrays + _named(self._names, theirs.teacher_name if isinstance(theirs, Addressed) else "")

    def item(self, arrays: Sequence[Int32Array]) -> TokenSequence:
        """See Form."""
        sequence = self._sequence(arrays)
        if self._has_weights:
            stored = np.array(arrays[-1 - bool(self._names)], np.int32)  # a copy lies where a double may lie
            sequence = replace(sequence, weight=float(stored.view(np.float64)[0]))
        return addressed(sequence, self._names[int(arrays[-1][0])]) if self._names else sequence

    def _sequence(self, arrays: Sequence[Int32Array]) -> TokenSequence:
        token_ids, positions = arrays[:2]
        if self._kind == "plain":
            return TokenSequence(token_ids=token_ids, positions=positions)
        theirs = TokenSequence(token_ids=arrays[2], positions=arrays[3])
        match self._kind:
            case "in context":
                return InContext(token_ids=token_ids, positions=positions, teacher=theirs)
            case "aligned":
                return Aligned(token_ids=token_ids, positions=positions, teacher=theirs, rows_A=arrays[4])
            case "in chunks":
                edges = dict(zip(_EDGES, arrays[4 : 4 + len(_EDGES)], strict=True))
                return InChunks(token_ids=token_ids, positions=positions, teacher=theirs, chunks=Chunks(**edges))
            case _:
                assert_never(self._kind)


class PromptForm:
    """A Form of prompts, which their teacher reads as the student does, or all of them otherwise."""

    def __init__(self, *, has_context: bool, teacher_names: tuple[str, ...]) -> None:
        """`teacher_names` as SequenceForm's."""
        self._has_context = has_context
        self._names = teacher_names

    @property
    def num_arrays(self) -> int:
        """See Form."""
        return 1 + self._has_context + bool(self._names)

    def arrays(self, item: Prompt) -> list[Int32Array]:
        """See Form."""
        assert not item.images
        assert item.chat is None
        theirs = [] if item.teacher_ids is None else [item.teacher_ids]
        return [item.token_ids, *theirs, *_named(self._names, item.teacher_name)]

    def item(self, arrays: Sequence[Int32Array]) -> Prompt:
        """See Form."""
        return Prompt(
            token_ids=arrays[0],
            teacher_ids=arrays[1] if self._has_context else None,
            teacher_name=self._names[int(arrays[-1][0])] if self._names else "",
        )


def sequence_form(
    data: DataConfig, *, takes_chunks: bool, teacher_names: tuple[str, ...], has_weights: bool
) -> SequenceForm:
    """That of what an encoder makes of `data`."""
    kind: SequenceKind = "plain"
    if data.teacher_tokenizer is not None:
        kind = "in chunks" if takes_chunks else "aligned"
    elif data.teacher_context is not None:
        kind = "in context"
    return SequenceForm(kind, teacher_names, has_weights=has_weights)


def _named(names: tuple[str, ...], name: str) -> list[Int32Array]:
    return [np.array([names.index(name)], np.int32)] if names else []
