"""Which sequences form each step, as a pure function of the step."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from kdmesh.types import TokenSequence

# Added to the seed of a walk beside that of the prompts: a step shall not hold a prompt's samples and its answer too.
_OTHER_WALK = 2**32


class AnswerOrder:
    """Which of the data's own sequences each step holds beside its samples: a pure function of seed and step."""

    def __init__(self, sequences: Sequence[TokenSequence], *, per_step: int, seed: int) -> None:
        """
        Args:
            sequences: the same on every rank; at least one.
            per_step: over all ranks.
        """
        self._sequences = sequences
        self._per_step = per_step
        self._seed = seed + _OTHER_WALK

    def of_step(self, step: int) -> list[TokenSequence]:
        """The step's sequences, over all ranks; one may come twice where the dataset is small."""
        indices = step_indices(step, number=len(self._sequences), per_step=self._per_step, seed=self._seed)
        return [self._sequences[index] for index in indices]


def step_indices(step: int, *, number: int, per_step: int, seed: int) -> list[int]:
    """The `per_step` of `number` sequences that form step `step`.

    The steps walk through one epoch after the other, each shuffled anew; within an epoch no
    sequence is left out or comes twice. A step may take the end of one epoch and the
    beginning of the next. It depends on nothing else, so a run continues from its step
    number alone, on any number of ranks.
    """
    indices: list[int] = []
    place = step * per_step
    while len(indices) < per_step:
        epoch, begin = divmod(place, number)
        part = _epoch(epoch, number, seed)[begin : begin + per_step - len(indices)]
        indices.extend(part.tolist())
        place += len(part)
    return indices


@lru_cache(maxsize=2)  # the epoch that ends and the one that begins
def _epoch(epoch: int, number: int, seed: int) -> npt.NDArray[np.int64]:
    """The order of one epoch.

    By sorting raw random words: numpy keeps those the same for ever, which it does not
    promise of `Generator.permutation`.
    """
    words = np.random.PCG64(np.random.SeedSequence((seed, epoch))).random_raw(number)
    return np.argsort(words, kind="stable")
