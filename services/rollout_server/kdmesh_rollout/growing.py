"""One sample while it is being drawn."""

from __future__ import annotations

import numpy as np
import torch

from kdmesh.types import FinishReason, Int32Array, Sample
from kdmesh_rollout.drawing import Chance, Draw
from kdmesh_rollout.engine import Finished, Order
from kdmesh_rollout.stops import StopStrings


class GrowingSample:
    """The tokens so far, and whether they are all.

    Args:
        order: what was asked for.
        max_sequence_tokens: of prompt and response together.
        stops: of its stop strings.
    """

    def __init__(self, order: Order, *, max_sequence_tokens: int, stops: StopStrings) -> None:
        self.key = order.key
        self._order = order
        self._most = min(order.sampling.max_new_tokens, max_sequence_tokens - len(order.prompt_ids))
        self._stops = stops
        self._chance = Chance(order.seed)
        self._token_ids: list[int] = []
        self._logprobs: list[float] = []
        self._versions: list[int] = []  # of the first token, and of the newest

    @property
    def longest(self) -> int:
        """Most tokens that prompt and response can come to."""
        return len(self._order.prompt_ids) + self._most

    @property
    def sequence_ids(self) -> Int32Array:
        """The prompt, and what was drawn."""
        return np.concatenate([self._order.prompt_ids, np.array(self._token_ids, np.int32)])

    @property
    def num_drawn(self) -> int:
        """Tokens drawn so far."""
        return len(self._token_ids)

    @property
    def newest(self) -> int:
        """The last token drawn."""
        return self._token_ids[-1]

    def draw(self, device: torch.device) -> Draw:
        """How its next token is drawn; to be asked once for each."""
        seen_S = None
        if self._order.sampling.repetition_penalty != 1:
            seen_S = torch.from_numpy(np.unique(self.sequence_ids).astype(np.int64)).to(device)
        return Draw(sampling=self._order.sampling, chance=self._chance.next(), seen_S=seen_S)

    def take(self, token: int, logprob: float, *, version: int) -> Finished | None:
        """Append what was drawn with the weights of `version`; the sample, when that was its last token."""
        self._token_ids.append(token)
        self._logprobs.append(logprob)
        self._versions = [*self._versions[:1], version]
        if token in self._order.sampling.stop_token_ids or self._stops.is_complete(self._token_ids):
            return self._finished(FinishReason.STOP)
        return self._finished(FinishReason.LENGTH) if len(self._token_ids) == self._most else None

    def _finished(self, reason: FinishReason) -> Finished:
        sample = Sample(
            token_ids=np.array(self._token_ids, np.int32),
            logprobs=np.array(self._logprobs, np.float32),
            finish_reason=reason,
            min_weight_version=self._versions[0],
            max_weight_version=self._versions[-1],
        )
        return Finished(key=self.key, sample=sample)
