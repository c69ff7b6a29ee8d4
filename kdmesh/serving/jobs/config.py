"""What a server's configuration says of one of the jobs that share it."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field

from kdmesh.config import StrictModel


class JobTerms(StrictModel):
    """What one job may take of a server."""

    weight: float = Field(1.0, ge=0.001, le=1000)
    """Its share of the engine among the jobs that wait in its class: its weight over the sum of theirs."""

    priority: Literal["high", "normal", "low"] = "normal"
    """Its class. While a higher class can start anything, a lower one gets only the room that it leaves in a batch."""

    max_tokens_in_flight: int | None = Field(None, ge=1)
    """Tokens that the engine computes for it at once; null: no limit. A request that is larger goes alone."""

    max_requests_per_s: float | None = Field(None, ge=0.001)
    """Requests, or samples, that may start in a second, after a burst of one second's; null: no limit."""

    def over(self, defaults: Self) -> Self:
        """These terms where they say something, and `defaults` where they do not."""
        return defaults.model_copy(update={name: getattr(self, name) for name in self.model_fields_set})
