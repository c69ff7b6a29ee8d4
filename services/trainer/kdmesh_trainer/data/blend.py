"""Several datasets that are drawn from in fixed proportions."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from kdmesh_trainer.data.lazy import Lazy
from kdmesh_trainer.data.shuffles import shuffled

T = TypeVar("T")

Int64Array = npt.NDArray[np.int64]

# Words of a key beside those of the orders of a single dataset, which have no third word.
_OF_BLOCK = 1
_OF_DATASET = 2


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Part(Generic[T]):
    """One of several datasets."""

    name: str
    weight: Fraction  # its share of all draws; those of a blend add up to 1
    items: Sequence[T]  # at least one


class Blended(Lazy[T]):
    """The items of several datasets, one dataset after the other; a BlendOrder says which come when.

    Attributes:
        parts: the datasets.
        begins: index of each one's first item.
    """

    def __init__(self, parts: Sequence[Part[T]]) -> None:
        self.parts = tuple(parts)
        *begins, self._number = itertools.accumulate((len(part.items) for part in parts), initial=0)
        self.begins = tuple(begins)

    def __len__(self) -> int:
        return self._number

    def __iter__(self) -> Iterator[T]:
        return itertools.chain.from_iterable(part.items for part in self.parts)

    def item(self, number: int) -> T:
        """See Lazy."""
        part = bisect_right(self.begins, number) - 1
        return self.parts[part].items[number - self.begins[part]]


def blend_identity(items: Sequence[object]) -> dict[str, str]:
    """What a checkpoint can only be continued with, by configuration key, beside what each dataset holds."""
    if not isinstance(items, Blended):
        return {}
    return {"data.train (weights)": ", ".join(f"{part.name} {part.weight}" for part in items.parts)}


def digest_key(key: str, name: str) -> str:
    """Of the digest of what dataset `name` has for a key of the configuration; the only dataset's name is empty."""
    return f"{key} (digest of {name})" if name else f"{key} (digest)"


def parts_of(items: Sequence[T]) -> dict[str, Sequence[T]]:
    """The datasets of a blend by name, or the only one there is, whose name is empty."""
    return {part.name: part.items for part in items.parts} if isinstance(items, Blended) else {"": items}


class Proportions:
    """How many of the first so many draws are of each dataset.

    After any number of draws the count of each dataset is less than 1 away from its weight times that number: the
    weights are put end to end from 0 to 1, multiplied by the number, and every edge is rounded.
    """

    def __init__(self, weights: Sequence[Fraction]) -> None:
        """`weights` are above 0 and add up to 1."""
        self._edges = tuple(itertools.accumulate(weights))
        # So many that every dataset has a whole draw among them: then no count falls from one block to the next.
        self.block = max(math.ceil(1 / weight) for weight in weights)

    def counts(self, draws: int) -> list[int]:
        """Of each dataset, among the first `draws`."""
        edges = [0, *(math.floor(draws * edge + Fraction(1, 2)) for edge in self._edges)]
        return [end - begin for begin, end in itertools.pairwise(edges)]


class BlendOrder:
    """Which of the items of a blend each step holds: a pure function of seed and step.

    Draws come in blocks. How many of a block are of which dataset is `Proportions`'s; in which order is shuffled for
    each block. Every dataset is walked through in epochs of its own, each shuffled anew, so that within one no
    item is left out or comes twice. All of it follows from the number of the draw, so a run continues from its step
    alone, on any number of ranks.
    """

    def __init__(self, blended: Blended[object], *, per_step: int, seed: int) -> None:
        """`per_step` is over all ranks."""
        self._names = tuple(part.name for part in blended.parts)
        self._proportions = Proportions([part.weight for part in blended.parts])
        self._per_step = per_step
        self._seed = seed
        self._walks = tuple(
            _Walk(len(part.items), begin=begin, key=(seed, number))
            for number, (part, begin) in enumerate(zip(blended.parts, blended.begins, strict=True))
        )
        self._longest = max((len(part.items) + 1) / part.weight for part in blended.parts)
        self._draws = lru_cache(maxsize=2)(self._of_block)

    def of_step(self, step: int) -> list[int]:
        """The step's items, over all ranks; one may come twice where a dataset is small for its weight."""
        return [self._walks[dataset].item(number) for dataset, number in self._drawn(step)]

    def counts(self, step: int) -> Mapping[str, int]:
        """How many of the step's items are of each dataset, by name."""
        drawn = Counter(dataset for dataset, _ in self._drawn(step))
        return {name: drawn[dataset] for dataset, name in enumerate(self._names)}

    @property
    def first_pass_steps(self) -> int:
        """Steps in which every item of every dataset comes at least once."""
        return math.ceil((self._longest + self._proportions.block) / self._per_step)

    def _drawn(self, step: int) -> list[tuple[int, int]]:
        """For each item its dataset, and the number of draws from that one before it."""
        drawn: list[tuple[int, int]] = []
        place = step * self._per_step
        while len(drawn) < self._per_step:
            block, begin = divmod(place, self._proportions.block)
            part = self._draws(block)[begin : begin + self._per_step - len(drawn)]
            drawn.extend((dataset, number) for dataset, number in part.tolist())
            place += len(part)
        return drawn

    def _of_block(self, block: int) -> Int64Array:
        """[block, 2] the dataset of each draw, and the number of draws from it before."""
        size = self._proportions.block
        before = self._proportions.counts(block * size)
        after = self._proportions.counts((block + 1) * size)
        counts = [end - begin for begin, end in zip(before, after, strict=True)]
        datasets = np.repeat(np.arange(len(counts)), counts)[shuffled(size, self._seed, block, _OF_BLOCK)]
        drawn = np.stack([datasets, datasets], axis=1)
        for dataset, begin in enumerate(before):
            places = np.flatnonzero(datasets == dataset)
            drawn[places, 1] = begin + np.arange(len(places))
        return drawn


class _Walk:
    """One dataset's items in the order of its epochs."""

    def __init__(self, number: int, *, begin: int, key: tuple[int, int]) -> None:
        """
        Args:
            begin: of its items among those of the blend.
            key: seed and number of the dataset.
        """
        self._number = number
        self._begin = begin
        seed, dataset = key
        # The epoch that ends and the one that begins.
        self._epoch = lru_cache(maxsize=2)(lambda epoch: shuffled(number, seed, epoch, _OF_DATASET, dataset))

    def item(self, draw: int) -> int:
        """What draw number `draw` from this dataset gives."""
        epoch, place = divmod(draw, self._number)
        return self._begin + int(self._epoch(epoch)[place])
