"""A dataset whose items lie in files, and what is known of it without looking at each."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from kdmesh.tokens import RunningDigest
from kdmesh.types import PlacedImage, TokenSequence
from kdmesh_trainer.data.blend import parts_of
from kdmesh_trainer.data.encoding.sides import (
    Addressed,
    Aligned,
    InChunks,
    Prompt,
    TeacherSide,
    aligned_rows,
    teacher_side,
)
from kdmesh_trainer.data.kept.forms import Form
from kdmesh_trainer.data.kept.record_store import Records
from kdmesh_trainer.data.lazy import Lazy
from kdmesh_trainer.data.prompts import digest_prompts

T = TypeVar("T")
F = TypeVar("F")


class Stored(Lazy[T], Generic[T, F]):
    """Items that are read from their files when they are looked at. None has images.

    Attributes:
        facts: SequenceFacts or PromptFacts.
    """

    def __init__(self, records: Records, form: Form[T], facts: F) -> None:
        self._records = records
        self._form = form
        self.facts = facts

    def __len__(self) -> int:
        return len(self._records)

    def item(self, number: int) -> T:
        """See Lazy."""
        return self._form.item(self._records.arrays(number))


@dataclass(frozen=True, slots=True, kw_only=True)
class Longest:
    """The most that one sequence has."""

    tokens: int
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceFacts:
    """Of the sequences of a dataset."""

    digest: str
    teacher_digest: str  # of them as the teacher reads them; the same where it reads the same
    teacher_names: str  # of each one's teacher, one after the other, as a digest; empty: none is named
    has_other_tokenizer: bool  # the teacher's
    longest: Mapping[str, Longest]  # as the teacher reads them, by the name of the one that is asked, empty for all
    rows: int
    aligned_rows: int  # that are compared with the teacher's
    weights: str = ""  # of each one, as a digest; empty: all are 1

    @classmethod
    def of_tree(cls, tree: Mapping[str, Any]) -> SequenceFacts:
        """From what `asdict` gave."""
        longest = {name: Longest(**most) for name, most in tree["longest"].items()}
        return cls(**{**tree, "longest": longest})


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptFacts:
    """Of the prompts of a dataset."""

    digest: str
    longest: int  # tokens
    longest_read: Mapping[str, int]  # by the teacher, and by the name of the one that is asked, empty for all


def sequence_facts(sequences: Sequence[TokenSequence]) -> SequenceFacts:
    """Of one dataset; of one that is not stored by `measured`."""
    if isinstance(sequences, Stored):
        found: SequenceFacts = sequences.facts
        return found
    return measured(sequences)


def measured(sequences: Sequence[TokenSequence]) -> SequenceFacts:
    """Looks at every sequence once, one after the other, and keeps none."""
    own, theirs = RunningDigest(len(sequences)), RunningDigest(len(sequences))
    names: list[str] = []
    weights: list[float] = []
    longest: dict[str, Longest] = {}
    rows = rows_compared = 0
    has_other_tokenizer = False
    for sequence in sequences:
        [read] = teacher_side([sequence])
        own.add(sequence)
        theirs.add(read)
        if isinstance(read, Addressed):
            names.append(read.teacher_name)
        weights.append(sequence.weight)
        has_other_tokenizer |= isinstance(sequence, Aligned | InChunks)
        _add_length(longest, *_length(read))
        rows += sequence.num_rows
        rows_compared += aligned_rows(sequence)
    weight = np.array(weights, "<f8")
    return SequenceFacts(
        digest=own.digest().hex(),
        teacher_digest=theirs.digest().hex(),
        teacher_names=hashlib.blake2b(" ".join(names).encode()).hexdigest() if names else "",
        has_other_tokenizer=has_other_tokenizer,
        longest=longest,
        rows=rows,
        aligned_rows=rows_compared,
        weights="" if (weight == 1).all() else hashlib.blake2b(weight.tobytes()).hexdigest(),
    )


def longest_of(sequences: Sequence[TokenSequence]) -> dict[str, Longest]:
    """As SequenceFacts has it, of a dataset or a blend."""
    longest: dict[str, Longest] = {}
    for part in parts_of(sequences).values():
        for each in part.facts.longest.items() if isinstance(part, Stored) else map(_length, TeacherSide(part)):
            _add_length(longest, *each)
    return longest


def prompt_facts(prompts: Sequence[Prompt]) -> PromptFacts:
    """Of one dataset, as sequence_facts."""
    if isinstance(prompts, Stored):
        found: PromptFacts = prompts.facts
        return found
    return measured_prompts(prompts)


def measured_prompts(prompts: Sequence[Prompt]) -> PromptFacts:
    """Looks at every prompt, one after the other, and keeps none."""
    longest_read: dict[str, int] = {}
    for prompt in prompts:
        read = prompt.token_ids if prompt.teacher_ids is None else prompt.teacher_ids
        longest_read[prompt.teacher_name] = max(longest_read.get(prompt.teacher_name, 0), len(read))
    return PromptFacts(
        digest=digest_prompts(prompts).hex(),
        longest=max(len(prompt.token_ids) for prompt in prompts),
        longest_read=longest_read,
    )


def images_of(items: Sequence[TokenSequence | Prompt]) -> Iterator[PlacedImage]:
    """All images of a dataset or a blend, as the student reads it."""
    for part in parts_of(items).values():
        if not isinstance(part, Stored):
            for item in part:
                yield from item.images


def _length(read: TokenSequence) -> tuple[str, Longest]:
    """(the name of the teacher that is asked, empty for all; what it reads)."""
    asked = read.teacher_name if isinstance(read, Addressed) else ""
    return asked, Longest(tokens=read.num_tokens, rows=read.num_rows)


def _add_length(longest: dict[str, Longest], name: str, one: Longest) -> None:
    most = longest.get(name, one)
    longest[name] = Longest(tokens=max(most.tokens, one.tokens), rows=max(most.rows, one.rows))
