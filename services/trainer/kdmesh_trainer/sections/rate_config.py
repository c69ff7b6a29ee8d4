"""How the learning rate goes after its warm-up."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field, model_validator

from kdmesh.config import StrictModel


class Cosine(StrictModel):
    """Half a wave of the cosine down to the end."""

    name: Literal["cosine"] = "cosine"


class Linear(StrictModel):
    """A straight line down to the end."""

    name: Literal["linear"] = "linear"


class Polynomial(StrictModel):
    """A power of the part of the way that is left."""

    name: Literal["polynomial"] = "polynomial"

    power: float = Field(gt=0)
    """1 is a line, 2 falls faster at first. Required."""


class WarmupStableDecay(StrictModel):
    """The peak, until the last part of the run falls to the end."""

    name: Literal["wsd"] = "wsd"

    decay_fraction: float = Field(0.2, gt=0, le=1)
    """That part of all steps, rounded up."""

    decay_steps: int | None = Field(None, ge=1)
    """So many steps, instead of a part of them; null: it is the part."""

    shape: Literal["1-sqrt", "linear", "cosine"] = "1-sqrt"
    """How it falls."""

    def decay_of(self, steps: int) -> int:
        """Steps below the peak at the end of a run with so many."""
        return share_of(steps, self.decay_fraction) if self.decay_steps is None else self.decay_steps

    @model_validator(mode="after")
    def _one_of_both(self) -> WarmupStableDecay:
        if self.decay_steps is not None and "decay_fraction" in self.model_fields_set:
            raise ValueError("give decay_fraction or decay_steps, and not both")
        return self


class InverseSqrt(StrictModel):
    """1 over the root of the steps since the peak, whatever the number of all steps."""

    name: Literal["inverse_sqrt"] = "inverse_sqrt"

    timescale: int | None = Field(None, ge=1)
    """Steps after the peak at which it is 1 over the root of 2; null: as many as those of warm-up."""


class Constant(StrictModel):
    """The peak."""

    name: Literal["constant"] = "constant"


def _of_name(given: Any) -> Any:
    return {"name": given} if isinstance(given, str) else given


_Rate: TypeAlias = Annotated[
    Cosine | Linear | Polynomial | WarmupStableDecay | InverseSqrt | Constant, Field(discriminator="name")
]
_Named: TypeAlias = Literal["cosine", "linear", "wsd", "inverse_sqrt", "constant"]
RateConfig: TypeAlias = Annotated[
    _Rate,
    BeforeValidator(_of_name, json_schema_input_type=_Named | _Rate),
]


def share_of(steps: int, fraction: float) -> int:
    """That part of so many steps, rounded up; a fraction is what it is in decimals: 0.1 of 30 is 3."""
    return math.ceil(Fraction(str(fraction)) * steps)
