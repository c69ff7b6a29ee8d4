"""How the rows of student and teacher become a loss, as a trainer's configuration says."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from kdmesh.config import StrictModel


class VanillaKD(StrictModel):
    """The student's distribution against the teacher's, row by row."""

    name: Literal["vanilla_kd"] = "vanilla_kd"


class DualSpace(StrictModel):
    """The two models are compared through the student's head and through the teacher's, of DSKD."""

    name: Literal["dskd"]

    token_alignment: Literal["eta", "cma"] = "eta"
    """How rows of the two find each other with data.teacher_tokenizer: eta takes those that are one token for both, cma
    looks by attention."""

    student_projector: Literal["follows", "trained"] = "follows"
    """What takes the student's rows into the teacher's space: follows is the map that keeps their logits under the
    heads of each step, trained is one that begins as such and is learnt."""

    learning_rate_factor: float = Field(1.0, gt=0)
    """Learning rate of the projectors that are learnt, as a multiple of optimizer.learning_rate."""


class ChunkLikelihood(StrictModel):
    """How likely both find the same bytes, run by run: needs data.teacher_tokenizer; docs/other_tokenizer.md."""

    name: Literal["alm"]

    tau: float = Field(100.0, gt=0)
    """Likelihoods are taken to the power of 1 / tau, and the loss times tau; large ones compare their logarithms."""

    debias_above: float | None = Field(None, ge=0, lt=1)
    """Compare each run together with the probability that a word ends behind it, and let runs end only where the
    teacher gives that more than this (outcome chunk debiasing); null: compare the runs alone."""


class ByRank(StrictModel):
    """Sorted probabilities of the first token of each run, rank by rank: needs data.teacher_tokenizer."""

    name: Literal["uld"]


class Hybrid(StrictModel):
    """Tokens of both vocabularies one by one, and the rest rank by rank: needs data.teacher_tokenizer."""

    name: Literal["gold"]

    beta: float = Field(0.5, gt=0, lt=1)
    """Weight of the teacher in the mixture of the Jensen-Shannon divergence over tokens that both have."""

    matched_weight: float | None = Field(None, ge=0)
    """Weight of those tokens; null: their part of the teacher's vocabulary."""

    unmatched_weight: float | None = Field(None, ge=0)
    """Weight of the rest; null: the rest's part of the teacher's vocabulary."""

    @model_validator(mode="after")
    def _some_weight(self) -> Hybrid:
        if self.matched_weight == 0 and self.unmatched_weight == 0:
            raise ValueError("matched_weight and unmatched_weight are both 0: nothing would be learnt")
        return self


ChunkAlgorithm = ChunkLikelihood | ByRank | Hybrid
"""What compares runs of tokens that are the same bytes under two tokenizers."""


class CustomAlgorithm(StrictModel):
    """An algorithm of your own: see docs/extending.md."""

    name: Literal["custom"]

    target: str = Field(pattern=r"^[\w.]+:\w+$")
    """module:Class."""

    params: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the class; checked against its signature before anything loads."""

    learning_rate_factor: float = Field(1.0, gt=0)
    """Learning rate of its own parameters, if it has any, as a multiple of optimizer.learning_rate."""


AlgorithmConfig = Annotated[
    VanillaKD | DualSpace | ChunkLikelihood | ByRank | Hybrid | CustomAlgorithm, Field(discriminator="name")
]
