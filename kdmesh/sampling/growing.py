"""One sample while it is being drawn."""

from __future__ import annotations

import numpy as np
import torch

from kdmesh.sampling.drawing import Chance, Draw
from kdmesh.sampling.stops import StopStrings
from kdmesh.types import FinishReason, Int32Array, PlacedImage, Sample, Sampling


class GrowingSample:
    """The tokens so far, and whether they are all.

    Args:
        key: a number of the caller's.
        prompt_ids: at least one.
        seed: None draws differently each time.
        max_sequence_tokens: of prompt and response together.
        stops: of its stop strings.
        images: of the prompt.
    """

    def __init__(
        self,
        key: int,
        prompt_ids: Int32Array,
        *,
        sampling: Sampling,
        seed: int | None,
        max_sequence_tokens: int,
        stops: StopStrings,
        images: tuple[PlacedImage, ...] = (),
    ) -> None:
        self.key = key
        self.images = images
        self._prompt_ids = prompt_ids
        self._sampling = sampling
        self._most = min(sampling.max_new_tokens, max_sequence_tokens - len(prompt_ids))
        self._stops = stops
        self._chance = Chance(seed)
        self._token_ids: list[int] = []
        self._logprobs: list[float] = []
        self._versions: list[int] = []  # of the first token, and of the newest

    @property
    def longest(self) -> int:
        """Most tokens that prompt and response can come to."""
        return len(self._prompt_ids) + self._most

    @property
    def sequence_ids(self) -> Int32Array:
        """The prompt, and what was drawn."""
        return np.concatenate([self._prompt_ids, np.array(self._token_ids, np.int32)])

    @property
    def name(self) -> bytes:
        """Of its tokens and images: equal for those that may begin as one."""
        images = b"".join(image.digest for image in self.images)
        return len(self.images).to_bytes(8, "little") + images + self.sequence_ids.tobytes()

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
        if self._sampling.repetition_penalty != 1:
            seen_S = torch.from_numpy(np.unique(self.sequence_ids).astype(np.int64)).to(device)
        return Draw(sampling=self._sampling, chance=self._chance.next(), seen_S=seen_S)

    def take(self, token: int, logprob: float, *, version: int) -> Sample | None:
        """Append what was drawn with the weights of `version`; the sample, when that was its last token."""
        self._token_ids.append(token)
        self._logprobs.append(logprob)
        self._versions = [*self._versions[:1], version]
        if token in self._sampling.stop_token_ids or self._stops.is_complete(self._token_ids):
            return self._finished(FinishReason.STOP)
        return self._finished(FinishReason.LENGTH) if len(self._token_ids) == self._most else None

    def _finished(self, reason: FinishReason) -> Sample:
        return Sample(
            token_ids=np.array(self._token_ids, np.int32),
            logprobs=np.array(self._logprobs, np.float32),
            finish_reason=reason,
            min_weight_version=self._versions[0],
            max_weight_version=self._versions[-1],
        )
