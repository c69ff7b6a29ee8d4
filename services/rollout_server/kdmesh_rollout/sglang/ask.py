"""What the server asks of a sample, inside SGLang's own requests: how its tokens are drawn, and which texts end it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from kdmesh.types import Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """For one sample."""

    sampling: Sampling  # its length and its stop tokens are SGLang's business, and may differ here
    seed: int  # always set: every process that shares the model draws, and all must draw the same
    vocabulary_size: int  # ids at or above it are never drawn
    never: int | None = None  # nor is this one; None: there is none

    def to_params(self) -> dict[str, int | float | list[str]]:
        """For custom_params, which hold numbers and flat lists."""
        return {
            "kdmesh_temperature": self.sampling.temperature,
            "kdmesh_top_p": self.sampling.top_p,
            "kdmesh_top_k": self.sampling.top_k,
            "kdmesh_min_p": self.sampling.min_p,
            "kdmesh_repetition_penalty": self.sampling.repetition_penalty,
            "kdmesh_stop_strings": list(self.sampling.stop_strings),
            "kdmesh_seed": self.seed,
            "kdmesh_vocabulary_size": self.vocabulary_size,
            "kdmesh_never": -1 if self.never is None else self.never,
        }

    @classmethod
    def from_params(cls, params: Mapping[str, Any] | None) -> Self | None:
        """None when the request is not one of ours."""
        if params is None or "kdmesh_seed" not in params:
            return None
        return cls(
            sampling=Sampling(
                temperature=params["kdmesh_temperature"],
                top_p=params["kdmesh_top_p"],
                top_k=params["kdmesh_top_k"],
                min_p=params["kdmesh_min_p"],
                repetition_penalty=params["kdmesh_repetition_penalty"],
                stop_strings=tuple(params["kdmesh_stop_strings"]),
                max_new_tokens=1,
            ),
            seed=params["kdmesh_seed"],
            vocabulary_size=params["kdmesh_vocabulary_size"],
            never=None if params["kdmesh_never"] < 0 else params["kdmesh_never"],
        )
