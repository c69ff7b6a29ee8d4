"""What the student is trained to minimise, as a trainer's configuration says."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Discriminator, Field, Tag, model_validator

from kdmesh.config import StrictModel
from kdmesh_trainer.sections.algorithm_config import (
    AlgorithmConfig,
    ChunkAlgorithm,
    ChunkLikelihood,
    DualSpace,
    VanillaKD,
)
from kdmesh_trainer.sections.layers_config import LayersConfig


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


class SkewedKL(StrictModel):
    """KL(teacher || skew teacher + (1 - skew) student), of DistiLLM."""

    name: Literal["skewed_kl"]

    skew: float = Field(0.1, gt=0, lt=1)
    """Weight of the teacher in the mixture."""


class SkewedReverseKL(StrictModel):
    """KL(student || skew student + (1 - skew) teacher), of DistiLLM."""

    name: Literal["skewed_reverse_kl"]

    skew: float = Field(0.1, gt=0, lt=1)
    """Weight of the student in the mixture."""


class TotalVariation(StrictModel):
    """Half the sum of |student - teacher|."""

    name: Literal["total_variation"]


class Renyi(StrictModel):
    """Renyi divergence of the teacher from the student."""

    name: Literal["renyi"]

    order: float = Field(gt=0, le=1e6)
    """Near 1 it is forward KL, which 1 itself is; the larger, the more unlikely tokens count. Required."""

    @model_validator(mode="after")
    def _is_not_kl(self) -> Renyi:
        if self.order == 1:
            raise ValueError("order is 1, which is forward_kl")
        return self


class AlphaBeta(StrictModel):
    """Alpha-beta divergence, of ABKD: near (1, 0) it is forward KL, near (0, 1) reverse KL."""

    name: Literal["alpha_beta"]

    alpha: float = Field(0.2, gt=0, le=1e6)
    """Concentrates on tokens that the teacher likes."""

    beta: float = Field(0.7, gt=0, le=1e6)
    """Concentrates on tokens that the student likes."""


class AdaptiveKL(StrictModel):
    """Forward and reverse KL, weighed by where in the teacher's distribution the gap lies, of AKL."""

    name: Literal["adaptive_kl"]

    tail_mass: float = Field(0.5, gt=0, lt=1)
    """Probability of the teacher's least likely tokens that count as its tail."""


class MaskedReverseKL(StrictModel):
    """Reverse KL where teacher and student prefer different tokens."""

    name: Literal["masked_reverse_kl"]


class EntropyGatedKL(StrictModel):
    """Reverse KL, and forward KL besides where the teacher is unsure, of EOPD."""

    name: Literal["entropy_gated_kl"]

    threshold: float = Field(0.8, gt=0)
    """Teacher's entropy in nats above which it counts as unsure."""

    forward_weight: float = Field(1.0, gt=0)
    """Weight of forward KL there."""


class Top1CrossEntropy(StrictModel):
    """Cross-entropy against the teacher's likeliest token, times its probability."""

    name: Literal["top1_cross_entropy"]


class HierarchicalRanking(StrictModel):
    """How far the student is out of the teacher's order among the likeliest tokens of both."""

    name: Literal["hierarchical_ranking"]

    top_k: int = Field(5, ge=2)
    """Likeliest tokens of each that are compared."""


class SampledReverseKL(StrictModel):
    """Reverse KL estimated from the sampled tokens alone, as a policy gradient; with source on_policy only."""

    name: Literal["sampled_reverse_kl"]


class CustomDivergence(StrictModel):
    """A divergence of your own: see docs/extending.md."""

    name: Literal["custom"]

    target: str = Field(pattern=r"^[\w.]+:\w+$")
    """module:function."""

    params: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments bound to the function; checked against its signature before anything loads."""


DivergenceConfig = Annotated[
    ForwardKL
    | ReverseKL
    | JensenShannon
    | SkewedKL
    | SkewedReverseKL
    | TotalVariation
    | Renyi
    | AlphaBeta
    | AdaptiveKL
    | MaskedReverseKL
    | EntropyGatedKL
    | Top1CrossEntropy
    | HierarchicalRanking
    | SampledReverseKL
    | CustomDivergence,
    Field(discriminator="name"),
]


class Keep(StrictModel):
    """Which of the teacher's tokens are compared one by one; exactly one of both."""

    top_k: int | None = Field(None, ge=1)
    """This many likeliest."""

    top_p: float | None = Field(None, gt=0, lt=1)
    """The fewest that have this probability together."""

    @model_validator(mode="after")
    def _one_of_both(self) -> Keep:
        if (self.top_k is None) == (self.top_p is None):
            raise ValueError("give top_k or top_p, and not both")
        return self


class Ramp(StrictModel):
    """A number that moves over the first optimizer steps, and then stays."""

    start: float = Field(ge=0, le=1e6)
    """In the first step. Required."""

    end: float = Field(ge=0, le=1e6)
    """From step `steps` on. Required."""

    steps: int = Field(ge=1, le=99_999_999)
    """Optimizer steps on the way. Required."""

    shape: Literal["linear", "cosine"] = "linear"
    """How it moves."""

    def at(self, step: int) -> float:
        """The number in step `step`, counted from 0."""
        done = min(step / self.steps, 1.0)
        if self.shape == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.start + (self.end - self.start) * done


_Kind = Discriminator(lambda given: "ramp" if isinstance(given, dict | Ramp) else "number")
_Weight: TypeAlias = Annotated[
    Annotated[float, Field(ge=0, le=1e6), Tag("number")] | Annotated[Ramp, Tag("ramp")], _Kind
]
_Temperature: TypeAlias = Annotated[
    Annotated[float, Field(gt=0, le=1e6), Tag("number")] | Annotated[Ramp, Tag("ramp")], _Kind
]


def _counts(weight: float | Ramp) -> bool:
    """Whether it is above 0 in any step."""
    return max(weight.start, weight.end) > 0 if isinstance(weight, Ramp) else weight > 0


class Distill(StrictModel):
    """Match the teacher's distribution at every loss position."""

    name: Literal["distill"] = "distill"

    algorithm: AlgorithmConfig = VanillaKD()
    """What is made of the rows of student and teacher."""

    divergence: DivergenceConfig = ForwardKL()
    """What is minimised between the two distributions."""

    keep: Keep | None = None
    """Compare these tokens, and the rest of the vocabulary as one; null compares every token."""

    temperature: _Temperature = 1.0
    """Divides both logits."""

    temperature_squared: bool = False
    """Multiply kd_weight by the square of the temperature, so that the gradient keeps its size."""

    kd_weight: _Weight = 1.0
    """Weight of the divergence."""

    ce_weight: _Weight = 0.0
    """Weight of cross-entropy on the data's own tokens, at temperature 1."""

    layers: LayersConfig | None = None
    """Compare hidden states below the last, too (docs/algorithms.md); null: none."""

    teacher_weights: dict[str, Annotated[float, Field(gt=0)]] | None = None
    """Every row learns the mixture of all `teachers`, each by its share of these numbers; null: it learns from one."""

    @property
    def compares_chunks(self) -> bool:
        """Whether it looks at runs of tokens that are the same bytes under two tokenizers."""
        if isinstance(self.algorithm, DualSpace):
            return self.algorithm.token_alignment == "cma"
        return isinstance(self.algorithm, ChunkAlgorithm)

    @property
    def needs_boundaries(self) -> bool:
        """Whether it asks which tokens begin words."""
        return isinstance(self.algorithm, ChunkLikelihood) and self.algorithm.debias_above is not None

    @property
    def compares_layers_alone(self) -> bool:
        """Whether nothing of a student's distribution has a weight in any step."""
        return self.layers is not None and not (_counts(self.kd_weight) or _counts(self.ce_weight))

    @property
    def imitates_data(self) -> bool:
        """Whether cross-entropy has a weight in any step."""
        return _counts(self.ce_weight)

    def numbers_at(self, step: int) -> dict[str, float]:
        """temperature, kd_weight and ce_weight of step `step`, counted from 0."""
        temperature, kd_weight, ce_weight = (
            number.at(step) if isinstance(number, Ramp) else number
            for number in (self.temperature, self.kd_weight, self.ce_weight)
        )
        if self.temperature_squared:
            kd_weight *= temperature**2
        return {"temperature": temperature, "kd_weight": kd_weight, "ce_weight": ce_weight}

    @model_validator(mode="after")
    def _some_weight(self) -> Distill:
        if self.layers is None and not (_counts(self.kd_weight) or _counts(self.ce_weight)):
            raise ValueError("kd_weight and ce_weight are both 0: nothing would be learnt")
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> Distill:
        if isinstance(self.temperature, Ramp) and not min(self.temperature.start, self.temperature.end) > 0:
            raise ValueError("temperature must be above 0 from its start to its end")
        if self.keep is not None and isinstance(self.divergence, SampledReverseKL):
            raise ValueError("keep does not go with sampled_reverse_kl, which looks at one token anyway")
        looks_at_likeliest = isinstance(self.divergence, Top1CrossEntropy | MaskedReverseKL | HierarchicalRanking)
        if self.keep is not None and looks_at_likeliest:
            raise ValueError(
                f"keep does not go with {self.divergence.name}, which looks at the likeliest tokens: all others, taken "
                "for one token, may be that"
            )
        return self

    @model_validator(mode="after")
    def _has_an_effect(self) -> Distill:
        if not isinstance(self.algorithm, ChunkAlgorithm):
            return self
        name = self.algorithm.name
        if self.divergence != ForwardKL() or self.keep is not None:
            raise ValueError(f"algorithm {name} has its own divergence: leave out divergence and keep")
        if isinstance(self.algorithm, ChunkLikelihood) and self.temperature != 1:
            raise ValueError("algorithm alm takes likelihoods at temperature 1; its own tau flattens them")
        return self


class Sft(StrictModel):
    """Cross-entropy on the data's own tokens; a teacher, if any, only serves evaluation."""

    name: Literal["sft"]
