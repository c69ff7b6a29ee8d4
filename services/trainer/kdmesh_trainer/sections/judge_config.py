"""What a trainer can be told of how much each of the student's own samples counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from kdmesh.config import StrictModel
from kdmesh_trainer.sections.algorithm_config import VanillaKD
from kdmesh_trainer.sections.objective_config import Distill
from kdmesh_trainer.sections.questions_config import MatchConfig

if TYPE_CHECKING:
    from kdmesh_trainer.config import TrainerConfig

SampleWeight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class FinishedJudge(StrictModel):
    """Samples that have ended weigh 1, and others less."""

    name: Literal["finished"]

    cut: SampleWeight = 0.0
    """Weight of samples that were cut at max_new_tokens; 0 leaves them out."""


class MatchJudge(StrictModel):
    """Samples weigh by whether they are right, as the answers to evaluation.questions are."""

    name: Literal["match"]

    match: MatchConfig
    """When a response is right. Required."""

    answer: str | None = None
    """Column of the answer: a text, a number, or a list of them, of which any is right; null: it is the assistant's
    turn that ends the chat."""

    right: SampleWeight = 1.0
    """Weight of samples that are right."""

    wrong: SampleWeight = 0.0
    """Weight of all others; 0 leaves them out."""

    cut: SampleWeight | None = None
    """Weight of samples that were cut at max_new_tokens, right or wrong; null: as of any other."""

    @model_validator(mode="after")
    def _trains_on_some(self) -> MatchJudge:
        if self.right == self.wrong == 0:
            raise ValueError("right and wrong are both 0, so that nothing would be trained on; raise one")
        return self


class CustomJudge(StrictModel):
    """A judge of your own: see docs/extending.md."""

    name: Literal["custom"]

    target: str = Field(pattern=r"^[\w.]+:\w+$")
    """module:function, called as function(response, row, is_cut_off, **params), with source.environment as
    function(response, row, is_cut_off, messages, **params); returns the sample's weight."""

    params: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the function; checked against its signature before anything loads."""

    def num_arguments(self, *, of_episodes: bool) -> int:
        """That are given by their place."""
        return 4 if of_episodes else 3


JudgeConfig = Annotated[FinishedJudge | MatchJudge | CustomJudge, Field(discriminator="name")]


def refuse_unfit_judge(cfg: TrainerConfig, judge: FinishedJudge | MatchJudge | CustomJudge) -> None:
    """Raises ValueError when what the judge says cannot be heeded, or it cannot have what it needs."""
    if isinstance(cfg.objective, Distill) and not isinstance(cfg.objective.algorithm, VanillaKD):
        raise ValueError(
            f"source.judge does not go with objective.algorithm {cfg.objective.algorithm.name}; it must be vanilla_kd"
        )
    if cfg.data.teacher_tokenizer is not None:
        raise ValueError("source.judge does not go with data.teacher_tokenizer")
    if cfg.parallel.context > 1:
        raise ValueError(
            f"parallel.context is {cfg.parallel.context}, which does not go with source.judge; it must be 1"
        )
    if cfg.data.token_cache is not None and not isinstance(judge, FinishedJudge):
        raise ValueError(f"data.token_cache does not go with source.judge {judge.name}, which needs the rows")
