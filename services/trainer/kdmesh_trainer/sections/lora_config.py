"""What a trainer can be told of adapters."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from kdmesh.config import StrictModel


class LoraConfig(StrictModel):
    """Low-rank adapters on some of the student's linear modules; everything else is frozen. Needs kdmesh[lora]."""

    rank: int = Field(16, ge=1, le=65_536)
    """Inner size of an adapter: a matrix W becomes W + scale * B A, with rank rows in A."""

    alpha: int = Field(32, ge=1, le=1_000_000)
    """Numerator of the adapter's scale, which is alpha / rank."""

    use_rslora: bool = False
    """rsLoRA: the scale is alpha / sqrt(rank), so that adapters of a large rank do not learn more slowly."""

    dropout: float = Field(0.0, ge=0, lt=1)
    """Fraction of an adapter's inputs that are zeroed in training."""

    use_dora: bool = False
    """DoRA: the length of each row of an adapted matrix is learnt apart from its direction. Servers then get whole
    matrices with every version."""

    base: Literal["full", "nf4"] = "full"
    """What the body's linear matrices rest in, with an adapter or without: as they are, or in 4 bits a number and a
    scale for each 64 (QLoRA). The student is then what they are rounded to, with its adapters."""

    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Names, or last parts of names, of linear modules of the body; all-linear takes all of them."""

    @property
    def scale(self) -> float:
        """What the product of an adapter's matrices is multiplied with."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    @model_validator(mode="after")
    def _some_module(self) -> LoraConfig:
        if not self.target_modules:
            raise ValueError("target_modules is empty: nothing would be learnt")
        return self

    @model_validator(mode="after")
    def _base_fits(self) -> LoraConfig:
        if self.base == "nf4" and self.use_dora:
            raise ValueError("base nf4 does not go with use_dora, which measures whole matrices in every pass")
        return self
