"""Which sequences, or which prompts, form each step, as a pure function of the step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kdmesh.sampling.seeds import seed_of
from kdmesh.types import TokenSequence
from kdmesh_trainer.data.blend import Blended, BlendOrder
from kdmesh_trainer.data.encoding.sides import Prompt
from kdmesh_trainer.data.shuffles import shuffled

# Added to the seed of a walk beside that of the prompts: a step shall not hold a prompt's samples and its answer too.
_OTHER_WALK = 2**32


class StepOrder(Protocol):
    """Which items each step holds: a pure function of seed and step."""

    def of_step(self, step: int) -> list[int]:
        """Indices of the step's items, over all ranks."""
        ...

    def counts(self, step: int) -> Mapping[str, int]:
        """How many of them are of each dataset of a blend, by name; empty for a single dataset."""
        ...

    @property
    def first_pass_steps(self) -> int:
        """Steps in which every item comes at least once."""
        ...


def step_order(items: Sequence[object], *, per_step: int, seed: int) -> StepOrder:
    """The order of a dataset's items, or of a blend's.

    Args:
        items: at least one.
        per_step: over all ranks.
    """
    if isinstance(items, Blended):
        return BlendOrder(items, per_step=per_step, seed=seed)
    return _SingleOrder(len(items), per_step=per_step, seed=seed)


class AnswerOrder:
    """Which of the data's own sequences each step holds beside its samples: a pure function of seed and step."""

    def __init__(self, sequences: Sequence[TokenSequence], *, per_step: int, seed: int) -> None:
        """
        Args:
            sequences: the same on every rank; at least one.
            per_step: over all ranks.
        """
        self._sequences = sequences
        self._order = step_order(sequences, per_step=per_step, seed=seed + _OTHER_WALK)

    def of_step(self, step: int) -> list[TokenSequence]:
        """The step's sequences, over all ranks; one may come twice where the dataset is small."""
        return [self._sequences[index] for index in self._order.of_step(step)]

    def counts(self, step: int) -> Mapping[str, int]:
        """As StepOrder."""
        return self._order.counts(step)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepPrompt(Prompt):
    """A prompt of one step."""

    seed: int  # sample i of it draws from seed + i


class PromptOrder:
    """Which prompts each step samples from, and where their draws start: a pure function of seed and step."""

    def __init__(self, prompts: Sequence[Prompt], *, per_step: int, seed: int) -> None:
        """
        Args:
            prompts: the same on every rank; at least one.
            per_step: over all ranks.
        """
        self._prompts = prompts
        self._order = step_order(prompts, per_step=per_step, seed=seed)
        self._seed = seed

    def of_step(self, step: int) -> list[StepPrompt]:
        """The step's prompts, over all ranks; one may come twice where the dataset is small."""
        prompts = [self._prompts[index] for index in self._order.of_step(step)]
        return [
            StepPrompt(
                token_ids=prompt.token_ids,
                teacher_ids=prompt.teacher_ids,
                teacher_name=prompt.teacher_name,
                images=prompt.images,
                teacher_images=prompt.teacher_images,
                chat=prompt.chat,
                question=prompt.question,
                seed=seed_of("training", self._seed, step, place),
            )
            for place, prompt in enumerate(prompts)
        ]

    def counts(self, step: int) -> Mapping[str, int]:
        """As StepOrder."""
        return self._order.counts(step)


class _SingleOrder:
    """A StepOrder of one dataset."""

    def __init__(self, number: int, *, per_step: int, seed: int) -> None:
        self._number = number
        self._per_step = per_step
        self._seed = seed

    def of_step(self, step: int) -> list[int]:
        return step_indices(step, number=self._number, per_step=self._per_step, seed=self._seed)

    def counts(self, step: int) -> Mapping[str, int]:
        return {}

    @property
    def first_pass_steps(self) -> int:
        return -(-self._number // self._per_step)


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
    """The order of one epoch."""
    return shuffled(number, seed, epoch)
