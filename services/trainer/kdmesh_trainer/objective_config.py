"""What a student can be told to minimise."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from kdmesh.config import StrictModel


class ForwardKL(StrictModel):
    """KL(teacher || student)."""

    name: Literal["forward_kl"] = "forward_kl"


class ReverseKL(StrictModel):
    """KL(student || teacher)."""

    name: Literal["reverse_kl"]


class JensenShannon(StrictModel):
    """Generalised Jensen-Shannon divergence of the GKD paper."""

    name: Literal["jensen_shannon"]

    beta: float = Field(0.5, gt=0, lt=1)
    """Weight of the teacher in the mixture: m = beta p + (1 - beta) q."""


class CustomDivergence(StrictModel):
    """A divergence of your own: see docs/extending.md."""

    name: Literal["custom"]

    target: str = Field(pattern=r"^[\w.]+:\w+$")
    """module:function."""

    params: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments bound to the function; checked against its signature before anything loads."""


DivergenceConfig = Annotated[ForwardKL | ReverseKL | JensenShannon | CustomDivergence, Field(discriminator="name")]


class Distill(StrictModel):
    """Match the teacher's distribution at every loss position."""

    name: Literal["distill"] = "distill"

    divergence: DivergenceConfig = ForwardKL()
    """What is minimised between the two distributions."""

    temperature: float = Field(1.0, gt=0)
    """Divides both logits; the gradient is not rescaled by its square."""

    kd_weight: float = Field(1.0, ge=0)
    """Weight of the divergence."""

    ce_weight: float = Field(0.0, ge=0)
    """Weight of cross-entropy on the data's own tokens, at temperature 1."""

    teacher_weights: dict[str, Annotated[float, Field(gt=0)]] | None = None
    """Every row learns the mixture of all `teachers`, each by its share of these numbers; null: it learns from one."""

    @model_validator(mode="after")
    def _some_weight(self) -> Distill:
        if self.kd_weight == 0 and self.ce_weight == 0:
            raise ValueError("kd_weight and ce_weight are both 0: nothing would be learnt")
        return self


class Sft(StrictModel):
    """Cross-entropy on the data's own tokens; a teacher, if any, only serves evaluation."""

    name: Literal["sft"]
