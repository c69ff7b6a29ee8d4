"""Draws the tokens of a batch inside SGLang's scheduler process."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from kdmesh.sampling.drawing import Chance, Draw, draw
from kdmesh.sampling.stops import StopStrings
from kdmesh_rollout.sglang.ask import Ask


class DrawnSample:
    """One sample under way: its seed gives it the same chances as in the embedded engine.

    The chance of a place is kept, because SGLang may compute a place more than once: for every chunk of a prompt, and
    again when it had to give a sample's memory to others.

    Args:
        ask: what the server wants of it.
        decode: ids to text, special tokens included.
    """

    def __init__(self, ask: Ask, decode: Callable[[Sequence[int]], str]) -> None:
        self.vocabulary_size = ask.vocabulary_size
        self.never = ask.never
        self._sampling = ask.sampling
        self._stops = StopStrings(ask.sampling.stop_strings, decode)
        self._source = Chance(ask.seed)
        self._chances: list[float] = []

    def draw(self, prompt_ids: Sequence[int], drawn_ids: Sequence[int], device: torch.device) -> Draw:
        """How the token after `drawn_ids` is drawn."""
        while len(self._chances) <= len(drawn_ids):
            self._chances.append(self._source.next())
        seen_S = None
        if self._sampling.repetition_penalty != 1:
            seen = np.unique(np.array([*prompt_ids, *drawn_ids], np.int64))
            seen_S = torch.from_numpy(seen).to(device)
        return Draw(sampling=self._sampling, chance=self._chances[len(drawn_ids)], seen_S=seen_S)

    def is_stopped(self, drawn_ids: Sequence[int]) -> bool:
        """Whether the newest token has completed a stop string."""
        return self._stops.is_complete(drawn_ids)


def draw_rows(
    logits_BV: Tensor, draws: Sequence[Draw], *, vocabulary_size: int, never: int | None = None
) -> tuple[Tensor, Tensor]:
    """[B] tokens, [B] log-probabilities of SGLang's logits, whose last columns may be no tokens.

    Args:
        never: as `draw` has it.
    """
    tokens, logprobs = draw(logits_BV[:, :vocabulary_size].float(), draws, never=never)
    return (
        torch.tensor(tokens, dtype=torch.int64, device=logits_BV.device),
        torch.tensor(logprobs, dtype=torch.float32, device=logits_BV.device),
    )
